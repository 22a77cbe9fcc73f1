"""Request lengths of a trace of real traffic. Pure."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import islice

from bench.measures import prompts
from bench.protocol import Work


def read_lengths(lines: Iterable[str], count: int, divisor: int) -> list[tuple[int, int]]:
    """Prompt and output lengths of the first `count` requests, divided by `divisor`, but at least 1.

    The format is that of the Azure LLM inference traces: a CSV with the columns ContextTokens and
    GeneratedTokens (https://github.com/Azure/AzurePublicDataset).

    Raises:
        ValueError: a column is missing, or there are fewer requests.
    """
    reader = csv.DictReader(lines)
    missing = {"ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"the trace has no column {' and '.join(sorted(missing))}")
    lengths = [
        (max(1, int(row["ContextTokens"]) // divisor), max(1, int(row["GeneratedTokens"]) // divisor))
        for row in islice(reader, count)
    ]
    if len(lengths) < count:
        raise ValueError(f"the trace has {len(lengths)} requests, fewer than {count}")
    return lengths


def as_work(lengths: list[tuple[int, int]], vocab: int, seed: str) -> Work:
    """Random prompts of these lengths."""
    return Work(
        [prompts(1, prompt, vocab, f"{seed} {i}")[0] for i, (prompt, _) in enumerate(lengths)],
        [output for _, output in lengths],
    )
