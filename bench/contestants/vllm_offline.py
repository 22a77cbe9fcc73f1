"""vLLM's offline engine for CPUs, as a contestant. Runs under the interpreter of vLLM's own environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.protocol import Recorder, Setup, Trace, Work, serve


class Offline:
    """An engine with vLLM's defaults, except for its memory, its threads and its prefix cache.

    The prefix cache is off: no two prompts of a measurement share a prefix, so it could only cost time.
    """

    def __init__(self, setup: Setup) -> None:
        os.environ |= environment(setup)
        import vllm  # type: ignore[import-not-found]  # another environment's
        from vllm import LLM

        self._llm: Any = LLM(
            model=setup.model,
            dtype=setup.dtype,
            skip_tokenizer_init=True,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_running,
            enforce_eager=setup.eager,
            enable_prefix_caching=False,
            seed=0,
        )
        self.name = "vLLM eager" if setup.eager else "vLLM compiled"
        preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
        self.details = (
            f"vllm {vllm.__version__}, {setup.dtype}, preloaded: {', '.join(preloaded) or 'nothing'}"
        )
        self._served = 0

    def run(self, work: Work) -> Trace:
        """Submit all prompts at once, then run the loop of `LLM.generate`, with a clock."""
        engine = self._llm.llm_engine
        recorder = Recorder(work)
        indices: dict[str, int] = {}

        def add(which: range) -> None:
            for index in which:
                request = str(self._served)
                self._served += 1
                indices[request] = index
                engine.add_request(
                    request,
                    {"prompt_token_ids": list(work.prompts[index])},
                    _sampling(work.new_tokens[index]),
                )

        add(recorder.early)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            recorder.tokens(
                [
                    (indices[output.request_id], token)
                    for output in outputs
                    for token in output.outputs[0].token_ids
                ]
            )
            add(recorder.late_arrivals())
        return recorder.finish()


def _sampling(new_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    return SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        min_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def environment(setup: Setup) -> dict[str, str]:
    """vLLM's environment variables: KV memory in whole GiB, a thread on every core, no network."""
    cores = sorted(os.sched_getaffinity(0))[: setup.threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, setup.kv_bytes >> 30)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


if __name__ == "__main__":
    serve(Offline)
