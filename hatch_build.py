"""Generates the protobuf modules and compiles the engine's CPU kernels, into the source tree.

Hatchling runs this file for wheels and editable installs; `make generated` runs it by hand.
"""

from __future__ import annotations

import importlib.resources
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
KERNELS = "engine/kernels"
GENERATED = ("phalanx/v1", "phalanx/internal/v1")
SOURCES = ("linear.cpp", "attention.cpp", "weights.cpp", "sample.cpp")
# The instruction sets of engine/kernels/native_library.py, with their names for the compiler.
CPUS = {"avx512_bf16": "x86_64_v4+avx512bf16", "avx512": "x86_64_v4", "avx2": "x86_64_v3"}
FLAGS = [
    *("-target", "x86_64-linux-gnu.2.17", "-std=c++20", "-O3", "-fPIC", "-shared", "-s", "-lpthread"),
    *("-nostdlib++", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror"),
    "-ffp-contract=off",  # the compiler must not fuse: sources write each fused multiply-add explicitly
]


def generate_protos(root: Path) -> list[str]:
    """Write `*_pb2*.py[i]` into the packages of `GENERATED`; returns the paths relative to `root`."""
    from grpc_tools import protoc  # installed in the build environment only

    sources = sorted(str(path.relative_to(root / "protos")) for path in (root / "protos").rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    # protoc finds its mypy plugins on PATH, which lacks the scripts of an environment that is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = [f"--{plugin}_out={root}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")]
    code = protoc.main(["protoc", f"-I{root / 'protos'}", f"-I{well_known}", *outputs, *sources])
    if code != 0:
        raise SystemExit(f"protoc failed with exit code {code}")
    for package in GENERATED:
        (root / package / "__init__.py").write_text(f'"""Generated from protos/{package}."""\n')
    return sorted(
        str(path.relative_to(root)) for package in GENERATED for path in (root / package).glob("*.py*")
    )


def build_kernels(root: Path) -> list[str]:
    """Compile the kernels once per instruction set; returns the libraries' paths relative to `root`.

    The compiler is clang from the `ziglang` wheel, so every machine builds the same code. On other systems
    than x86-64 Linux nothing is compiled, and the engine runs without native kernels. A library that is
    newer than its sources is not compiled again.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return []
    folder = root / KERNELS
    newest = max(path.stat().st_mtime for path in (*folder.glob("*.cpp"), *folder.glob("*.h")))
    libraries = {folder / f"cpu_{name}.so": (SOURCES, cpu) for name, cpu in CPUS.items()}
    libraries[folder / "shm.so"] = (("shm.cpp",), "x86_64")
    compiler = [sys.executable, "-m", "ziglang", "c++", *FLAGS]
    running = []
    for library, (sources, cpu) in libraries.items():
        if not library.exists() or library.stat().st_mtime < newest:
            part = library.with_suffix(".part")
            command = [*compiler, f"-mcpu={cpu}", *(str(folder / name) for name in sources), "-o", str(part)]
            running.append((subprocess.Popen(command), part, library))
    failed = [library.name for process, _, library in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"compiling {', '.join(failed)} failed")
    for _, part, library in running:
        part.replace(library)
    return sorted(str(library.relative_to(root)) for library in libraries)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, without hatchling
    pass
else:

    class GeneratedFilesHook(BuildHookInterface):  # type: ignore[type-arg]
        """The build hook; hatchling finds it by its base class."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Generate before hatchling collects files; add the generated files, which git ignores."""
            libraries = build_kernels(Path(self.root))
            build_data["artifacts"] = [*generate_protos(Path(self.root)), *libraries]
            if libraries:
                build_data["pure_python"] = False
                build_data["tag"] = "py3-none-manylinux_2_17_x86_64"


if __name__ == "__main__":
    sys.stdout.write("\n".join([*generate_protos(ROOT), *build_kernels(ROOT)]) + "\n")
