"""Runs a function in one process per rank. The ranks meet in a store."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import Store

from engine.distributed.rendezvous import join_store, open_store

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["engine.distributed.rendezvous"])

Work = Callable[..., Any]


def start(work: Work, ranks: int, *arguments: Any) -> tuple[Store, list[BaseProcess], list[Connection]]:
    """Start `work(rank, ranks, store, *arguments)` in one process per rank.

    Returns the store, which the caller must keep alive, the processes, and for each rank a connection
    that receives (error, result).
    """
    store, address = open_store("127.0.0.1")
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    for rank in range(ranks):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(theirs, work, rank, ranks, address, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    return store, processes, connections


def run(work: Work, ranks: int, *arguments: Any) -> list[Any]:
    """Run `work` on every rank, and return all results by rank. The first failure ends all ranks."""
    store, processes, connections = start(work, ranks, *arguments)
    results: dict[int, Any] = {}
    try:
        while len(results) < ranks:
            waiting = [end for rank, end in enumerate(connections) if rank not in results]
            for end in wait(waiting, 60) or [None]:
                assert isinstance(end, Connection), "the ranks have not ended in time"
                error, results[connections.index(end)] = end.recv()
                assert error is None, error
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store
    return [results[rank] for rank in range(ranks)]


def _run(
    end: Connection, work: Work, rank: int, ranks: int, address: str, arguments: tuple[Any, ...]
) -> None:
    try:
        end.send((None, work(rank, ranks, join_store(address), *arguments)))
    except Exception:
        end.send((traceback.format_exc(), None))
