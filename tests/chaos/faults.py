"""The faults for a running cluster. Each hurts one or two processes, as an accident would."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.chaos.observer import Observer
from tests.cluster import Cluster
from tests.faults.hurt import can_limit_memory, cut_connections, limit_memory


@dataclass(slots=True)
class Injury:
    """A fault that was injected: what it did, the replica and epoch that it hit (if any), how to end it."""

    what: str
    replica: str = ""
    epoch: int = 0
    wake: list[int] = field(default_factory=list)  # stopped processes, to be continued
    wake_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A cluster and its observer; `chance` picks the victims."""

    cluster: Cluster
    observer: Observer
    chance: random.Random
    etcd_stop_s: float = 10.0

    def replica(self) -> str:
        """A replica that is ready."""
        ready = [name for name in self.observer.snapshot.replicas if self.observer.is_ready(name)]
        return self.chance.choice(sorted(ready))

    def injury(self, what: str, replica: str) -> Injury:
        """An injury to a replica's current epoch."""
        return Injury(f"{what} of {replica}", replica, self.observer.snapshot.replicas[replica].epoch)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_engine(scene: Scene) -> Injury:
    """SIGKILL of the engine of any rank."""
    replica = scene.replica()
    shard = scene.chance.choice(scene.observer.shards(replica))
    _kill([shard.engine_pid])
    return scene.injury(f"SIGKILL of the engine of rank {shard.rank}", replica)


def kill_text(scene: Scene) -> Injury:
    """SIGKILL of a leader's text process."""
    replica = scene.replica()
    _kill([scene.observer.shards(replica)[0].text_pid])
    return scene.injury("SIGKILL of the text process", replica)


def kill_worker(scene: Scene) -> Injury:
    """SIGKILL of the worker of any rank."""
    replica = scene.replica()
    shard = scene.chance.choice(scene.observer.shards(replica))
    _kill([scene.observer.snapshot.workers[shard.worker].server_pid])
    return scene.injury(f"SIGKILL of the worker of rank {shard.rank}", replica)


def stop_engine(scene: Scene) -> Injury:
    """SIGSTOP of the engine of the last rank, for good: the process lives, but computes nothing."""
    replica = scene.replica()
    shard = scene.observer.shards(replica)[-1]
    os.kill(shard.engine_pid, signal.SIGSTOP)
    return scene.injury(f"SIGSTOP of the engine of rank {shard.rank}", replica)


def stop_worker(scene: Scene) -> Injury:
    """SIGSTOP of a leader's worker, until long after another worker has taken its place."""
    replica = scene.replica()
    pid = scene.observer.snapshot.workers[scene.observer.shards(replica)[0].worker].server_pid
    os.kill(pid, signal.SIGSTOP)
    injury = scene.injury("SIGSTOP of the leader's worker", replica)
    injury.wake, injury.wake_after_s = [pid], 6.0
    return injury


def kill_gateway(scene: Scene) -> Injury:
    """SIGKILL of a gateway."""
    name = scene.chance.choice(sorted(scene.observer.snapshot.gateways))
    _kill([scene.observer.snapshot.gateways[name].pid])
    return Injury(f"SIGKILL of {name}")


def kill_gateway_and_leader(scene: Scene) -> Injury:
    """SIGKILL of a gateway and of the worker that leads a replica."""
    replica = scene.replica()
    leader = scene.observer.shards(replica)[0]
    name = scene.chance.choice(sorted(scene.observer.snapshot.gateways))
    _kill(
        [
            scene.observer.snapshot.gateways[name].pid,
            scene.observer.snapshot.workers[leader.worker].server_pid,
        ]
    )
    return scene.injury(f"SIGKILL of {name} and of the leader's worker", replica)


def kill_controller(scene: Scene) -> Injury:
    """SIGKILL of the controller."""
    _kill([scene.cluster.process("controller-0")])
    return Injury("SIGKILL of the controller")


def kill_etcd(scene: Scene) -> Injury:
    """SIGKILL of the only etcd."""
    _kill([scene.cluster.process("etcd-0")])
    return Injury("SIGKILL of etcd")


def stop_etcd(scene: Scene) -> Injury:
    """SIGSTOP of the only etcd, for longer than any lease lasts."""
    pid = scene.cluster.process("etcd-0")
    os.kill(pid, signal.SIGSTOP)
    return Injury("SIGSTOP of etcd", wake=[pid], wake_after_s=scene.etcd_stop_s)


def cut_worker(scene: Scene) -> Injury:
    """Break every connection of a leader's worker: to gateways, to the store, to its peers."""
    replica = scene.replica()
    worker = scene.observer.snapshot.workers[scene.observer.shards(replica)[0].worker]
    count = cut_connections(worker.server_pid)
    return Injury(f"{count} connections of the worker that leads {replica} cut")


def cut_gateway(scene: Scene) -> Injury:
    """Break every connection of a gateway: to clients, to workers and to the store."""
    name = scene.chance.choice(sorted(scene.observer.snapshot.gateways))
    count = cut_connections(scene.observer.snapshot.gateways[name].pid)
    return Injury(f"{count} connections of {name} cut")


def limit_engine(scene: Scene) -> Injury:
    """Forbid the engine of a random rank to take more memory."""
    replica = scene.replica()
    shard = scene.chance.choice(scene.observer.shards(replica))
    limit_memory(shard.engine_pid)
    return scene.injury(f"no more memory for the engine of rank {shard.rank}", replica)


def limit_worker(scene: Scene) -> Injury:
    """Forbid the worker of a random rank to take more memory."""
    replica = scene.replica()
    shard = scene.chance.choice(scene.observer.shards(replica))
    limit_memory(scene.observer.snapshot.workers[shard.worker].server_pid)
    return scene.injury(f"no more memory for the worker of rank {shard.rank}", replica)


FAULTS: dict[str, Callable[[Scene], Injury]] = {
    "engine-kill": kill_engine,
    "text-kill": kill_text,
    "worker-kill": kill_worker,
    "engine-stop": stop_engine,
    "worker-stop": stop_worker,
    "gateway-kill": kill_gateway,
    "gateway-leader-kill": kill_gateway_and_leader,
    "controller-kill": kill_controller,
    "etcd-kill": kill_etcd,
    "etcd-stop": stop_etcd,
    "worker-cut": cut_worker,
    "gateway-cut": cut_gateway,
}
if can_limit_memory():
    FAULTS |= {"engine-memory": limit_engine, "worker-memory": limit_worker}
