"""Bar plots of `bench.gpu`: decode throughput, the GPU's limits, and other contestants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS, _OTHERS, _LIMIT = "#2b5d8a", "#9aa5b1", "#555555"


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """A panel per shape and batch; a dashed line is what the limits allow. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return False
    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "phalanx"  # the same figures give the same file
    results = [result for result in results if result.get("decode")]
    columns = max((len(result["decode"]) for result in results), default=0)
    if not columns:
        return False
    size = (3.2 * columns, 2.4 * len(results))
    figure, axes = pyplot.subplots(len(results), columns, figsize=size, squeeze=False)
    for line, result in zip(axes, results, strict=True):
        for panel in line[len(result["decode"]) :]:
            panel.axis("off")
        for panel, point in zip(line, result["decode"], strict=False):
            bars = {"Phalanx": point["tokens_per_s"]} | _peers_at(result.get("peers", ()), point)
            drawn = panel.bar(list(bars), list(bars.values()), color=[_OURS, *[_OTHERS] * (len(bars) - 1)])
            panel.bar_label(drawn, [f"{value:,.0f}" for value in bars.values()], fontsize=7)
            limit = point["tokens_per_s"] / point["of_both_limits"]
            panel.axhline(limit, color=_LIMIT, linestyle="--", linewidth=1)
            panel.set_ylim(0, 1.15 * max(limit, *bars.values()))
            name = f"{result['shape']} {result.get('quantization', '')}".strip()
            panel.set_title(f"{name}, {point['sequences']} x {point['length']}", fontsize=9)
            panel.tick_params(labelsize=6)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("decode tokens/s", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return True


def _peers_at(peers: Sequence[Mapping[str, Any]], point: Mapping[str, Any]) -> dict[str, float]:
    """The throughput of other contestants with the same batch."""
    return {
        peer["name"].replace("transformers", "tf").replace("-", "\n"): peer["tokens_per_s"]
        for peer in peers
        if (peer["sequences"], peer["length"]) == (point["sequences"], point["length"])
        and "tokens_per_s" in peer
    }
