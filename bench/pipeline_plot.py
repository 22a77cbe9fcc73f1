"""A plot of when each rank computed which micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.pipeline_spans import Span

_COLOURS = ("#2b5d8a", "#d98032", "#6a9f58", "#9aa5b1")  # micro-batches in flight get different colours


def draw(spans: Sequence[Span], title: str, path: Path) -> bool:
    """A line per rank, a box per step. False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return False
    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "phalanx"
    ranks = sorted({span.rank for span in spans})
    origin = min(span.begin for span in spans)
    in_flight = max(2, len(ranks))
    figure, axes = pyplot.subplots(figsize=(10, 0.7 + 0.55 * len(ranks)))
    for span in spans:
        begin, length = (span.begin - origin) / 1e6, (span.end - span.begin) / 1e6
        colour = _COLOURS[span.step % in_flight % len(_COLOURS)]
        axes.barh(ranks.index(span.rank), length, left=begin, color=colour, edgecolor="white", linewidth=0.6)
        style = {"ha": "center", "va": "center", "color": "white", "fontsize": 6}
        axes.text(begin + length / 2, ranks.index(span.rank), str(span.step), **style)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds; a box is a step of one micro-batch", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return True
