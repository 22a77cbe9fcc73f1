"""Figures on disk and the page made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import results
from bench.render import document, spread, table
from bench.results import KEYS, Machine, Stamp

HERE = Machine("a CPU", 2, "avx2", 24, "Linux")
OLD, NEW = Stamp("2026-01-01", "aaaaaaa"), Stamp("2026-02-02", "bbbbbbb")


def decode(contestant: str, batch: int, rate: float) -> dict[str, Any]:
    values = {"median": rate, "low": rate - 1, "high": rate + 1, "count": 3}
    return {
        "shape": "135m",
        "contestant": contestant,
        "batch": batch,
        "decode": values,
        "total": values,
        "weights_bytes_per_s": 5e9,
        "memory_share": 0.5,
        "gemm_share": 0.1,
        "limit": 2 * rate,
    }


def page(**sections: list[dict[str, Any]]) -> str:
    empty: dict[str, dict[str, Any]] = {name: {} for name in KEYS}
    machine = {"cpu": "a CPU", "cores": 2, "isa": "avx2", "memory_gib": 24, "system": "Linux"}
    stamped = {
        name: {
            "machine": machine,
            "rows": [{**row, "date": "2026-01-01", "commit": "aaaaaaa"} for row in rows],
        }
        for name, rows in sections.items()
    }
    return document(empty | stamped)


def test_a_later_run_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    results.save(tmp_path, "decode", [decode("phalanx", 1, 10), decode("vllm", 1, 9)], HERE, OLD)
    results.save(tmp_path, "decode", [decode("phalanx", 1, 20), decode("phalanx", 8, 80)], HERE, NEW)
    rows = results.load(tmp_path, "decode")["rows"]
    assert [(r["contestant"], r["batch"], r["decode"]["median"], r["commit"]) for r in rows] == [
        ("phalanx", 1, 20, "bbbbbbb"),
        ("vllm", 1, 9, "aaaaaaa"),
        ("phalanx", 8, 80, "bbbbbbb"),
    ]


def test_figures_of_another_machine_are_not_kept(tmp_path: Path) -> None:
    other = Machine("another CPU", 64, "avx2", 24, "Linux")
    results.save(tmp_path, "decode", [decode("vllm", 1, 9)], other, OLD)
    results.save(tmp_path, "decode", [decode("phalanx", 1, 10)], HERE, NEW)
    assert [row["contestant"] for row in results.load(tmp_path, "decode")["rows"]] == ["phalanx"]


def test_this_machine_is_described() -> None:
    machine = Machine.here()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.memory_gib >= 1


def test_the_page_compares_others_with_us_at_the_same_point() -> None:
    rows = [decode("phalanx", 1, 30), decode("vllm", 1, 20), decode("phalanx", 8, 5), decode("vllm", 8, 10)]
    lines = page(decode=rows).splitlines()
    by_batch = {line.split("|")[2].strip(): line for line in lines if line.startswith("| vLLM")}
    assert "| 1.50× |" in by_batch["1"]
    assert "| 0.50× |" in by_batch["8"]


def test_quantised_weights_have_a_table_of_their_own() -> None:
    text = page(decode=[decode("phalanx", 1, 10), decode("phalanx@int8", 1, 15)])
    before, _, after = text.partition("## Quantised weights")
    assert "int8" not in before
    assert "| int8 | 135m | 1 |" in after
    assert "| 1.50× |" in after


def test_the_page_says_when_a_row_was_measured() -> None:
    assert "2026-01-01 aaaaaaa" in page(decode=[decode("phalanx", 1, 10)])


def test_sections_that_were_not_measured_are_left_out() -> None:
    text = page(decode=[decode("phalanx", 1, 10)])
    assert "## Decode" in text
    assert "## Prefill" not in text
    assert "## Mixed traffic" not in text


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |\n"


def test_a_single_run_has_no_spread() -> None:
    assert spread({"median": 1234.5, "low": 1, "high": 2, "count": 1}) == "1,234.5"
    assert spread({"median": 2.0, "low": 1.0, "high": 3.0, "count": 3}) == "2.0 (1.0–3.0)"
