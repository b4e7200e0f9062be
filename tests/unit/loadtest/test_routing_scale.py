"""Long prompts stand beside short ones, and both are measured."""

from __future__ import annotations

from argparse import Namespace

import pytest

from ellm.loadtest.routing_scale import SHAPES, Scale, Shape, row


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_decided_on_and_measured(shape: Shape) -> None:
    args = Namespace(workers=4, routers=2, rate=30.0 / shape.rate, seconds=1.0, seed=1)
    scale = Scale("headroom", args, shape)
    scale.run()
    made = row("headroom", scale)
    assert made["decisions"] in (29, 30)
    assert (made["own tokens"], made["in common"]) == (shape.tail, shape.stem)
    assert made["view, bytes/s per router"] > made["of it digests"] > 0.0
    assert made["decision, us"] > 0.0


def test_there_is_a_shape_as_long_as_conversations_are() -> None:
    assert max(shape.stem + shape.tail for shape in SHAPES) >= 8000
