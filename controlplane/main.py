"""The controller process: `python -m controlplane.main`."""

from __future__ import annotations

import asyncio
import logging
import signal

import click

from controlplane import active_controller
from controlplane.server import SERVICE, ControlService
from controlplane.view import View
from phalanx.runtime import logs, ready, rpc, telemetry
from phalanx.store.etcd import EtcdStore
from phalanx.store.keys import Keys
from phalanx.store.records import ControllerRecord
from phalanx.v1 import control_pb2_grpc

log = logging.getLogger(__name__)
_GRACE_S = 1.0


async def serve(etcd: list[str], listen: str, name: str, cluster: str, ready_fd: int | None) -> None:
    """Serve operators and compete for the lock until SIGTERM or SIGINT; release the lock before the exit."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    keys, store = Keys(cluster), EtcdStore(etcd)
    view = View(store, keys)
    server = rpc.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(store, keys, view), server)
    health = rpc.add_health_and_reflection(server, [SERVICE])
    bound = rpc.bind(server, listen)
    try:
        async with asyncio.TaskGroup() as group:
            following = group.create_task(view.follow())
            await server.start()
            ready.announce(ready_fd, {"grpc": bound})
            log.info("serving", extra={"grpc": bound})
            marking = group.create_task(_mark_serving(view, health))
            record = ControllerRecord(name, bound)
            controlling = group.create_task(active_controller.run(store, keys, view, record))
            await stop.wait()
            log.info("stopping")
            await rpc.set_serving(health, ["", SERVICE], serving=False)
            controlling.cancel()
            await asyncio.wait([controlling])  # the lock is released before the server stops
            await server.stop(_GRACE_S)
            for task in (following, marking):
                task.cancel()
    finally:
        await store.close()
        telemetry.shutdown()


async def _mark_serving(view: View, health: rpc.Health) -> None:
    """Report this controller as healthy once it has its first view of the cluster."""
    await view.newer(None)
    await rpc.set_serving(health, ["", SERVICE])


@click.command()
@click.option("--etcd", required=True, help="Endpoints of etcd: host:port, separated by commas.")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="Where to serve gRPC.")
@click.option("--name", default="controller-0", show_default=True, help="This controller's name.")
@click.option("--cluster", default="default", show_default=True, help="The cluster's name in the store.")
@click.option("--ready-fd", type=int, help="Inherited file descriptor to announce the address on.")
def main(etcd: str, listen: str, name: str, cluster: str, ready_fd: int | None) -> None:
    """Run a controller."""
    logs.setup("controller", name)
    telemetry.setup("controller", name)
    asyncio.run(serve(etcd.split(","), listen, name, cluster, ready_fd))


if __name__ == "__main__":
    main()
