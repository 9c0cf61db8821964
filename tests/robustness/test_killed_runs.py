"""A run that is killed again and again ends with the weights and the logs of one that was not.

``KILL_CYCLES=200 python -m pytest tests/robustness/test_killed_runs.py``, or ``make kill-cycles``, kills more often.
"""

import os
import subprocess
import sys
from pathlib import Path

CYCLES = int(os.environ.get("KILL_CYCLES", "10"))


def test_killed_runs_end_like_a_whole_one(tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(CYCLES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{CYCLES} kills" in finished.stdout
