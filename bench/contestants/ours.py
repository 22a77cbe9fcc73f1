"""`engine.Engine`, as a contestant."""

from __future__ import annotations

import torch

from bench.protocol import Recorder, Setup, Trace, Work, serve
from engine import Engine
from engine.request import Request, SamplingParams


class Ours:
    """An engine of one rank with all threads."""

    name = "Phalanx"

    def __init__(self, setup: Setup) -> None:
        self._engine = Engine(
            setup.model,
            dtype=setup.dtype,
            quantization=setup.quantization,
            threads=setup.threads,
            max_model_len=setup.max_model_len,
            kv_bytes=setup.kv_bytes,
            max_running=setup.max_running,
            max_batch_tokens=setup.max_batch_tokens,
        )
        if setup.quantization:
            self.name = f"Phalanx {setup.quantization}"
        self.details = f"torch {torch.__version__}, {setup.dtype}"
        self._served = 0

    def run(self, work: Work) -> Trace:
        """Submit all prompts at once, then run step by step."""
        engine = self._engine
        recorder = Recorder(work)
        indices: dict[str, int] = {}

        def submit(which: range) -> None:
            for index in which:
                request = str(self._served)
                self._served += 1
                indices[request] = index
                engine.submit(
                    Request(
                        request,
                        tuple(work.prompts[index]),
                        SamplingParams(temperature=0),
                        work.new_tokens[index],
                        ignore_eos=True,
                    )
                )

        submit(recorder.early)
        while engine.busy:
            deltas = engine.step()
            recorder.tokens([(indices[delta.id], token) for delta in deltas for token in delta.token_ids])
            submit(recorder.late_arrivals())
        return recorder.finish()


if __name__ == "__main__":
    serve(Ours)
