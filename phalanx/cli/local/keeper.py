"""Keeps the programs of a local cluster running: does what `supervisor` decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from phalanx.cli import cluster
from phalanx.cli.local import processes, retire
from phalanx.cli.local.logtail import exit_reason
from phalanx.cli.local.spec import (
    CONTROLLER,
    ETCD,
    LocalSpec,
    Program,
    command,
    cores,
    environment,
    gateways,
    log_path,
    programs,
)
from phalanx.cli.local.supervisor import (
    Decision,
    Done,
    Event,
    Exited,
    Fail,
    Kill,
    Publish,
    Served,
    Spawn,
    StopAsked,
    Supervisor,
    Terminate,
    Tick,
)

log = logging.getLogger(__name__)
_ETCD_POLL_S = 0.05
_STARTING_S = 2.0  # of the Python that takes a deployment out


class Keeper:
    """Runs one local cluster until it is asked to stop.

    Owns: the child processes, their logs and announcements, cluster.json.
    Does not own: decisions (`Supervisor`), the deployment (`phalanx up` applies it).
    """

    def __init__(self, spec: LocalSpec, progress_fd: int) -> None:
        self._spec = spec
        self._state_dir = Path(spec.state_dir)
        self._programs = {program.name: program for program in programs(spec)}
        self._core = Supervisor(tuple(self._programs.values()))
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._known: dict[str, Mapping[str, str]] = {}
        self._progress_fd: int | None = progress_fd
        self._failed = False

    async def run(self, tether_fd: int) -> int:
        """Start everything and keep it running; returns the exit code.

        Stops on SIGTERM and SIGINT, and when `tether_fd` closes before a byte was written to it.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._events.put_nowait, StopAsked())
        self._events.put_nowait(Tick())
        async with asyncio.TaskGroup() as group:
            tether = group.create_task(self._hold(tether_fd))
            while await self._step(group):
                pass
            tether.cancel()
        strays = await asyncio.to_thread(processes.end_all, self._state_dir, 0.0)
        log.info("stopped", extra={"strays": strays})
        cluster.remove(self._state_dir)
        shutil.rmtree(self._state_dir / "etcd", ignore_errors=True)
        return 1 if self._failed else 0

    async def _step(self, group: asyncio.TaskGroup) -> bool:
        """Handle one event; False after the last."""
        loop = asyncio.get_running_loop()
        event: Event = Tick()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._core.wake_at()):
                event = await self._events.get()
        if isinstance(event, Exited | Served):
            log.info(type(event).__name__.lower(), extra={"program": event.name, **_detail(event)})
        for decision in self._core.handle(event, loop.time()):
            if isinstance(decision, Done):
                return False
            await self._do(decision, group)
        if isinstance(event, Served):
            self._tell({"served": event.name})
        return True

    async def _do(self, decision: Decision, group: asyncio.TaskGroup) -> None:
        match decision:
            case Spawn(name):
                await self._spawn(self._programs[name], group)
            case Terminate(name) if name == CONTROLLER and self._spec.etcd:
                group.create_task(self._retire())
            case Terminate(name):
                self._signal(name, signal.SIGTERM)
            case Kill(name):
                self._signal(name, signal.SIGKILL)
            case Publish():
                self._publish()
            case Fail(reason):
                self._failed = True
                self._tell({"failed": reason})
            case Done():
                pass
            case _:
                assert_never(decision)

    async def _spawn(self, program: Program, group: asyncio.TaskGroup) -> None:
        reader, writer = os.pipe()
        try:
            line = self._etcd_command() if program.role == "etcd" else self._command(program, writer)
            with log_path(self._spec, program.name).open("ab") as output:
                child = await asyncio.create_subprocess_exec(
                    *line,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[writer],
                    cwd=self._state_dir,
                    env=environment(self._spec, os.environ, cores()),
                )
        except OSError as error:
            os.close(reader)
            self._events.put_nowait(Exited(program.name, f"{program.name} cannot be started: {error}"))
            return
        finally:
            os.close(writer)
        self._children[program.name] = child
        group.create_task(self._watch(program, child, reader))

    async def _watch(self, program: Program, child: asyncio.subprocess.Process, reader: int) -> None:
        """Report that a child serves, then that it is gone."""
        async with _reading(reader) as pipe:
            if program.role == "etcd":
                addresses = await _healthy(self._known[ETCD]["grpc"], child)
            else:
                line = await pipe.readline()
                addresses = json.loads(line) if line else None
        if addresses is not None:
            self._known.setdefault(program.name, addresses)
            self._events.put_nowait(Served(program.name))
        code = await child.wait()
        reason = exit_reason(program.name, code, log_path(self._spec, program.name))
        self._events.put_nowait(Exited(program.name, reason))

    async def _retire(self) -> None:
        """Take the deployment out of an etcd that stays, then let the controller end; never fails."""
        deployment = retire.noted(self._state_dir)
        if deployment is not None and CONTROLLER in self._known:
            line = [sys.executable, "-P", "-m", "phalanx.cli.local.retire"]
            line += [self._known[CONTROLLER]["grpc"], deployment]
            try:
                code = await _bounded(line, retire.WITHIN_S + _STARTING_S)
                outcome = f"exit code {code}" if code else ""
            except (OSError, TimeoutError) as error:
                outcome = repr(error)
            if outcome:
                log.warning("deployment stays in etcd", extra={"deployment": deployment, "reason": outcome})
        self._signal(CONTROLLER, signal.SIGTERM)

    def _signal(self, name: str, signum: signal.Signals) -> None:
        child = self._children.get(name)
        if child is not None and child.returncode is None:
            child.send_signal(signum)

    def _publish(self) -> None:
        running = [
            cluster.Process(self._programs[name].role, name, child.pid)
            for name, child in self._children.items()
        ]
        listening = tuple(cluster.Gateway(name, **self._known[name]) for name in gateways(self._spec))
        cluster.write(
            self._state_dir,
            cluster.Cluster(
                http=listening[0].http,
                grpc=listening[0].grpc,
                gateways=listening,
                controller=self._known[CONTROLLER]["grpc"],
                etcd=self._spec.etcd or (self._known[ETCD]["grpc"],),
                processes=(cluster.Process("supervisor", "supervisor-0", os.getpid()), *running),
            ),
        )
        self._tell({"up": True})

    def _tell(self, news: Mapping[str, object]) -> None:
        """Tell the command that started us, as long as it listens."""
        if self._progress_fd is None:
            return
        try:
            os.write(self._progress_fd, json.dumps(news).encode() + b"\n")
        except BrokenPipeError:
            os.close(self._progress_fd)
            self._progress_fd = None

    async def _hold(self, tether_fd: int) -> None:
        async with _reading(tether_fd) as pipe:
            if not await pipe.read(1):
                self._events.put_nowait(StopAsked())

    def _command(self, program: Program, ready_fd: int) -> list[str]:
        return command(self._spec, program, self._known, ready_fd)

    def _etcd_command(self) -> list[str]:
        from phalanx.cli.local import embedded_etcd as embedded

        if ETCD not in self._known:
            ports = {"grpc": embedded.free_port(), "peer": embedded.free_port()}
            self._known[ETCD] = {use: f"127.0.0.1:{port}" for use, port in ports.items()}
        own = self._known[ETCD]
        return embedded.command(self._state_dir / "etcd", f"http://{own['grpc']}", f"http://{own['peer']}")


def _detail(event: Exited | Served) -> dict[str, str]:
    return {"reason": event.reason} if isinstance(event, Exited) else {}


@contextlib.asynccontextmanager
async def _reading(fd: int) -> AsyncIterator[asyncio.StreamReader]:
    """Read from a pipe, which is closed afterwards.

    By its transport: a descriptor closed under a transport stays watched, and when its number is given
    out again the transport takes the new pipe's events.
    """
    reader = asyncio.StreamReader()
    pipe = os.fdopen(fd, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        yield reader
    finally:
        transport.close()


async def _bounded(line: Sequence[str], timeout_s: float) -> int:
    """Run a command; returns its exit code. Raises TimeoutError once it took too long and was killed."""
    child = await asyncio.create_subprocess_exec(*line, stdin=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(timeout_s):
            return await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _healthy(address: str, child: asyncio.subprocess.Process) -> dict[str, str] | None:
    """Wait until an etcd answers its health check, or is gone.

    Plain HTTP: this process starts others and must have no gRPC threads.
    """
    host, _, port = address.partition(":")
    while child.returncode is None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /health HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            if b'"health":"true"' in answer:
                return {"grpc": address}
        await asyncio.sleep(_ETCD_POLL_S)
    return None
