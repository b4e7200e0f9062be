"""Dockerfile and compose files: what they copy and mount is there; they run commands of ours, not as root."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tree import ROOT

from ellm.deploy import cli, config
from ellm.deploy.tree import TYPES

FOLDER = ROOT / "deploy" / "docker"
PINNED = re.compile(r"^[\w./-]+:v?\d+\.\d+(\.\d+)?[\w.-]*$")
Instruction = tuple[str, str]
KNOWN = {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[Instruction]:
    """Continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        name, _, rest = line.partition(" ")
        found.append((name, rest.strip()))
    return found


def stages(text: str) -> dict[str, tuple[str, list[Instruction]]]:
    """Stage -> (what it begins from, its instructions)."""
    found: dict[str, tuple[str, list[Instruction]]] = {}
    current: list[Instruction] = []
    for name, rest in instructions(text):
        if name == "FROM":
            image, _, stage = re.sub(r"\s+AS\s+", " ", rest, flags=re.IGNORECASE).partition(" ")
            current = []
            found[stage] = (image, current)
        current.append((name, rest))
    return found


def whole(target: str) -> list[Instruction]:
    """Of a target and all that it begins from, in order."""
    all_stages = stages(DOCKERFILE)
    image, own = all_stages[target]
    return [*(whole(image) if image in all_stages else []), *own]


DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that matches the path or a folder above it."""
    verdict = False
    parts = [str(Path(*Path(path).parts[:n])) for n in range(1, len(Path(path).parts) + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        negated, pattern = pattern.startswith("!"), pattern.removeprefix("!").removeprefix("**/")
        if any(fnmatch(part, pattern) or fnmatch(Path(part).name, pattern) for part in parts):
            verdict = not negated
    return verdict


def test_every_instruction_is_one() -> None:
    assert {name for name, _ in instructions(DOCKERFILE)} == KNOWN


def test_what_is_copied_is_there_and_goes_to_the_builder() -> None:
    names = set(stages(DOCKERFILE))
    copied = []
    for name, rest in instructions(DOCKERFILE):
        if name != "COPY":
            continue
        words = rest.split()
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in names
            continue
        copied += words[:-1]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    # Everything that a wheel is made of, and nothing that makes a build anew for a test's sake.
    assert {"pyproject.toml", "kernels", "worker", "cluster", "router", "loadtest", "deploy"} <= set(copied)
    assert ignored("tests/run.py")
    assert ignored(".git/HEAD")
    assert ignored("deploy/__pycache__/a.pyc")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_our_command_as_nobody_special(target: str) -> None:
    found = whole(target)
    assert [rest for name, rest in found if name == "USER"][-1] == "1000:1000"
    (entry,) = (yaml.safe_load(rest) for name, rest in found if name == "ENTRYPOINT")
    (command,) = (yaml.safe_load(rest) for name, rest in found if name == "CMD")
    assert entry == ["ellm"]
    args = cli.parser(command[0]).parse_args(command)
    assert (args.host, args.grpc_port) == ("0.0.0.0", "9000")
    exposed = next(rest for name, rest in found if name == "EXPOSE")
    assert exposed.split() == ["8000", args.grpc_port]
    # What it runs on was installed in a stage for this device.
    (copied,) = (rest for name, rest in found if name == "COPY")
    assert copied == f"--from=build-{target} /ellm/venv /ellm/venv"
    installs = " ".join(rest for name, rest in whole(f"build-{target}") if name == "RUN")
    assert (".[serve,jit,gpu]" if target == "cuda" else ".[serve,jit]") in installs
    assert installs.count("-c constraints.txt") == 2


def test_everything_is_pinned() -> None:
    (image,) = (rest for name, rest in instructions(DOCKERFILE) if name == "ARG" and "IMAGE" in rest)
    assert PINNED.match(image.partition("=")[2])
    outside = {image for image, _ in stages(DOCKERFILE).values()} - set(stages(DOCKERFILE))
    assert outside == {"${PYTHON_IMAGE}"}
    for name, service in COMPOSE["services"].items():
        image = service["image"].replace("${TARGET:-cpu}", "cpu")
        assert PINNED.match(image), name


def test_the_last_stage_needs_no_gpu() -> None:
    assert list(stages(DOCKERFILE))[-1] == "cpu"


def test_a_login_shell_finds_our_commands() -> None:
    """KubeRay starts Ray by one, and Debian's sets PATH anew."""
    (line,) = re.findall(r"echo '(.*)' > /etc/profile\.d/ellm\.sh", DOCKERFILE)
    assert line == "export PATH=/ellm/venv/bin:$PATH"


def test_compose_mounts_and_builds_what_is_there() -> None:
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).resolve().exists(), source
            else:
                assert source in COMPOSE["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    build = COMPOSE["services"]["ellm"]["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).exists()
    assert set(build["args"]) <= {
        rest.partition("=")[0] for name, rest in instructions(DOCKERFILE) if name == "ARG"
    }
    second = yaml.safe_load((FOLDER / "compose.cuda.yaml").read_text())
    assert set(second["services"]) <= set(COMPOSE["services"])


def test_compose_runs_a_configuration_that_loads() -> None:
    service = COMPOSE["services"]["ellm"]
    args = cli.parser("serve").parse_args(service["command"])
    mounts = dict(mount.split(":")[1::-1] for mount in service["volumes"])
    file = FOLDER / mounts[args.config]
    environ = {name: "" if name.endswith("PATH") else "1" for name in service["environment"] if "__" in name}
    loaded = config.load(file, environ=environ).config
    assert {name.removeprefix("ELLM_").lower().replace("__", ".") for name in environ} <= set(TYPES)
    assert loaded.cluster.host == "0.0.0.0"
    assert {f"127.0.0.1:{port}:{port}" for port in (loaded.cluster.port, loaded.cluster.grpc_port)} == set(
        service["ports"]
    )
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > loaded.worker.drain_timeout_s + 20


def test_prometheus_and_grafana_find_each_other_and_us() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["ellm:8000"]}]
    mounted = {
        mount.split(":")[1]: mount.split(":")[0] for mount in COMPOSE["services"]["prometheus"]["volumes"]
    }
    (rules,) = scrape["rule_files"]
    assert mounted[str(Path(rules).parent)] == "../../helm/files"
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/ellm.yaml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    grafana = [mount.split(":")[1] for mount in COMPOSE["services"]["grafana"]["volumes"]]
    assert folder in grafana
