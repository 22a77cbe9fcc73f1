"""Keeps the programs of a local cluster running: carries out the decisions of `supervisor`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from phalanx.cli import cluster
from phalanx.cli.local import processes, retire
from phalanx.cli.local.children import reading, run_bounded, wait_for_etcd
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
    ProcessSupervisor,
    Publish,
    Served,
    Spawn,
    StopAsked,
    Terminate,
    Tick,
)

log = logging.getLogger(__name__)
_STARTING_S = 2.0  # start-up time of the `retire` process


class Keeper:
    """Runs one local cluster until it is asked to stop.

    Owns: the child processes, their logs and announcements, cluster.json.
    Does not own: decisions (`ProcessSupervisor`), the deployment (`phalanx up` applies it).
    """

    def __init__(self, spec: LocalSpec, progress_fd: int) -> None:
        self._spec = spec
        self._state_dir = Path(spec.state_dir)
        self._programs = {program.name: program for program in programs(spec)}
        self._supervisor = ProcessSupervisor(tuple(self._programs.values()))
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._known: dict[str, Mapping[str, str]] = {}
        self._progress_fd: int | None = progress_fd
        self._failed = False

    async def run(self, tether_fd: int) -> int:
        """Start everything and keep it running; returns the exit code.

        Stops on SIGTERM and SIGINT, and when `tether_fd` is closed before a byte was written to it.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._events.put_nowait, StopAsked())
        self._events.put_nowait(Tick())
        async with asyncio.TaskGroup() as group:
            tether = group.create_task(self._watch_tether(tether_fd))
            while await self._step(group):
                pass
            tether.cancel()
        strays = await asyncio.to_thread(processes.end_all, self._state_dir, 0.0)
        log.info("stopped", extra={"strays": strays})
        cluster.remove(self._state_dir)
        shutil.rmtree(self._state_dir / "etcd", ignore_errors=True)
        return 1 if self._failed else 0

    async def _step(self, group: asyncio.TaskGroup) -> bool:
        """Wait for one event and handle it; returns False once every process is gone."""
        loop = asyncio.get_running_loop()
        event: Event = Tick()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._supervisor.wake_at()):
                event = await self._events.get()
        if isinstance(event, Exited | Served):
            log.info(type(event).__name__.lower(), extra={"program": event.name, **_detail(event)})
        for decision in self._supervisor.handle(event, loop.time()):
            if isinstance(decision, Done):
                return False
            await self._carry_out(decision, group)
        if isinstance(event, Served):
            self._report({"served": event.name})
        return True

    async def _carry_out(self, decision: Decision, group: asyncio.TaskGroup) -> None:
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
                self._report({"failed": reason})
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
        """Report that a child serves, and later that it has ended."""
        async with reading(reader) as pipe:
            if program.role == "etcd":
                addresses = await wait_for_etcd(self._known[ETCD]["grpc"], child)
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
        """Delete the deployment from an external etcd, then end the controller. Never raises."""
        deployment = retire.noted(self._state_dir)
        if deployment is not None and CONTROLLER in self._known:
            line = [sys.executable, "-P", "-m", "phalanx.cli.local.retire"]
            line += [self._known[CONTROLLER]["grpc"], deployment]
            try:
                code = await run_bounded(line, retire.WITHIN_S + _STARTING_S)
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
        self._report({"up": True})

    def _report(self, message: Mapping[str, object]) -> None:
        """Send a progress message to the command that started this process, while it reads them."""
        if self._progress_fd is None:
            return
        try:
            os.write(self._progress_fd, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            os.close(self._progress_fd)
            self._progress_fd = None

    async def _watch_tether(self, tether_fd: int) -> None:
        """Stop the cluster when the command that started it ends without releasing it."""
        async with reading(tether_fd) as pipe:
            if not await pipe.read(1):
                self._events.put_nowait(StopAsked())

    def _command(self, program: Program, ready_fd: int) -> list[str]:
        return command(self._spec, program, self._known, ready_fd)

    def _etcd_command(self) -> list[str]:
        from phalanx.cli.local import embedded_etcd

        if ETCD not in self._known:
            ports = {"grpc": embedded_etcd.free_port(), "peer": embedded_etcd.free_port()}
            self._known[ETCD] = {use: f"127.0.0.1:{port}" for use, port in ports.items()}
        own = self._known[ETCD]
        client_url, peer_url = f"http://{own['grpc']}", f"http://{own['peer']}"
        return embedded_etcd.command(self._state_dir / "etcd", client_url, peer_url)


def _detail(event: Exited | Served) -> dict[str, str]:
    return {"reason": event.reason} if isinstance(event, Exited) else {}
