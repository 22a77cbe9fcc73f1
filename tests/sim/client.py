"""Simulated clients: they resume broken streams, and check that no token is repeated, skipped or changed."""

from __future__ import annotations

import asyncio
from typing import Any

from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, types_pb2
from tests.sim.loop import Process
from tests.sim.model import STOP_PIECE, expected
from tests.sim.net import End
from tests.sim.world import World

_RESUME_ELSEWHERE = ("UNREACHABLE", "STORE_UNAVAILABLE")
_FINISH = {"stop": types_pb2.FINISH_REASON_STOP, "length": types_pb2.FINISH_REASON_LENGTH}


class SimClient:
    """The client of one request. It behaves like `phalanx.client.Client`, but never gives up."""

    def __init__(self, world: World, number: int) -> None:
        chance = world.chance
        self._world, self.number = world, number
        self.process = Process(world.loop, f"client{number}")
        self.prompt = [chance.randint(1, 90) for _ in range(chance.randint(1, 12))]
        self.n = chance.choice((1, 1, 2))
        self.max_tokens = chance.randint(5, 110)
        self.seed = chance.getrandbits(40)
        self.stop = chance.random() < 0.3
        self.ids: list[list[int]] = [[] for _ in range(self.n)]
        self.texts = [""] * self.n
        self.finishes = [0] * self.n
        self.ended = False
        self.error = ""
        self.token = self.cursor = ""

    async def run(self) -> None:
        """Stream to the end, at any gateway."""
        turn, chance = self.number, self._world.chance
        while not self.ended and not self.error:
            gateway = self._world.gateway_names[turn % len(self._world.gateway_names)]
            try:
                await self._attempt(gateway)
            except ConnectionError:
                pass
            except PhalanxError as error:
                if error.reason == "UNKNOWN_REQUEST" and self.cursor:
                    self.token = ""
                elif error.reason not in _RESUME_ELSEWHERE:
                    self.error = error.reason
                    self._world.note(f"{self.process} ends with {error.reason}: {error.message}")
            turn += 1
            await asyncio.sleep(chance.uniform(0.02, 0.2))

    async def _attempt(self, gateway: str) -> None:
        net, ends = self._world.net, [await self._world.net.connect(self.process, gateway)]
        try:
            # UNKNOWN_REQUEST: send it again, read until it has caught up, then resume that new stream.
            if self.cursor and not self.token:
                net.send(ends[0], self._request())
                self.token = await self._catch_up(ends[0])
                ends.append(await net.connect(self.process, gateway))
            net.send(ends[-1], self._request())
            while not self.ended:
                self._take(await ends[-1].get())
        except ConnectionError:
            if isinstance(ends[-1].why, PhalanxError):
                raise ends[-1].why from None
            raise
        finally:
            for end in ends:
                net.close(end)

    async def _catch_up(self, end: End) -> str:
        """Read the new stream until it has as many tokens as this one had; returns its resume token."""
        token, counts = "", [0] * self.n
        while not token or any(count < len(ids) for count, ids in zip(counts, self.ids, strict=True)):
            event = await end.get()
            token = token or event.started.resume_token
            counts[event.chunk.choice] += len(event.chunk.token_ids)
        return token

    def _request(self) -> Any:
        if self.token:
            return inference_pb2.ResumeRequest(resume_token=self.token, cursor=self.cursor)
        request = inference_pb2.GenerateRequest(model="d", n=self.n)
        request.token_ids.ids[:] = self.prompt
        request.sampling.seed = self.seed
        request.stopping.max_tokens = self.max_tokens
        if self.stop:
            request.stopping.stop.append(STOP_PIECE)
        return request

    def _take(self, event: inference_pb2.GenerateResponse) -> None:
        self.cursor = event.cursor
        match event.WhichOneof("event"):
            case "started":
                self.token = event.started.resume_token
            case "chunk":
                chunk = event.chunk
                mine = self.ids[chunk.choice]
                if chunk.index != len(mine) or self.finishes[chunk.choice]:
                    self._wrong(f"choice {chunk.choice}: position {chunk.index} after {len(mine)} tokens")
                mine += chunk.token_ids
                self.texts[chunk.choice] += chunk.text
                self.finishes[chunk.choice] = chunk.finish_reason
            case "finished":
                self.ended = True
                if event.finished.usage.completion_tokens != sum(map(len, self.ids)):
                    self._wrong("usage differs from what was delivered")
                self.check(whole=True)

    def check(self, *, whole: bool) -> None:
        """Compare the delivered tokens with an undisturbed run; with `whole`, also the text and the end."""
        for choice in range(self.n):
            ids, text, finish = expected(self.prompt, self.seed, choice, self.max_tokens, self.stop)
            got = self.ids[choice]
            if got != ids[: len(got)]:
                self._wrong(f"choice {choice}: tokens differ from the undisturbed run's")
            elif whole and (got, self.texts[choice], self.finishes[choice]) != (ids, text, _FINISH[finish]):
                self._wrong(
                    f"choice {choice}: {len(got)} of {len(ids)} tokens, finish {self.finishes[choice]}"
                )

    def _wrong(self, what: str) -> None:
        self._world.violations.append(f"{self.process}: {what}")
