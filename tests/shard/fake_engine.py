"""An engine process for tests: speaks engine.ipc.wire, needs the standard library only.

Each choice generates prompt[0] + choice + position. A prompt that begins with HOLD gets three tokens per
choice and then waits to be cancelled; one that begins with REFUSE is refused. The load counts requests.
The model "unloadable" fails for good, "mute" never gets ready, "stray" breaks the protocol, "vast" takes
prompts of millions of tokens.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.ipc import wire
from engine.ipc.link import Link
from engine.request import Delta, Load, Refusal, Timing

HOLD, REFUSE = 7000, 9000


class FakeEngine:
    def __init__(self, sock: socket.socket, text: socket.socket | None) -> None:
        self._text = None if text is None else Link(text)
        self._sock, self._link, self._step = sock, Link(sock), 0
        self._link.beat()
        self._running: dict[str, set[int]] = {}

    def send(self, message: wire.Message) -> None:
        self._link.send(message)

    def start(self, start: wire.StartEngine) -> None:
        config = start.config
        name = config.model.rpartition("/")[2]
        self._max_model_len = 1 << 22 if name == "vast" else 4096
        match name:
            case "unloadable":
                self.send(wire.EngineFailed("INVALID_MODEL", "no weights", permanent=True))
                sys.exit(3)
            case "mute":
                return
            case "stray":
                self._sock.sendall(b"\x00\x00\x00\x02{}")
                return
        self.send(wire.Loading(1.0))
        if config.rank == 0:
            self.send(wire.Rendezvous(f"{config.host}:1234"))
        if config.rank == 0 or config.tp * config.pp == 1:
            self.ready()

    def ready(self) -> None:
        self.send(wire.EngineReady("hash-1", self._max_model_len, 10000, (2,)))

    def step(self, **parts: object) -> None:
        self._step += 1
        load = Load(running=len(self._running), kv_blocks_free=90, kv_blocks_total=100)
        self.send(wire.Began(1))
        self.send(wire.StepEnded())
        assert self._text is not None, "only rank 0 has requests"
        self._text.send(wire.Step(self._step, load, **parts))  # type: ignore[arg-type]

    def submit(self, request: wire.Request) -> None:
        first = request.prompt_ids[0]
        if first == REFUSE:
            self.step(failed=(Refusal(request.id, "PROMPT_TOO_LONG", "too long"),))
            return
        choices = [
            choice for choice in range(request.n) if not (request.finished and request.finished[choice])
        ]
        done = {choice: len(request.prior[choice]) if request.prior else 0 for choice in choices}
        self._running[request.id] = set(choices)
        self.step(accepted=(request.id,))
        for _ in range(3 if first == HOLD else request.max_tokens):
            for choice in sorted(self._running[request.id]):
                position = done[choice]
                last = position + 1 >= request.max_tokens
                if last:
                    self._running[request.id].discard(choice)
                now = time.time()
                delta = Delta(
                    request.id,
                    choice,
                    position,
                    (first + choice + position,),
                    finish="length" if last else None,
                    timing=Timing(now, now, now, now) if last else None,
                )
                done[choice] += 1
                if last and not self._running[request.id]:
                    del self._running[request.id]
                self.step(deltas=(delta,))
            if request.id not in self._running:
                return

    def cancel(self, cancel: wire.CancelRequest) -> None:
        if cancel.choice is None:
            self._running.pop(cancel.id, None)
        elif cancel.id in self._running:
            self._running[cancel.id].discard(cancel.choice)
            if not self._running[cancel.id]:
                del self._running[cancel.id]
        self.step()

    def run(self) -> None:
        frames = wire.FrameBuffer()
        while data := self._sock.recv(1 << 16):
            for message in frames.feed(data):
                match message:
                    case wire.StartEngine():
                        self.start(message)
                    case wire.Rendezvous():
                        self.ready()
                    case wire.SubmitRequest(request):
                        self.submit(request)
                    case wire.CancelRequest():
                        self.cancel(message)
                    case wire.Probe():
                        self.send(wire.Alive())


if __name__ == "__main__":
    print("the fake engine runs as", os.getpid(), file=sys.stderr)
    inherited = {
        option: socket.socket(fileno=int(sys.argv[sys.argv.index(option) + 1]))
        for option in ("--fd", "--text-fd")
        if option in sys.argv
    }
    FakeEngine(inherited["--fd"], inherited.get("--text-fd")).run()
