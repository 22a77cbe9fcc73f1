"""transformers' `generate` on a batch without padding, as a contestant: default attention, all threads.

With a static cache on a GPU, it compiles the model.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.protocol import Recorder, Setup, Trace, Work, serve


class Generate:
    """A model without gradients; a batch is one call."""

    name = "transformers generate"

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._model = load(setup)
        self._options: dict[str, Any] = {"cache_implementation": "static"} if setup.static else {}
        self.details = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {setup.dtype}, "
            f"attention {self._model.config._attn_implementation}"
        )

    def run(self, work: Work) -> Trace:
        """Run all prompts in one call. They must have the same length, so that no padding is needed."""
        (new_tokens,) = set(work.new_tokens)
        recorder = Recorder(work)
        # Compiled code cannot always use the tensors of inference mode.
        with torch.no_grad() if self._options else torch.inference_mode():
            ids = torch.tensor(work.prompts, device=self._model.device)
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                streamer=_Clock(recorder),
                **self._options,
            )
        return recorder.finish()


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not typed here
    """Records the tokens of every step. The first call brings the prompts, which are no new tokens."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._recorder.tokens(list(enumerate(value.flatten().tolist())))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def load(setup: Setup, **options: Any) -> Any:
    """The model in eval mode."""
    transformers.logging.set_verbosity_error()
    options |= {"dtype": getattr(torch, setup.dtype)}
    if setup.random_weights:
        config = AutoConfig.from_pretrained(setup.model, local_files_only=True)
        with torch.device(setup.device):
            model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(setup.model, local_files_only=True, **options)
        model = model.to(setup.device)
    model.generation_config.eos_token_id = None  # every contestant ignores the end of a sequence
    return model.eval()


if __name__ == "__main__":
    serve(Generate)
