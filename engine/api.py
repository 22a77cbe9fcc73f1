"""The engine as a library: `with Engine(model) as engine: engine.generate(["Once upon"])`.

Rank 0 lives in the caller's process; the others are `python -m engine.process` children.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from engine.config import EngineConfig, ModelConfig, check_layout
from engine.core import EngineCore
from engine.detokenizer import ChoiceText, Detokenizer
from engine.errors import EngineError, ModelError
from engine.link import Link, LinkClosedError
from engine.rank import join
from engine.request import FinishReason, PositionLogprobs, Request, SamplingParams
from engine.text import Tokenizer
from engine.wire import EngineFailed, Rendezvous, StartEngine

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One choice of one prompt. `text` is None when the prompts were token ids."""

    prompt: int
    choice: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    text: str | None = None


class Engine:
    """One replica of a model over `tp` times `pp` ranks.

    Args:
        model: a Hugging Face directory of a Llama.
        tp: tensor parallel ranks per stage.
        pp: pipeline stages.
        device: "cpu" or "cuda"; rank r takes GPU r modulo the GPUs there are.
        options: further fields of EngineConfig, such as dtype and max_model_len.

    Raises:
        ModelError: the model or the layout cannot be served.
        EngineError: another rank has ended while starting.
    """

    def __init__(self, model: str, *, tp: int = 1, pp: int = 1, device: str = "cpu", **options: Any) -> None:
        config = EngineConfig(str(model), tp=tp, pp=pp, device=_device(device, 0), **options)
        check_layout(ModelConfig.load(config.model), tp, pp)  # before any rank is started for nothing
        self._model = config.model
        self._ids = itertools.count()
        self._tokenizer: Tokenizer | None = None
        self._children: list[tuple[subprocess.Popen[bytes], Link]] = []
        self._core: EngineCore | None = None
        try:
            for rank in range(1, tp * pp):
                self._spawn(config, rank, _device(device, rank))
            member = join(config, self._announce, lambda: "", lambda fraction: None, self._check)
        except BaseException as error:
            cause = self._first_failure()
            self.close()
            own = isinstance(error, EngineError) and error.reason != "RANK_LOST"
            if cause is None or own or not isinstance(error, Exception):
                raise
            raise cause from error  # which knows better than rank 0 why it has gone
        self._core = member.core
        self.max_model_len = member.max_model_len

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int = 16,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete every prompt `n` times over; completions come in the order of prompts, then choices.

        Raises:
            RequestError: a prompt cannot be served; nothing has been generated.
        """
        core = self._running()
        tokenizer = None
        if any(isinstance(prompt, str) for prompt in prompts):
            tokenizer = self._tokenizer = self._tokenizer or Tokenizer(self._model)
        sampling = sampling or SamplingParams()
        completions: dict[tuple[str, int], Completion] = {}
        ids = [f"request-{next(self._ids)}" for _ in prompts]
        try:
            for index, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
                token_ids = tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else prompt
                request = Request(
                    request_id,
                    tuple(int(token) for token in token_ids),
                    sampling,
                    max_tokens,
                    tuple(stop_token_ids),
                    ignore_eos,
                    n,
                    logprobs,
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

    def close(self) -> None:
        """End every rank."""
        if self._core is not None:
            self._core.close()
            self._core = None
        for process, link in self._children:
            link.close()
            process.kill()
            process.wait()
        self._children.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spawn(self, config: EngineConfig, rank: int, device: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "engine.process", "--survive-thread"]
            command += ["--fd", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        link = Link(ours)
        self._children.append((process, link))
        link.send(
            StartEngine(
                config.model,
                config.tp,
                config.pp,
                rank,
                config.epoch,
                config.host,
                device,
                config.dtype,
                config.max_model_len,
                config.max_running,
                config.kv_bytes,
                config.threads,
                config.quantization,
            )
        )

    def _announce(self, address: str) -> None:
        for _, link in self._children:
            link.send(Rendezvous(address))

    def _check(self) -> None:
        failure = self._first_failure()
        if failure is not None:
            raise failure

    def _first_failure(self) -> EngineError | None:
        for rank, (_, link) in enumerate(self._children, start=1):
            try:
                messages = link.receive(0)
            except LinkClosedError:
                return EngineError("RANK_LOST", f"rank {rank} has ended while starting")
            for message in messages:
                if isinstance(message, EngineFailed):
                    kind = ModelError if message.permanent else EngineError
                    return kind(message.reason, message.message)
        return None

    def _running(self) -> EngineCore:
        if self._core is None:
            raise EngineError("CLOSED", "the engine is closed")
        return self._core

    def _run(self, core: EngineCore, completions: dict[tuple[str, int], Completion], progress: bool) -> None:
        with _bar(len(completions), progress) as advance:
            while core.busy:
                core.launch(time.time())
                _, deltas = core.collect(time.time())
                for delta in deltas:
                    completion = completions[delta.id, delta.choice]
                    completion.token_ids.extend(delta.token_ids)
                    completion.logprobs.extend(delta.logprobs)
                    completion.finish = delta.finish
                    if delta.finish:
                        advance()


def _text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of a completion, as the text process would deliver it piece by piece."""
    text = ChoiceText(Detokenizer(tokenizer.decode, tokenizer.context), ())
    return "".join(map(text.push, token_ids)) + text.flush()


def _device(device: str, rank: int) -> str:
    if device != "cuda":
        return device
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}"


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A function to call for every completion that has ended."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bars:
        task = bars.add_task("Completions", total=total)
        yield lambda: bars.advance(task)
