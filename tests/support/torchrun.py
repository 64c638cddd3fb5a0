"""Scripts and modules started by torchrun, within a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
SAMPLES = TESTS.parent / "samples"
SECONDS = 600


def torchrun(
    *command: str | Path,
    processes: int = 2,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, in several processes of one thread each.

    Args:
        command: what is run, with its arguments.
        processes: how many.
        options: of torchrun.
        environment: variables beside those of this process.
        check: fail where the exit code is not 0.
    """
    paths = os.pathsep.join(map(str, (TESTS, SAMPLES, SAMPLES / "fashion_dit")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*start, f"--nproc-per-node={processes}", *options, *map(str, command)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-8000:]
    return done
