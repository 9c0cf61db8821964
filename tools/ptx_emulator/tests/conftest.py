"""Records what the emulator executes in these tests, so that the last of them can say what was never executed.

With pytest-xdist, ``--dist loadgroup`` keeps all of them in one process, which that takes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import instruction_coverage
import pytest
from ptx_emulator import Emulator

HERE = Path(__file__).resolve().parent
LAST = "test_emulator_coverage.py"


@pytest.fixture(scope="session", autouse=True)
def _record_instructions():
    original = Emulator.launch

    @functools.wraps(original)
    def launch(*arguments, **options):
        found = original(*arguments, **options)
        instruction_coverage.record(found.opcodes)
        return found

    Emulator.launch = launch
    yield
    Emulator.launch = original


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """The coverage test comes last, and knows whether all the others are there."""
    last = [item for item in items if item.path.name == LAST]
    items[:] = [item for item in items if item.path.name != LAST] + last
    config.stash[COLLECTED] = {item.path for item in items}
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.xdist_group("ptx_emulator"))


def pytest_collectreport(report):
    """A file that skips as a whole, for want of Triton, counts as run."""
    if report.skipped:
        SKIPPED_FILES.add(Path(report.nodeid).name)


def pytest_deselected(items):
    for item in items:
        if item.path.parent == HERE:
            item.config.stash[DESELECTED] = True


COLLECTED = pytest.StashKey[set]()
DESELECTED = pytest.StashKey[bool]()
SKIPPED_FILES: set[str] = set()


@pytest.fixture
def whole_suite(request):
    """Skips unless every test of this folder runs in this session, in this process."""
    stash = request.config.stash
    files = {file for file in HERE.glob("test_*.py") if file.name not in SKIPPED_FILES}
    chosen = any("::" in argument for argument in request.config.args)
    if not files <= stash[COLLECTED] or stash.get(DESELECTED, False) or chosen:
        pytest.skip(f"needs every test of the emulator in one session: pytest {HERE}")
    if hasattr(request.config, "workerinput") and request.config.getoption("dist") != "loadgroup":
        pytest.skip("needs every test in one process: pytest -n 0, or --dist loadgroup")
