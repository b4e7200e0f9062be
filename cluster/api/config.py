"""The controller's part of the config tree. Frozen; all times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """When the number of a model's workers changes. Load 1 is full: see cluster/scaling.py."""

    high_load: float = 0.85  # above it for `up_after_s`: more
    target_load: float = 0.6  # what a change aims at
    low_load: float = 0.4  # below it for `down_after_s`: one less
    min_attainment: float = 0.9  # a loaded model that keeps fewer of its promises gets one more
    backlog_s: float = 2.0  # seconds of queued prompt work per worker that count as load 1
    up_after_s: float = 2.0
    down_after_s: float = 60.0
    cool_down_s: float = 10.0  # after any change, and after the controller's start


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    enabled: bool = True  # false: routers weigh all workers alike
    tick_s: float = 0.5
    valid_s: float = 5.0  # advice older than this is not followed
    smoothing_s: float = 2.0  # time constant of the weights
    silent_s: float = 3.0  # a worker heard of no more for so long gets nothing new
    stall_s: float = 30.0  # work without a finished step for so long, too
    router_gone_s: float = 5.0  # a router heard of no more for so long is not counted
    plan_s: float = 1.0  # prompt work a worker may be given ahead, beyond one tick's
    held_back_s: float = 600.0  # a prompt on which workers died is refused for so long
    scaling: ScalingConfig = field(default_factory=ScalingConfig)


@dataclass(frozen=True, slots=True)
class ModelScale:
    """How many workers of a model there may be."""

    model: str  # the served name
    min_workers: int
    max_workers: int
