"""The shard server's entry point: `python -m dataplane.shard.main`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from dataplane.shard.children import Commands
from dataplane.shard.worker import Identity, Worker
from phalanx.runtime import logs, ready, telemetry
from phalanx.store.etcd import EtcdStore

log = logging.getLogger(__name__)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="phalanx-worker", description="Serves one device of the cluster.")
    parser.add_argument("--etcd", required=True, metavar="HOST:PORT[,...]", help="the cluster's store")
    parser.add_argument("--name", required=True, help="this worker's name, unique in the cluster")
    parser.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one"
    )
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda:N", help="the device to own")
    parser.add_argument("--cluster", default="default", help="the cluster's name in the store")
    parser.add_argument(
        "--host", default=socket.gethostname(), help="this host's name, for others to reach it"
    )
    parser.add_argument(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that the requests of this worker's replica have to end after SIGTERM",
    )
    parser.add_argument("--ready-fd", type=int, metavar="N", help="where to write the address once it serves")
    return parser.parse_args(arguments)


async def serve(options: argparse.Namespace) -> None:
    """Run one worker until SIGTERM or SIGINT and, within its time, until its replica has no requests."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    identity = Identity(options.name, options.host, options.device, options.listen, options.cluster)
    store = EtcdStore(options.etcd.split(","))

    def listening(address: str) -> None:
        log.info("serving", extra={"address": address, "device": options.device})
        ready.announce(options.ready_fd, {"grpc": address})

    try:
        commands = Commands(forkserver=(sys.executable, "-m", "engine.processes.forkserver"))
        await Worker(identity, store, commands).run(stop, listening, options.drain_s)
    finally:
        await store.close()


def main() -> None:
    """Run until told to stop."""
    options = parse()
    logs.setup("worker", options.name)
    telemetry.setup("worker", options.name)
    try:
        asyncio.run(serve(options))
    finally:
        telemetry.shutdown()


if __name__ == "__main__":
    main()
