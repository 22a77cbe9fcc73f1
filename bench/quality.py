"""the cost of quantised weights: perplexity of the demo model on text that it was not trained on

The model's seed shuffles the files of the standard library. Training uses the first of them. This
measurement uses the last. Windows of 512 tokens are scored independently. Example: python -m bench.quality
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import render, results
from engine import Engine
from engine.request import SamplingParams
from engine.text.tokenizer import Tokenizer
from phalanx.cli.demo_model import CHARS_PER_S, corpus, make

WINDOW = 512
VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


def held_out(texts: Sequence[str], chars: int, trained: int) -> Iterator[str]:
    """Texts from the end, last first, that together have about `chars` characters.

    Raises:
        ValueError: some of them may be among the first `trained` characters, which training has seen.
    """
    longest = max(map(len, texts))  # training and measurement both take whole texts
    if trained + chars + 2 * longest > sum(map(len, texts)):
        raise ValueError(f"the standard library here has no {chars} characters besides {trained} trained on")
    for text in reversed(texts):
        if chars <= 0:
            return
        chars -= len(text)
        yield text


def windows(ids: Sequence[int], size: int) -> list[list[int]]:
    """Pieces of `size` tokens; an incomplete last piece is dropped."""
    return [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]


def perplexity(model: Path, pieces: Sequence[Sequence[int]], variant: dict[str, str]) -> float:
    """exp of the mean negative log-probability, over all tokens but the first of each piece."""
    with Engine(str(model), max_model_len=WINDOW + 1, **variant) as engine:  # type: ignore[arg-type]  # strings
        done = engine.generate(pieces, SamplingParams(temperature=0), max_tokens=1, prompt_logprobs=0)
    logprobs = [position.chosen.logprob for each in done for position in each.prompt_logprobs]
    assert len(logprobs) == len(pieces) * (WINDOW - 1)
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=Path(".phalanx/demo-model"), help="trained first if it does not exist"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed that the model was trained with")
    parser.add_argument("--seconds", type=float, default=75, help="how long the model was trained")
    parser.add_argument(
        "--chars", type=int, default=200_000, help="characters of held-out text; default: %(default)s"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if not options.model.exists():
        print(f"training {options.model}: {options.seconds:.0f} s", flush=True)
        make(options.model, time.monotonic() + options.seconds, options.seed, lambda progress: None)
    tokenizer = Tokenizer(str(options.model))
    texts = held_out(list(corpus(options.seed)), options.chars, int(CHARS_PER_S * options.seconds))
    pieces = [piece for text in texts for piece in windows(tokenizer.encode(text), WINDOW)]
    machine, stamp = results.Machine.here(), results.Stamp.now()
    rows: list[results.Row] = []
    for name in options.variants:
        value = perplexity(options.model, pieces, VARIANTS[name])
        rows.append({"weights": name, "perplexity": value, "tokens": len(pieces) * (WINDOW - 1)})
        print(f"{name:<9} perplexity {value:.4f}", flush=True)
    results.save(options.docs / "bench", "quality", rows, machine, stamp)
    render.write(options.docs)


if __name__ == "__main__":
    main()
