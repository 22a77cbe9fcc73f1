"""`make lint` refuses breaking changes of the public protos, and no change of the internal ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    """A copy of what buf reads."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path / "protos"


def breaking(protos: Path) -> list[str]:
    """The complaints of `make lint` about changes."""
    command = [str(BUF), "breaking", "--against", "protos/public.txtpb"]
    done = subprocess.run(command, cwd=protos.parent, capture_output=True, text=True)
    assert bool(done.returncode) == bool(done.stdout), done.stderr
    return done.stdout.splitlines()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_baseline_is_that_of_the_public_package(protos: Path) -> None:
    assert breaking(protos) == []
    assert "phalanx.internal" not in (protos / "public.txtpb").read_text()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("inference.proto", "  string resume_token = 4;\n", ""),
        ("control.proto", "string etag = 7;", "bytes etag = 7;"),
        ("control.proto", "string etag = 7;", "string etag = 8;"),
        ("types.proto", "FINISH_REASON_TOOL_CALLS = 3;", "FINISH_REASON_TOOLS = 3;"),
        ("inference.proto", "  rpc GetModel(GetModelRequest) returns (GetModelResponse);\n", ""),
    ],
)
def test_a_breaking_change_of_the_public_package_fails(protos: Path, file: str, old: str, new: str) -> None:
    change(protos / "phalanx/v1" / file, old, new)
    assert any(file in complaint for complaint in breaking(protos))


def test_a_new_field_of_the_public_package_passes(protos: Path) -> None:
    change(
        protos / "phalanx/v1/inference.proto",
        "  string resume_token = 4;\n",
        "  string resume_token = 4;\n  // New.\n  string new = 5;\n",
    )
    assert breaking(protos) == []


def test_any_change_inside_the_cluster_passes(protos: Path) -> None:
    for file in (protos / "phalanx/internal/v1").iterdir():
        renumbered, count = re.subn(r" = 1;", " = 1001;", file.read_text())
        assert count
        file.write_text(renumbered)
    assert breaking(protos) == []
