"""The files of the project as git sees them: tracked, and new ones that it does not ignore."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def project_files(root: Path = ROOT) -> list[Path]:
    """Absolute paths, sorted."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(path for name in listing.split("\0") if name and (path := root / name).is_file())
