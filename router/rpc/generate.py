"""Makes the stubs (`*_pb2*.py`) of the protos in this folder: `python -m ellm.router.rpc.generate`.

Needs grpcio-tools, which serving does not; the stubs are committed.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

PROTOS = ("ellm_inference", "open_inference")
FOLDER = Path(__file__).parent
PACKAGE = "ellm/router/rpc"  # the stubs import each other by it
_SAID = '"""Generated from {}.proto by `python -m ellm.router.rpc.generate`; do not edit."""\n'


def stubs() -> dict[str, str]:
    """File name -> content of every stub that the protos give."""
    from grpc_tools import protoc

    well_known = str(files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as out:
        failed = protoc.main(
            [
                "protoc",
                f"-I{PACKAGE}={FOLDER}",
                f"-I{well_known}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                *(f"{PACKAGE}/{name}.proto" for name in PROTOS),
            ]
        )
        if failed:
            raise SystemExit("protoc has refused the protos")
        made = {path.name: path.read_text() for path in sorted((Path(out) / PACKAGE).iterdir())}
    return {
        name: _SAID.format(name.partition("_pb2")[0]) + text if name.endswith(".py") else text
        for name, text in made.items()
    }


if __name__ == "__main__":
    for name, text in stubs().items():
        (FOLDER / name).write_text(text)
