"""A model by its hub id: a volume downloads it once, at the commit that was pinned, without code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.local_hub import REPO, LocalHub, local_hub

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.hub import local_folder

OLD, NEW = "a" * 40, "b" * 40
CODE = "modeling_evil.py"
PROGRAM = """
import sys
from ellm.worker.api.errors import ConfigError
from ellm.worker.model.hub import local_folder
try:
    print(local_folder(sys.argv[1], sys.argv[2]))
except ConfigError as error:
    sys.exit(f"refused: {error}")
"""


def files(mark: bytes) -> dict[str, bytes]:
    return {
        "config.json": b'{"mark": "' + mark + b'"}',
        "model.safetensors": mark * 100_000,
        CODE: b"raise SystemExit",
    }


def start(hub: LocalHub, home: Path, revision: str, **more: str) -> subprocess.Popen[str]:
    """A process that wants the model, with the volume at `home`."""
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", **more,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, REPO, revision],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings},
    )  # fmt: skip


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[Path]:
    """The folders that they found."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(Path(out.strip()))
    return found


def test_processes_of_one_volume_download_a_model_once(tmp_path: Path) -> None:
    with local_hub({OLD: files(b"old"), NEW: files(b"new")}) as hub:
        folders = ends([start(hub, tmp_path, OLD) for _ in range(3)])
        assert len(set(folders)) == 1
        assert hub.downloads == {(OLD, "config.json"): 1, (OLD, "model.safetensors"): 1}
        # The pinned commit, whatever the branch says by now, and nothing that could be run.
        assert (folders[0] / "config.json").read_bytes() == files(b"old")["config.json"]
        assert not (folders[0] / CODE).exists()
        ends([start(hub, tmp_path, OLD)])
        assert sum(hub.downloads.values()) == 2
        assert set(hub.asked) <= {OLD}
    # The hub is gone, and so it is for `persistence.offline`: the volume has it.
    assert ends([start(hub, tmp_path, OLD, HF_HUB_OFFLINE="1")]) == folders[:1]


def test_a_commit_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with local_hub({NEW: files(b"new")}) as hub:
        process = start(hub, tmp_path, OLD)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"refused: there is no folder {REPO}, and as a hub id: " in err
        assert hub.downloads == {}


@pytest.mark.parametrize("name", ["", "not a name", "a/b/c"])
def test_what_is_no_name_is_not_asked_for(name: str) -> None:
    with pytest.raises(ConfigError):
        local_folder(name)
