"""The engine as a library: `with Engine(model) as engine: engine.generate(["Once upon"])`.

Rank 0 runs in the caller's process. The other ranks are child processes (`child_ranks.py`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from socket import socket
from subprocess import Popen
from typing import Any, Self

from engine.child_ranks import ChildRanks, start_process
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.processes.core import EngineCore
from engine.processes.startup import start_rank
from engine.progress import loading_bar, progress_bar
from engine.request import Delta, FinishReason, Load, PositionLogprobs, Request, SamplingParams
from engine.text.detokenizer import ChoiceText, Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.weights.model_config import ModelConfig, check_layout

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One completion of one prompt.

    Attributes:
        prompt: index of the prompt.
        choice: which of the `n` completions of that prompt.
        token_ids: the output, including the token that ends it.
        logprobs: one entry per output token, if asked for.
        finish: why the completion has ended.
        text: the output as text; None if all prompts were token ids.
        prompt_logprobs: of choice 0, one entry per prompt token after the first, if asked for.
        cached_tokens: tokens of the prompt whose KV was cached.
    """

    prompt: int
    choice: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    text: str | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    cached_tokens: int = 0


class Engine:
    """One replica of a model over `tp` times `pp` ranks.

    Args:
        model: a Hugging Face directory, or one of `phalanx shard-model`.
        tp: tensor parallel ranks per stage.
        pp: pipeline stages.
        device: "cpu" or "cuda"; rank r takes GPU number r modulo the number of GPUs.
        progress: show how much of the weights rank 0 has loaded; None shows it if standard error is a
            terminal.
        options: other fields of EngineConfig, such as dtype and max_model_len.

    Raises:
        ModelError: the model or the layout cannot be served.
        EngineError: a rank cannot start, or has ended while starting.
    """

    def __init__(
        self,
        model: str,
        *,
        tp: int = 1,
        pp: int = 1,
        device: str = "cpu",
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig(str(model), tp=tp, pp=pp, device=_device(device, 0), **options)
        check_layout(ModelConfig.load(config.model), tp, pp)  # refuse before any rank starts
        self._model = config.model
        self._ids = itertools.count()
        self._tokenizer: Tokenizer | None = None
        self._child_ranks = ChildRanks()
        self._core: EngineCore | None = None
        try:
            for rank in range(1, tp * pp):
                child = replace(config, rank=rank, device=_device(device, rank))
                self._child_ranks.start(child, self._start_process)
            with loading_bar(progress) as loaded:
                announce, check = self._child_ranks.announce, self._child_ranks.check
                rank_0 = start_rank(config, announce, lambda: "", loaded, check)
        except BaseException as error:
            cause = self._child_ranks.first_failure()
            self.close()
            own = isinstance(error, EngineError) and error.reason != "RANK_LOST"
            if cause is None or own or not isinstance(error, Exception):
                raise
            raise cause from error  # rank 0 sees only that a rank has gone; that rank reported why
        self._core = rank_0.core
        self.max_model_len = rank_0.max_model_len

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | Sequence[int] = 16,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete every prompt `n` times; completions come in the order of prompts, then choices.

        Args:
            prompts: texts or token ids.
            sampling: how tokens are sampled, the same for all prompts.
            max_tokens: the longest completion; one number for all prompts, or one per prompt.
            stop_token_ids: tokens that end a completion; such a token is part of the completion.
            ignore_eos: continue after the model's end of sequence.
            n: completions of each prompt.
            logprobs: log-probabilities of the sampled tokens, with this many alternatives.
            prompt_logprobs: the same for the prompts' tokens.
            progress: show a bar on standard error; None shows it if standard error is a terminal.

        Raises:
            RequestError: a prompt cannot be served; nothing has been generated.
            EngineError: BUSY, if requests of `submit` still run.
        """
        core = self._running()
        core.settle(time.time())
        if core.busy:
            raise EngineError("BUSY", "requests of submit() still run: generate() would consume their tokens")
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        tokenizer = None
        if any(isinstance(prompt, str) for prompt in prompts):
            tokenizer = self._tokenizer = self._tokenizer or Tokenizer(self._model)
        completions: dict[tuple[str, int], Completion] = {}
        ids = [f"request-{next(self._ids)}" for _ in prompts]
        try:
            for index, (request_id, prompt, limit) in enumerate(zip(ids, prompts, limits, strict=True)):
                token_ids = tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else prompt
                request = Request(
                    request_id,
                    tuple(int(token) for token in token_ids),
                    sampling or SamplingParams(),
                    limit,
                    tuple(stop_token_ids),
                    ignore_eos,
                    n,
                    logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
                core.submit(request, time.time())
                for choice in range(n):
                    completions[request_id, choice] = Completion(index, choice)
            self._run(core, completions, progress)
        finally:
            for request_id in ids:
                core.cancel(request_id)
        if tokenizer:
            for completion in completions.values():
                completion.text = _text(tokenizer, completion.token_ids)
        return list(completions.values())

    def submit(self, request: Request) -> tuple[Delta, ...]:
        """Queue a request for `step`. Returns the end of each choice whose prior output is complete already.

        Raises:
            RequestError: the request cannot be served; nothing has changed.
        """
        return self._running().submit(request, time.time())

    def step(self) -> tuple[Delta, ...]:
        """Run one step; returns the new tokens. The engine must be `busy`."""
        core = self._running()
        core.launch(time.time())
        return core.collect(time.time())[1]

    def cancel(self, request_id: str) -> None:
        """End a request without further tokens. An unknown one is ignored."""
        self._running().cancel(request_id)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or a step is in flight."""
        return self._running().busy

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self._running().load

    def close(self) -> None:
        """End every rank."""
        if self._core is not None:
            self._core.close()
            self._core = None
        self._child_ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_process(self, theirs: socket) -> Popen[bytes]:
        """Start the process of a child rank. Tests and benchmarks override this."""
        return start_process(theirs)

    def _running(self) -> EngineCore:
        if self._core is None:
            raise EngineError("CLOSED", "the engine is closed")
        return self._core

    def _run(
        self, core: EngineCore, completions: dict[tuple[str, int], Completion], progress: bool | None
    ) -> None:
        with progress_bar(len(completions), core.load, progress) as advance:
            while core.busy:
                deltas = self.step()
                for delta in deltas:
                    completion = completions[delta.id, delta.choice]
                    completion.token_ids.extend(delta.token_ids)
                    completion.logprobs.extend(delta.logprobs)
                    completion.prompt_logprobs.extend(delta.prompt_logprobs)
                    completion.cached_tokens += delta.cached_tokens
                    completion.finish = delta.finish
                ended = sum(delta.finish is not None for delta in deltas)
                advance(ended, sum(len(delta.token_ids) for delta in deltas), core.load)


def _text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a completion. The text process of a worker builds the same text, piece by piece."""
    text = ChoiceText(Detokenizer(tokenizer.decode, tokenizer.context), ())
    return "".join(map(text.push, token_ids)) + text.flush()


def _device(device: str, rank: int) -> str:
    if device != "cuda":
        return device
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}"
