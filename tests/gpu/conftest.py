from __future__ import annotations

import pytest

from tests.device import GPU
from tests.engine.conftest import make_model, model_dir

__all__ = ["make_model", "model_dir"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put many rows into a program: the interpreter's time is by program, not by row."""
    from engine.kernels.gpu import attention  # after `tests.device`

    if not GPU:
        monkeypatch.setattr(attention, "_WRITE_ROWS", 512)
