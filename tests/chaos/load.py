"""Clients that stream all the time, and a record of what each received, and when.

There are only a few different requests. Their undisturbed answers are known, so `check` can compare every
position. Times are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.client import Client
from phalanx.runtime.errors import PhalanxError
from tests.faults.streams import PROMPTS

SAMPLING: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 200,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "bad_words": ["self"],
    "min_tokens": 10,
    "ignore_eos": True,
}


@dataclass(slots=True)
class Answer:
    """What the client of one request received. `arrivals` has the time of each event with tokens."""

    number: int
    began: float
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0
    completion_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    problem: str = ""
    ended: float | None = None

    def same_as(self, other: Answer) -> bool:
        """Whether both clients received the same answer."""
        mine = (self.ids, self.text, self.finish, self.completion_tokens)
        return mine == (other.ids, other.text, other.finish, other.completion_tokens)


@dataclass(slots=True)
class Load:
    """`streams` clients, each sending one request after another.

    The load ends when the block of `run` is left, or with `total` after so many requests.
    """

    gateways: Sequence[str]
    model: str
    streams: int
    max_tokens: int
    total: int = 0  # 0: until the block of `run` is left
    answers: list[Answer] = field(default_factory=list)
    running: dict[int, Answer] = field(default_factory=dict)  # by client
    stopping: bool = False
    problems: list[str] = field(default_factory=list)  # with the run itself
    _next: int = 0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Load]:
        """Run the load inside the block. Leaving the block waits for the last requests."""
        async with contextlib.AsyncExitStack() as stack:
            # Half of the clients begin at one gateway, the others at another.
            clients = []
            for first in range(min(2, len(self.gateways))):
                targets = [*self.gateways[first:], *self.gateways[:first]]
                clients.append(await stack.enter_async_context(Client(*targets)))
            async with asyncio.TaskGroup() as group:
                for number in range(self.streams):
                    group.create_task(self._client(number, clients[number % len(clients)]))
                try:
                    yield self
                finally:
                    self.stopping = not self.total

    @property
    def under_way(self) -> list[Answer]:
        """The streams far from their end; none before all have begun and 60 % are far from their end."""
        begun = [answer for answer in self.running.values() if len(answer.ids) >= 4]
        far = [answer for answer in begun if len(answer.ids) <= 0.7 * self.max_tokens]
        return far if len(begun) == self.streams and len(far) >= 0.6 * self.streams else []

    async def _client(self, number: int, client: Client) -> None:
        while not self.stopping and (not self.total or self._next < self.total):
            request, self._next = self._next % len(PROMPTS), self._next + 1
            answer = self.running[number] = Answer(request, time.monotonic())
            await self._stream(client, answer)
            del self.running[number]
            self.answers.append(answer)

    async def _stream(self, client: Client, answer: Answer) -> None:
        prompt = PROMPTS[answer.number]
        options = SAMPLING | {"max_tokens": self.max_tokens, "seed": answer.number}
        try:
            async for event in client.generate(self.model, prompt, **options):
                if event.HasField("chunk"):
                    chunk = event.chunk
                    if chunk.index != len(answer.ids):
                        answer.problem = f"position {chunk.index} after {len(answer.ids)} tokens"
                    answer.arrivals.append(time.monotonic())
                    answer.ids += chunk.token_ids
                    answer.text += chunk.text
                    answer.finish = chunk.finish_reason or answer.finish
                elif event.HasField("finished"):
                    answer.completion_tokens = event.finished.usage.completion_tokens
                    answer.ended = time.monotonic()
        except PhalanxError as error:
            answer.problem = f"{error.reason}: {error.message}"


async def undisturbed(gateways: Sequence[str], model: str, max_tokens: int) -> list[Answer]:
    """The answer to every request while no fault is injected."""
    load = Load(gateways, model, len(PROMPTS), max_tokens, total=len(PROMPTS))
    async with load.run():
        pass
    return sorted(load.answers, key=lambda answer: answer.number)
