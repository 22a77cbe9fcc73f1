"""How the ranks of a replica find each other: the store, the plan connections, the collectives.

Rank 0 opens a store and a plan hub before it loads; the other ranks connect after they have loaded. Imports
torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.grid import Grid
from engine.weights.model_config import ModelConfig

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

    from engine.distributed.channel import PlanHub, PlanLink
    from engine.distributed.parallel import Parallel
    from engine.kernels.interface import Kernels


def open_group(
    engine: EngineConfig, announce: Callable[[str], None], undo: ExitStack
) -> tuple[Store | None, PlanHub | None]:
    """On rank 0 of several ranks: listen for the others and announce the address. `undo` closes the hub."""
    if engine.rank != 0 or engine.tp * engine.pp == 1:
        return None, None
    from engine.distributed.channel import PlanHub
    from engine.distributed.rendezvous import open_store

    store, address = open_store(engine.host)
    hub = PlanHub(engine.host, engine.tp * engine.pp, engine.epoch)
    undo.callback(hub.close)
    store.set("plans", hub.address)
    announce(address)
    return store, hub


def join_group(engine: EngineConfig, meet: Callable[[], str]) -> tuple[Store, PlanLink]:
    """On every rank except 0: connect to rank 0's store and to its plan hub."""
    from engine.distributed.channel import PlanLink
    from engine.distributed.rendezvous import join_store

    store = join_store(meet())
    return store, PlanLink(store.get("plans").decode(), engine.epoch, engine.rank)


def connect_collectives(
    engine: EngineConfig, config: ModelConfig, kernels: Kernels, store: Store | None
) -> Parallel:
    """Form the groups in which this rank exchanges tensors. Every rank must call this."""
    from engine.distributed.rendezvous import connect

    grid = Grid(engine.tp, engine.pp, engine.rank)
    hidden_bytes = engine.batch_tokens * config.hidden_size * kernels.activation_dtype.itemsize
    return connect(grid, store, engine.host, kernels.device, hidden_bytes)
