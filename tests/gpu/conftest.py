from __future__ import annotations

import pytest

from tests.device import GPU
from tests.engine.conftest import make_model, model_dir

__all__ = ["make_model", "model_dir"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of many rows as for one of few."""
    from engine.kernels.gpu import attention  # after `tests.device`

    if not GPU:
        monkeypatch.setattr(attention, "_WRITE_ROWS", 512)
