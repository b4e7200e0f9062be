"""The command line: every mistake of a user is one line and exit code 2."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ellm.deploy import cli, config


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert name in text
        assert line in " ".join(text.split())


def test_version_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "version", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ellm-on-ray"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_print_config_is_yaml_that_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--port", "9001", "--workers", "3", "--set", "worker.cache.block_size=32", "--device", "cpu"]
    code, out, _ = run(capsys, "serve", str(tmp_path), *flags, "--print-config")
    assert code == 0
    tree = config.from_mapping(yaml.safe_load(out))
    assert (tree.cluster.port, tree.cluster.num_workers, tree.worker.cache.block_size) == (9001, 3, 32)
    assert tree.worker.model.path == str(tmp_path)
    assert "port: 9001  # command line" in out
    file = tmp_path / "again.yaml"
    file.write_text(out)
    assert config.load(file, environ={}).config == tree


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--port", "x"], "command line: cluster.port: expected an integer, got 'x'"),
        (["serve", "--set", "worker.cach.num_blocks=1"], "unknown key worker.cach.num_blocks; did you mean"),
        (["serve", "--config", "none.yaml"], "cannot read none.yaml"),
        (["serve", "--workers", "0"], "cluster.num_workers: 0 is not between 1"),
        (["serve", "--tp", "5"], "tensor_parallel_size = 5 does not divide the model's"),
        (["serve", "--set", "policy=magic"], "magic"),
        (["serve", "--set", "worker.scheduler.policy=magic"], "magic"),
        (["serve", "--device", "cpu", "--dtype", "float16"], "float16 is not supported on a CPU"),
        (["serve", "--max-model-len", "4096"], "this checkpoint allows at most 2048"),
        (["serve", "/nowhere/model"], "/nowhere/model"),
        (["generate", "/nowhere/model", "--prompt", "x"], "/nowhere/model"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith(f"ellm {words[0]}: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_broken_checkpoint_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    code, _, err = run(capsys, "serve", str(tmp_path))
    assert code == 2
    assert "Mamba" in err
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_port_in_use_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", "--port", str(port))
    assert code == 2
    assert f"port {port} is in use" in err


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m ellm.deploy.cli serve --print-config | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
