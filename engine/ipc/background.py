"""Imports at low priority, so that processes that serve on this machine go first."""

from __future__ import annotations

import importlib
import os
import threading

_NICENESS = 10


def import_in_background(*modules: str) -> None:
    """Import modules at low priority and wait for them. Raises whatever an import raises.

    A process that restarts after a failure needs a core for seconds to import. At that time its streams are
    replayed elsewhere, perhaps on the same cores. The imports run in a thread, and only this thread gets the
    low priority: a process without privileges could not raise its own priority again.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            for module in modules:
                importlib.import_module(module)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
