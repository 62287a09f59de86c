"""Generate the Python code of peftmux.v1 beside its .proto files, or check that what is committed is up to date.

    python protos/generate.py           write the generated files (`make protos`)
    python protos/generate.py --check   exit 1 and name the files that differ (`make lint-protos`)

The generator is pinned low on purpose: generated code refuses protobuf and grpcio older than the tool that made it,
so this version is the floor of both for every user.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GENERATOR = "1.74.0"
ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("peftmux/v1/*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def installed_generator() -> str | None:
    """The version of grpcio-tools here, or None."""
    try:
        return version("grpcio-tools")
    except PackageNotFoundError:
        return None


def generate(out: Path) -> None:
    """Write the generated code of every source under `out`. RuntimeError where the pinned generator is missing."""
    if installed_generator() != GENERATOR:
        raise RuntimeError(
            f"expected grpcio-tools=={GENERATOR} (`make protos` brings its own), found {installed_generator()}"
        )
    protoc = import_module("grpc_tools.protoc")

    outputs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", f"-I{ROOT}", *outputs, *SOURCES]) != 0:
        raise RuntimeError(f"protoc refused {', '.join(SOURCES)}; its own message is above")


def outdated() -> list[str]:
    """Generated files, relative to `protos/`, that are missing or differ from what the sources give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        names = [source.removesuffix(".proto") + suffix for source in SOURCES for suffix in SUFFIXES]
        return [name for name in names if _read(ROOT / name) != _read(Path(folder) / name)]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    differing = outdated()
    for name in differing:
        print(f"{name} is out of date: run protos/generate.py", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
