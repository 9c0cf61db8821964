"""No CPU operator reads or writes a byte beyond a tensor that it is given; see guard_pages.py."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_kernels._library import LOADED

SCRIPT = Path(__file__).with_name("guard_pages.py")

pytestmark = [
    pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install ."),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect"),
]


def test_every_operator_stays_within_its_tensors():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["guards"] == [signal.SIGSEGV, signal.SIGSEGV]
    assert len(found["compiled"]) >= 24
    assert set(found["compiled"]) <= set(found["ran"])
