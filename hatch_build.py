"""Generates the protobuf and gRPC modules of `protos/` into the source tree.

Hatchling runs it for wheels and for editable installs; `make protos` runs it by hand.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent


def generate(root: Path) -> list[str]:
    """Write `phalanx/v1/*_pb2*.py[i]` below `root`; returns the generated paths, relative to it."""
    from grpc_tools import protoc  # only there in the build environment

    sources = sorted(str(path.relative_to(root / "protos")) for path in (root / "protos").rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    # protoc finds its mypy plugins on PATH, where an unactivated environment's scripts are not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = [f"--{plugin}_out={root}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")]
    code = protoc.main(["protoc", f"-I{root / 'protos'}", f"-I{well_known}", *outputs, *sources])
    if code != 0:
        raise SystemExit(f"protoc failed with exit code {code}")
    (root / "phalanx/v1/__init__.py").write_text('"""Generated from protos/phalanx/v1."""\n')
    return sorted(str(path.relative_to(root)) for path in (root / "phalanx/v1").glob("*.py*"))


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    pass
else:

    class ProtosBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """The hook that hatchling looks for."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Generate before files are collected, and collect what git ignores."""
            build_data["artifacts"] = generate(Path(self.root))


if __name__ == "__main__":
    sys.stdout.write("\n".join(generate(ROOT)) + "\n")
