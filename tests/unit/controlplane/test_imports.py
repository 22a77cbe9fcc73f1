from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}


def test_a_controller_loads_nothing_of_the_models_world(tmp_path: Path) -> None:
    """Nor does it when it checks a model."""
    code = (
        "import sys, controlplane.main, phalanx.cli.local.embedded_etcd\n"
        "from controlplane.validation import check_model\n"
        "from phalanx.runtime.errors import PhalanxError\n"
        "try:\n"
        f"    check_model({str(tmp_path)!r}, 1, 1)\n"
        "except PhalanxError as error:\n"
        "    print(error.reason, *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, *loaded = done.stdout.split()
    assert reason == "INVALID_MODEL"
    assert "grpc" in loaded
    assert HEAVY.isdisjoint(loaded)
