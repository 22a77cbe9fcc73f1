"""decode throughput of the engine alone, and the memory traffic that it implies

A decode step reads every weight once. So tokens/s ÷ batch × bytes of weights is the memory bandwidth in use.
Example: python -m bench.decode --model .phalanx/demo-model
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from engine import Engine
from engine.request import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".phalanx/demo-model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    weights = sum(path.stat().st_size for path in Path(options.model).glob("*.safetensors"))
    arguments = {"dtype": options.dtype} if options.dtype else {}
    with Engine(options.model, tp=options.tp, device=options.device, **arguments) as engine:
        print(f"{options.model}, {weights / 1e6:.1f} MB of weights, tp {options.tp}, {options.device}")
        print(f"{'batch':>5} {'tokens/s':>9} {'GB/s of weights':>16}")
        for batch in options.batches:
            prompts = [[1 + (row + i) % 250 for i in range(PROMPT_TOKENS)] for row in range(batch)]
            greedy = SamplingParams(temperature=0)
            engine.generate(prompts, greedy, max_tokens=4, ignore_eos=True)  # warm up
            start = time.perf_counter()
            done = engine.generate(prompts, greedy, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            rate = sum(len(completion.token_ids) for completion in done) / (time.perf_counter() - start)
            print(f"{batch:>5} {rate:>9.0f} {rate / batch * weights / 1e9:>16.2f}")


if __name__ == "__main__":
    main()
