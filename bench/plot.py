"""Bar plots of decode throughput, with the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ORDER = ("transformers", "transformers@float32", "vllm-eager", "vllm", "vllm@float32", "phalanx")
_COLOURS = {
    "transformers": "#9aa5b1",
    "vllm-eager": "#e9b872",
    "vllm": "#d98032",
    "phalanx": "#2b5d8a",
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """A panel per shape and batch; a dashed line is the limit. False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return False
    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "phalanx"  # the same figures give the same file
    rows = [row for row in rows if row["contestant"] in _ORDER]
    if not rows:
        return False
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    size = (4.0 * len(batches) + 0.6, 2.6 * len(shapes))
    figure, axes = pyplot.subplots(len(shapes), len(batches), figsize=size, squeeze=False)
    for line, shape in zip(axes, shapes, strict=True):
        for panel, batch in zip(line, batches, strict=True):
            its = [row for row in rows if (row["shape"], row["batch"]) == (shape, batch)]
            its.sort(key=lambda row: _ORDER.index(row["contestant"]))
            values = [row["decode"]["median"] for row in its]
            names = [row["contestant"] for row in its]
            colours = [_COLOURS[name.partition("@")[0]] for name in names]
            labels = [name.replace("@", "\n").replace("float32", "(float32)") for name in names]
            bars = panel.bar(labels, values, color=colours)
            panel.bar_label(bars, [_short(value) for value in values], fontsize=7)
            limit = max((row["limit"] for row in its if "@" not in row["contestant"]), default=0.0)
            panel.axhline(limit, color="#555555", linestyle="--", linewidth=1)
            panel.set_title(f"{shape}, batch {batch}; limit {limit:,.0f}", fontsize=9)
            panel.tick_params(labelsize=6)
            panel.set_ylim(0, 1.15 * max([limit, *values]))
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("decode tokens/s", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return True


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
