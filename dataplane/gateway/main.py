"""The gateway process: `python -m dataplane.gateway.main`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import uuid

import click
from aiohttp import web

from dataplane.gateway.gateway import Gateway
from dataplane.gateway.http import application
from dataplane.gateway.server import SERVICE, InferenceService
from phalanx.runtime import logs, ready, rpc, telemetry
from phalanx.store.etcd import EtcdStore
from phalanx.store.keys import Keys
from phalanx.store.records import GatewayRecord
from phalanx.store.registration import Registration
from phalanx.v1 import inference_pb2_grpc

log = logging.getLogger(__name__)
_GRACE_S = 1.0


async def serve(
    etcd: list[str],
    grpc_address: str,
    http_address: str,
    name: str,
    cluster: str,
    ready_fd: int | None,
    drain_s: float,
    resumable: bool,
) -> None:
    """Serve clients until SIGTERM or SIGINT; then drain for up to `drain_s` seconds.

    Clients whose streams are still open after that resume them at another gateway.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    keys, incarnation = Keys(cluster), uuid.uuid4().hex
    store = EtcdStore(etcd)
    gateway = Gateway(name, incarnation, store, keys, resumable=resumable)

    server = rpc.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway), server)
    health = rpc.add_health_and_reflection(server, [SERVICE])
    grpc_bound = rpc.bind(server, grpc_address)
    runner = web.AppRunner(
        application(gateway), handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE_S
    )
    await runner.setup()
    http_host, _, http_port = http_address.rpartition(":")
    site = web.TCPSite(runner, http_host, int(http_port))
    await site.start()
    http_url = f"http://{http_host}:{runner.addresses[0][1]}"
    record = GatewayRecord(name, incarnation, socket.gethostname(), grpc_bound, http_url, os.getpid())
    registration = Registration(store, keys, record)

    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(gateway.run())
            registering = group.create_task(registration.run())
            informed = group.create_task(_serve_when_informed(gateway, health))
            await server.start()
            ready.announce(ready_fd, {"grpc": grpc_bound, "http": http_url})
            log.info("serving", extra={"grpc": grpc_bound, "http": http_url})
            await stop.wait()
            log.info("stopping")
            # Cancel the task first, or it registers this gateway again.
            registering.cancel()
            await asyncio.wait([registering])
            await registration.close()
            await rpc.set_serving(health, ["", SERVICE], serving=False)
            await gateway.drain(drain_s)
            await server.stop(_GRACE_S)
            await runner.cleanup()
            informed.cancel()
            serving.cancel()
    finally:
        await store.close()
        telemetry.shutdown()


async def _serve_when_informed(gateway: Gateway, health: rpc.Health) -> None:
    """Report SERVING once the cluster's state is known."""
    await gateway.informed.wait()
    await rpc.set_serving(health, ["", SERVICE])


@click.command()
@click.option("--etcd", required=True, help="Endpoints of etcd: host:port, separated by commas.")
@click.option("--grpc", "grpc_address", default="127.0.0.1:0", show_default=True, help="Where to serve gRPC.")
@click.option("--http", "http_address", default="127.0.0.1:0", show_default=True, help="Where to serve HTTP.")
@click.option("--name", default="gateway-0", show_default=True, help="This gateway's name.")
@click.option("--cluster", default="default", show_default=True, help="The cluster's name in the store.")
@click.option(
    "--drain-s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds for running requests to finish after SIGTERM.",
)
@click.option(
    "--resumable/--no-resumable",
    default=True,
    show_default=True,
    help="Whether clients can resume streams at another gateway; leaders and etcd then keep their output.",
)
@click.option("--ready-fd", type=int, help="Inherited descriptor to announce the addresses on.")
def main(
    etcd: str,
    grpc_address: str,
    http_address: str,
    name: str,
    cluster: str,
    ready_fd: int | None,
    drain_s: float,
    resumable: bool,
) -> None:
    """Run a gateway."""
    logs.setup("gateway", name)
    telemetry.setup("gateway", name)
    asyncio.run(
        serve(etcd.split(","), grpc_address, http_address, name, cluster, ready_fd, drain_s, resumable)
    )


if __name__ == "__main__":
    main()
