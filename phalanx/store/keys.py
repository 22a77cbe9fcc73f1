"""Where each record lives in the store: the layout of keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one cluster. `protos/phalanx/internal/v1/state.proto` documents the value at each key."""

    cluster: str = "default"

    @property
    def root(self) -> str:
        """The prefix of all keys that processes watch."""
        return f"/phalanx/{self.cluster}/"

    @property
    def controller_lock(self) -> str:
        """The lock that controllers compete for; its holder is the active controller."""
        return f"{self.root}controller/leader"

    def deployment(self, name: str) -> str:
        """A deployment."""
        return f"{self.root}deployments/{name}"

    def worker(self, worker: str) -> str:
        """A worker's registration."""
        return f"{self.root}workers/{worker}"

    def gateway(self, gateway: str) -> str:
        """A gateway's registration."""
        return f"{self.root}gateways/{gateway}"

    def assignment(self, replica: str) -> str:
        """A replica's assignment. The key's mod_revision is the replica's epoch."""
        return f"{self.root}replicas/{replica}/assignment"

    def ready(self, replica: str) -> str:
        """The last epoch of a replica that became ready."""
        return f"{self.root}replicas/{replica}/ready"

    def shard(self, replica: str, rank: int) -> str:
        """A shard's status."""
        return f"{self.root}replicas/{replica}/shards/{rank}"

    def checkpoints(self, resume_key: str) -> str:
        """The prefix of a request's checkpoint. It is outside `root`, so no watch carries checkpoints."""
        return f"/phalanx.requests/{self.cluster}/{resume_key}/"

    def checkpoint(self, resume_key: str, gateway: str, part: int) -> str:
        """One part of a request's checkpoint, written by one incarnation of a gateway."""
        return f"{self.checkpoints(resume_key)}{gateway}/{part:08d}"
