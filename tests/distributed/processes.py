"""A test's function in several processes of torchrun, which talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
SECONDS = 240


def run_in_processes(script: Path, *arguments: str, count: int = 2) -> str:
    """What a script prints under torchrun, with the tests and samples to import from.

    Args:
        script: calls `torch.distributed.init_process_group("gloo")` itself.
        arguments: of it.
        count: of processes, on this machine.

    Raises:
        AssertionError: a process failed; with what all of them wrote.
    """
    samples = TESTS.parent / "samples"
    paths = [str(TESTS), str(samples), str(samples / "fashion_dit")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout
