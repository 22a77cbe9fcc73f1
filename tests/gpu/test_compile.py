from __future__ import annotations

import os
import subprocess
import sys


def test_every_kernel_compiles_for_a_gpu() -> None:
    command = [sys.executable, "-m", "tests.gpu.compile_kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
