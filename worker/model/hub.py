"""From a model's name to a local folder: a folder stays as it is, a hub id is downloaded or cached.

Code of a repository is never fetched: only config, tokenizer and safetensors files match.
"""

from __future__ import annotations

import re
from pathlib import Path

from ellm.worker.api.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder that holds `model`. Raises ConfigError when there is none and none can be fetched."""
    if not model:
        raise ConfigError("no model is given: a folder or a hub id is needed", param="model.path")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{model} is a file; a checkpoint folder is needed", param="model.path")
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(f"there is no folder {model}, and it is not a hub id", param="model.path")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    # Imported here: a local folder needs none of it, and the import takes half a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and the cache does not have it"
    except (HfHubHTTPError, ValueError, OSError) as error:
        why = str(error).split("\n", 1)[0] or type(error).__name__
    raise ConfigError(f"there is no folder {model}, and as a hub id: {why}", param="model.path")
