from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HELPERS = {"_above", "_head_norm", "_largest", "_mix", "_order", "_read"}  # of kernels


@pytest.mark.timeout(600)
def test_all_that_steps_launch_compiles_for_a_gpu_and_at_the_start() -> None:
    command = [sys.executable, "-m", "tests.gpu.compile_kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said["not_launched"]) == HELPERS
    assert not said["late"], "a request would wait for the compiler, and the engine would look hung"
