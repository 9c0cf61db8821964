"""The table is the same on every machine with its compilers, and rows of single operators can be remade."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gates import budgets, measure, table, workers
from gates.cases import OPERATORS
from gates.measure import Run, compiled_rows
from gates.promises import Kernel, Operator, Problem
from gates.records import Key

ROOT = Path(__file__).parents[2]
SAMPLES = Path(__file__).with_name("gates_samples") / "kernels.py"
OPERATOR = "merging_weighted_mean_backward"  # one small kernel in few instances
ROWS = f"""
import json
from gates import budgets, measure, table, workers
rows = measure.compiled("triton", 80, table.launching(["{OPERATOR}"]))
print(json.dumps([[*key, row.fields()] for key, row in rows.items()]))
"""


def need_triton():
    if reason := measure.missing("triton"):
        pytest.skip(reason)


def kernels_at(folder):
    """The sample kernels, as a module that lies in ``folder``."""
    folder.mkdir()
    spec = importlib.util.spec_from_file_location("kernels", shutil.copy(SAMPLES, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_for(kernels, *labels):
    """Rows of a kernel specialised for each of these numbers, and the cubins."""
    from emulated_cuda import EmulatedCuda

    operator = Operator("copies", lambda p: None, lambda p: 0, (Kernel("labelled_copy_kernel", lambda p: 0),), {}, {})
    runs = []
    for label in labels:
        with EmulatedCuda("triton", 80, execute=False) as cuda:
            launch = kernels.labelled_copy_kernel[(1,)]
            cuda.run(lambda x, y, n=label, f=launch: f(x, y, n, block=128), torch.ones(128), torch.ones(128))
        runs.append(Run(operator, f"label {label}", Problem({}, "fp32", 80), cuda.launches))
    return compiled_rows(runs, "triton", 80), [run.launches[0].cubin for run in runs]


def test_rows_do_not_depend_on_what_was_compiled_elsewhere_before(tmp_path, monkeypatch):
    """Triton's cache gives what was compiled from the same source in another folder, whose path is in the cubin."""
    need_triton()
    import triton

    multiple, other = 16, 17  # what Triton specialises a number for is whether it is a multiple of 16
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    rows, (first, second) = compiled_for(kernels_at(tmp_path / "here"), multiple, other)
    assert first == second
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "another cache"))
    compiled_for(kernels_at(tmp_path / "elsewhere"), multiple)
    mixed, (first, second) = compiled_for(kernels_at(tmp_path / "there"), multiple, other)
    assert first != second
    assert mixed == rows


def test_two_checkouts_with_empty_caches_make_the_rows_of_the_table(tmp_path):
    need_triton()
    found = []
    for checkout in (tmp_path / "a", tmp_path / "another folder" / "with a long name"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for folder in ("mlip_kernels", "_build", "csrc/cuda", "tests/gpu", "tools/ptx_emulator"):
            shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored)
        paths = os.pathsep.join(str(checkout / folder) for folder in (".", "tests/gpu", "tools/ptx_emulator"))
        caches = {"TRITON_CACHE_DIR": str(checkout / "triton"), "XDG_CACHE_HOME": str(checkout / "cache")}
        environment = {**os.environ, **caches, "PYTHONPATH": paths}
        command = [sys.executable, "-c", ROWS]
        done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    content = table.load()
    if measure.compiler("triton") == content.made_with["triton"]:
        recorded = table.of(content.compiled, backend="triton", arch=80, operators=table.launching([OPERATOR]))
        assert {Key(*row[:-1]): row[-1] for row in found[0]} == recorded


def test_rows_measured_in_several_processes_are_those_of_the_table():
    for backend in measure.ARCHITECTURES:
        if reason := measure.missing(backend, execute=True):
            pytest.skip(reason)
    recorded, operators = table.load(), table.launching([OPERATOR])
    if {backend: measure.compiler(backend) for backend in measure.ARCHITECTURES} != recorded.made_with:
        pytest.skip("needs the compilers that the table was made with")
    remade = table.replaced(recorded, table.measured(operators), operators)
    assert [list(rows) for rows in parts(remade)] == [list(rows) for rows in parts(recorded)]
    assert remade == recorded


@pytest.mark.compiles_nothing
def test_every_row_is_measured_by_one_piece_of_work():
    pieces = list(workers.pieces(OPERATORS))
    assert len(set(pieces)) == len(pieces)
    by_kind = {kind: [piece for piece in pieces if piece.kind == kind] for kind in table.PARTS}
    assert len(by_kind["slopes"]) == 2 * len(budgets.BUDGETS)
    assert len(by_kind["traffic"]) == 2 * len(measure.EXECUTED) * len(OPERATORS)
    assert len(by_kind["compiled"]) == sum(map(len, measure.ARCHITECTURES.values())) * len(OPERATORS)


def named(operators):
    return [operator.name for operator in operators]


@pytest.mark.compiles_nothing
def test_operators_are_found_by_their_own_names_and_by_those_of_their_kernels():
    assert named(table.launching([OPERATOR])) == [OPERATOR]
    assert named(table.launching(["weighted_mean_backward_kernel"])) == [OPERATOR]
    assert named(table.launching([OPERATOR, "merging_match_kernel"])) == [OPERATOR, "merging_match"]
    with pytest.raises(ValueError, match="no operator and no kernel is called nothing"):
        table.launching([OPERATOR, "nothing"])


@pytest.mark.compiles_nothing
def test_rows_of_one_operator_are_replaced_and_all_others_stay():
    """What is no longer launched goes, what is new comes in, in the place where the whole table would have it."""
    recorded = table.load()
    operators = table.launching([OPERATOR])
    mine = [key for key in recorded.compiled if key.operator == OPERATOR]
    rows = {key: {**recorded.compiled[key], "registers": 1} for key in mine[1:]}
    rows[mine[0]._replace(problem="new")] = recorded.compiled[mine[0]]
    changed = table.replaced(recorded, replace(recorded, compiled=rows, traffic={}, slopes={}), operators)
    assert {key: row for key, row in changed.compiled.items() if key.operator == OPERATOR} == rows
    for before, after in ((recorded.compiled, changed.compiled), (recorded.traffic, changed.traffic)):
        others = [(key, row) for key, row in before.items() if key.operator != OPERATOR]
        assert [(key, row) for key, row in after.items() if key.operator != OPERATOR] == others


@pytest.mark.compiles_nothing
def test_rows_come_into_the_places_that_the_whole_table_has_for_them():
    recorded, operators = table.load(), table.launching(["weighted_mean_finish_forward_kernel", OPERATOR])
    mine = [{key: row for key, row in rows.items() if row["operator"] in named(operators)} for rows in parts(recorded)]
    remade = table.replaced(recorded, table.Table(recorded.made_with, *mine), operators)
    assert [list(rows) for rows in parts(remade)] == [list(rows) for rows in parts(recorded)]


def parts(content):
    return content.compiled, content.traffic, content.slopes


@pytest.mark.compiles_nothing
def test_rows_of_other_compilers_do_not_come_into_the_table():
    recorded = table.load()
    with pytest.raises(ValueError, match="remake all of it"):
        table.replaced(recorded, replace(recorded, made_with={"triton": "another"}), OPERATORS[:1])
