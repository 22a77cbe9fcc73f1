"""Imports that let whoever serves on this machine go first."""

from __future__ import annotations

import importlib
import os
import threading

_NICENESS = 10


def import_in_background(*modules: str) -> None:
    """Import modules at low priority, and return when they are there. Raises what importing them raises.

    What is started anew after a failure spends seconds of a core on imports just when the streams that it
    served are replayed elsewhere, perhaps on the same cores. The priority is that of a thread and ends with
    it: without privileges a process cannot raise its own again.
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
