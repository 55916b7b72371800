"""Programs that tests start in several processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
LAUNCH = (
    # Its `--cpu` starts one process, or calls mpirun; this starts two, which find the CPU by themselves.
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"),
)


def run(*command: Any, folder: Path, launch: tuple[str, ...] = ()) -> None:
    """Run a Python program as on the command line, on the CPU; fails with all that it said."""
    paths = (ROOT / "tests", ROOT / "tests" / "trainers", ROOT)
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def leave() -> None:
    """End a process of a group. Gloo's destructor may wait for a thread that waits for the interpreter: do without it."""
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
