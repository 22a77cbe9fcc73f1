"""The wait before the next try when the store does not answer."""

from __future__ import annotations

import random

_FIRST_S, _CAP_S = 0.1, 1.0


def back_off(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row: exponential, capped, with full jitter.

    Without the jitter, all clients would reach a returning store at the same moment.
    """
    return random.uniform(0, min(_CAP_S, _FIRST_S * 2.0 ** min(failures - 1, 10)))
