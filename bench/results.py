"""Figures on disk: a JSON file per section. A later run replaces the rows that it measures again.

A row has its key (the fields that identify it), its figures, and the date and commit of the measurement.
Figures of different machines never mix: a run on another machine starts its sections from nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEYS: dict[str, tuple[str, ...]] = {
    "limits": (),
    "contestants": ("shape", "contestant"),
    "decode": ("shape", "contestant", "batch"),
    "products": ("shape", "matrix", "rows"),
    "prefill": ("shape", "contestant", "count", "length"),
    "mixed": ("shape", "contestant", "requests"),
    "latency": ("shape", "contestant"),
    "quality": ("weights",),
    "layouts": ("shape", "weights", "batch", "layout"),
}
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that figures were measured on."""

    cpu: str
    cores: int
    isa: str
    memory_gib: int
    system: str

    @staticmethod
    def here() -> Machine:
        """This machine."""
        info: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            info.setdefault(name.strip(), value.strip())
        flags = set(info.get("flags", "").split())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(
            info.get("model name", platform.machine()),
            len(os.sched_getaffinity(0)),
            " ".join(name for name in _ISA if name in flags),
            round(memory / 2**30),
            f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        )


@dataclass(frozen=True, slots=True)
class Stamp:
    """Date and commit of a measurement."""

    date: str
    commit: str

    @staticmethod
    def now() -> Stamp:
        """Today and the commit that is checked out; `+` marks uncommitted changes."""

        def git(*arguments: str) -> str:
            try:
                done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
            except OSError:  # there is no git here
                return ""
            return done.stdout.strip()

        changed = git("status", "--porcelain", "--untracked-files=no", "--", "engine", "bench")
        commit = git("rev-parse", "--short", "HEAD") or "unknown"
        return Stamp(time.strftime("%Y-%m-%d"), commit + ("+" if changed else ""))


def merge(section: str, old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows; a new row replaces the old one with the same key."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEYS[section])

    return list(({key(row): row for row in old} | {key(row): row for row in new}).values())


def save(folder: Path, section: str, rows: Sequence[Row], machine: Machine, stamp: Stamp) -> None:
    """Merge rows, with their stamp, into a section's file."""
    old = load(folder, section)
    kept = old.get("rows", []) if old.get("machine") == asdict(machine) else []
    stamped = [{**row, **asdict(stamp)} for row in rows]
    content = {"machine": asdict(machine), "rows": merge(section, kept, stamped)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)


def load(folder: Path, section: str) -> dict[str, Any]:
    """A section's machine and rows, empty where it was never measured."""
    path = folder / f"{section}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
