"""How long to wait before the next try when the store does not answer."""

from __future__ import annotations

import random

_FIRST_S, _CAP_S = 0.1, 1.0


def back_off(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row: exponential, capped, with full jitter.

    The jitter keeps the clients of a store that returns from reaching it all at once.
    """
    return random.uniform(0, min(_CAP_S, _FIRST_S * 2.0 ** min(failures - 1, 10)))
