"""Contestants, their environment and memory, and the traces that they record."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.contest import Entry, environment, memory_left, relays
from bench.protocol import Recorder, Setup, Work


@pytest.mark.parametrize("text", ["phalanx", "phalanx@int8", "transformers@float32", "vllm-eager"])
def test_an_entry_is_written_as_it_is_read(text: str) -> None:
    assert str(Entry.parse(text)) == text


@pytest.mark.parametrize("text", ["sglang", "transformers@int8", "phalanx@int3"])
def test_unknown_contestants_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="known:"):
        Entry.parse(text)


def test_an_entry_decides_on_dtype_quantisation_and_compilation() -> None:
    base = Setup("model", threads=2)
    assert Entry.parse("phalanx@int4").setup(base).quantization == "int4"
    assert Entry.parse("transformers@float32").setup(base).dtype == "float32"
    assert [Entry.parse(kind).setup(base).eager for kind in ("vllm", "vllm-eager")] == [False, True]


def test_bytes_per_parameter_follow_the_weights() -> None:
    entries = ("phalanx", "phalanx@float32", "phalanx@int8", "phalanx@int4")
    assert [Entry.parse(text).bytes_per_parameter for text in entries] == [2, 4, 1, 0.53125]


def test_nobody_inherits_a_number_of_threads_or_a_path() -> None:
    base = {"OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0", "PYTHONPATH": "/elsewhere", "HOME": "/home"}
    ours = environment(base, Entry("phalanx"), "python", threads=7)
    assert ours["OMP_NUM_THREADS"] == "7"
    assert ours["HOME"] == "/home"
    assert "KMP_BLOCKTIME" not in ours
    assert ours["PYTHONPATH"] != "/elsewhere"


def test_vllm_gets_the_openmp_of_its_own_environment(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    python = tmp_path / "bin" / "python"
    entry = Entry("vllm")
    assert str(openmp) not in environment({}, entry, str(python), 2).get("LD_PRELOAD", "")
    openmp.parent.mkdir()
    openmp.touch()
    assert str(openmp) in environment({}, entry, str(python), 2)["LD_PRELOAD"].split(":")
    assert "OMP_NUM_THREADS" not in environment({}, entry, str(python), 2)


def test_relays_keep_the_order_and_fit() -> None:
    entries = [Entry.parse(text) for text in ("phalanx", "transformers", "vllm", "vllm@float32")]
    gib = 1 << 30
    assert relays(entries, gib, gib, 100 * gib) == [entries]
    # 3.4, 3.4, 8 and 12 GiB
    assert relays(entries, gib, gib, 10 * gib) == [entries[:2], entries[2:3], entries[3:]]
    assert relays([], gib, gib, gib) == []


def test_there_is_memory_left() -> None:
    assert memory_left() > 0


def test_late_prompts_are_due_once_when_the_others_have_their_tokens() -> None:
    recorder = Recorder(Work([[1], [2], [3]], [2, 2, 1], late=1, late_after=1))
    assert list(recorder.early) == [0, 1]
    recorder.tokens([(0, 7)])
    assert not recorder.late_arrivals()
    recorder.tokens([(0, 8), (1, 9)])
    assert list(recorder.late_arrivals()) == [2]
    assert not recorder.late_arrivals()
    recorder.tokens([(1, 1), (2, 4)])
    trace = recorder.finish()
    assert trace.token_ids == [[7, 8], [9, 1], [4]]
    assert [indices for _, indices in trace.events] == [[0], [0, 1], [1, 2]]
    assert trace.submitted[2] > trace.submitted[0] == 0


def test_a_completion_that_is_too_short_is_an_error() -> None:
    recorder = Recorder(Work([[1]], [2]))
    recorder.tokens([(0, 7)])
    with pytest.raises(RuntimeError, match="1 tokens of 2"):
        recorder.finish()
