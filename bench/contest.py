"""Contestants as processes: each is built once and stays stopped while another one runs.

Owns: the processes. Does not own: the work that they get, and the figures made of their traces.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from bench.protocol import Ready, Setup, Trace, Work

MODULES = {
    "phalanx": "bench.contestants.ours",
    "transformers": "bench.contestants.transformers_generate",
    "transformers-static": "bench.contestants.transformers_generate",
    "transformers-batching": "bench.contestants.transformers_batching",
    "vllm": "bench.contestants.vllm_offline",
    "vllm-eager": "bench.contestants.vllm_offline",
}
DTYPES = ("bfloat16", "float32", "float16")
QUANTIZATIONS = ("int8", "int4")
_LOG_TAIL = 2000  # characters
_TORCH_BYTES, _VLLM_BYTES = 1 << 30, 3 << 30  # of libraries, compilers and activations
_ROOT = Path(__file__).resolve().parent.parent


class ContestantError(Exception):
    """A contestant cannot be built, or has died. The message contains the end of its log."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant and the format of its weights: `phalanx`, `phalanx@int8`, `transformers@float32`."""

    kind: str
    dtype: str = "bfloat16"
    quantization: str = ""

    @staticmethod
    def parse(text: str) -> Entry:
        """Read `kind` or `kind@variant`.

        Raises:
            ValueError: there is no such contestant.
        """
        kind, _, variant = text.partition("@")
        if kind not in MODULES:
            raise ValueError(f"no contestant {kind}; known: {', '.join(MODULES)}")
        if kind == "phalanx" and variant in QUANTIZATIONS:
            return Entry(kind, quantization=variant)
        if variant and variant not in DTYPES:
            raise ValueError(f"{text}: no variant {variant}; known: {', '.join(DTYPES + QUANTIZATIONS)}")
        return Entry(kind, variant or "bfloat16")

    def __str__(self) -> str:
        variant = self.quantization or ("" if self.dtype == "bfloat16" else self.dtype)
        return f"{self.kind}@{variant}" if variant else self.kind

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes that a step reads per parameter of a matrix; int4 adds a 16-bit scale per 64 parameters."""
        sizes = {"int8": 1.0, "int4": 0.5 + 2 / 64}
        return sizes.get(self.quantization, 4.0 if self.dtype == "float32" else 2.0)

    def setup(self, base: Setup) -> Setup:
        """`base` with the settings of this entry."""
        return replace(
            base,
            dtype=self.dtype,
            quantization=self.quantization,
            eager=self.kind == "vllm-eager",
            static=self.kind == "transformers-static",
        )


class Contestant:
    """A contestant in a process group of its own. The group is stopped (SIGSTOP) unless it is working.

    `load_s` is the time from the start of its interpreter until it was ready.
    """

    def __init__(self, entry: Entry, setup: Setup, python: str, log: Path, timeout_s: float) -> None:
        self.entry = entry
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, "-m", MODULES[entry.kind]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=_ROOT,
                env=environment(os.environ, entry, python, setup.threads),
                start_new_session=True,
            )
        self._answers = ""
        try:
            self.ready = Ready(**self._ask(json.dumps(asdict(entry.setup(setup))), timeout_s))
            self.load_s = time.monotonic() - start
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def run(self, work: Work, timeout_s: float) -> Trace:
        """Wake the process, let it do the work, stop it again."""
        self._signal(signal.SIGCONT)
        trace = Trace(**self._ask(json.dumps(asdict(work)), timeout_s))
        self._signal(signal.SIGSTOP)
        return trace

    def close(self) -> None:
        """Kill the process and all its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # the process died before it read the last message

    def _ask(self, question: str, timeout_s: float) -> dict[str, Any]:
        stdin, stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        try:
            stdin.write(question.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure("has died") from None
        end = time.monotonic() + timeout_s
        while "\n" not in self._answers:
            readable, _, _ = select.select([stdout], [], [], max(0.0, end - time.monotonic()))
            if not readable:
                raise self._failure(f"has not answered within {timeout_s:.0f} s")
            piece = os.read(stdout.fileno(), 1 << 16)
            if not piece:
                raise self._failure("has died")
            self._answers += piece.decode()
        line, _, self._answers = self._answers.partition("\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # the whole group has ended

    def _failure(self, what: str) -> ContestantError:
        tail = self._log.read_text(errors="replace")[-_LOG_TAIL:]
        return ContestantError(f"{self.entry} {what}; the end of {self._log}:\n{tail}")


@contextmanager
def contest(
    entries: Sequence[Entry], setup: Setup, vllm_python: str, logs: Path, timeout_s: float
) -> Iterator[list[Contestant]]:
    """All contestants, built one after another on an otherwise idle machine.

    Raises:
        ContestantError: one cannot be built.
    """
    running: list[Contestant] = []
    # On SIGTERM, exit through `finally`: otherwise stopped processes are left behind for ever.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for entry in entries:
            python = vllm_python if entry.kind.startswith("vllm") else sys.executable
            running.append(Contestant(entry, setup, python, logs / f"{entry}.log", timeout_s))
        yield running
    finally:
        for contestant in running:
            contestant.close()
        signal.signal(signal.SIGTERM, before)


def relays(entries: Sequence[Entry], weights: int, kv_bytes: int, room: int) -> list[list[Entry]]:
    """Entries in their order, divided into groups. Each group fits into `room` bytes of memory.

    Args:
        entries: the contestants.
        weights: parameters of the model.
        kv_bytes: size of the KV pool. vLLM fills it with zeros; the others touch little of it.
        room: bytes of free memory.
    """
    groups: list[list[Entry]] = [[]]
    taken = 0.0
    for entry in entries:
        size = weights * entry.bytes_per_parameter
        vllm = entry.kind.startswith("vllm")
        need = 2 * size + kv_bytes + _VLLM_BYTES if vllm else 1.2 * size + _TORCH_BYTES  # vLLM repacks
        if groups[-1] and taken + need > room:
            groups.append([])
            taken = 0.0
        groups[-1].append(entry)
        taken += need
    return [group for group in groups if group]


def memory_left() -> int:
    """Bytes of free memory (MemAvailable)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def environment(base: Mapping[str, str], entry: Entry, python: str, threads: int) -> dict[str, str]:
    """A contestant's environment variables: no network, imports from this repository, all threads.

    vLLM's documentation asks to preload Intel's OpenMP and tcmalloc. Both are preloaded if they are installed
    in vLLM's environment or in the system.
    """
    dropped = re.compile("OMP_|KMP_|GOMP_|MKL_|LD_PRELOAD|PYTHONPATH|VIRTUAL_ENV")
    result = {name: value for name, value in base.items() if not dropped.match(name)}
    result |= {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if not entry.kind.startswith("vllm"):
        return result | {"OMP_NUM_THREADS": str(threads)}
    libraries = [Path(python).parent.parent / "lib" / "libiomp5.so"]
    libraries += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    found = [str(library.absolute()) for library in libraries if library.exists()]
    path = os.pathsep.join([str(Path(python).parent), result.get("PATH", os.defpath)])
    return result | {"PATH": path} | ({"LD_PRELOAD": ":".join(found)} if found else {})


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
