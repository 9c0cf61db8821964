"""Every GPU kernel compiles for every architecture and is what it promises; none takes or moves more than recorded.

``gates/promises.py`` says how an operator is added, ``make gpu-table`` records in ``kernels.json`` what has changed.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from gates import budgets, choices, inventory, judge, measure, page, report, table
from gates.cases import OPERATORS

from mlip_kernels import _cuda_choices

ROOT = Path(__file__).parents[2]
COMPILED = [(backend, arch) for backend, architectures in measure.ARCHITECTURES.items() for arch in architectures]
EXECUTED = [(backend, arch) for backend in measure.ARCHITECTURES for arch in measure.EXECUTED]
SOURCES = {"triton": inventory.triton_kernels, "cuda": inventory.cuda_kernels}


def need(backend: str, arch: int, *, execute: bool = False) -> None:
    """Skip where the kernels cannot be compiled for ``arch`` (or executed)."""
    if reason := measure.missing(backend, execute=execute):
        pytest.skip(reason)
    if backend == "cuda" and not measure.shipped(arch):
        pytest.skip(f"needs mlip_kernels/_cuda.so built for sm_{arch} (TORCH_CUDA_ARCH_LIST)")


def need_compiler_of_the_table(backend: str) -> None:
    """Skip where kernels cannot be compared with the table because another compiler made them."""
    made_with, here = table.load().made_with[backend], measure.compiler(backend)
    if here != made_with:
        pytest.skip(f"needs {made_with}, with which the table was made, to compare with it; here is {here}")


def fail_on(complaints: list[str], remedy: str) -> None:
    assert not complaints, "\n".join(["", *complaints, remedy])


@pytest.mark.compiles_nothing
@pytest.mark.parametrize("backend", SOURCES)
def test_every_kernel_in_the_sources_has_an_entry(backend):
    entries = {kernel.name for entry in OPERATORS for kernel in entry.kernels if backend in kernel.backends}
    assert SOURCES[backend]() == entries


@pytest.mark.compiles_nothing
@pytest.mark.parametrize(("backend", "arch"), COMPILED)
def test_the_table_has_every_kernel(backend, arch):
    entries = {
        (entry.name, kernel.name) for entry in OPERATORS for kernel in entry.kernels if backend in kernel.backends
    }
    content = table.load()
    compiled = {(key.operator, key.kernel) for key in table.of(content.compiled, backend=backend, arch=arch)}
    assert compiled == entries
    if arch in measure.EXECUTED:
        executed = {(key.operator, key.kernel) for key in table.of(content.traffic, backend=backend, arch=arch)}
        assert executed >= entries


@pytest.mark.parametrize("arch", measure.ARCHITECTURES["cuda"])
def test_the_cases_launch_every_instance_that_is_shipped(arch):
    need("cuda", arch)
    launched = {row.kernel + row.instance for row in measure.compiled("cuda", arch).values()}
    assert measure.shipped(arch).keys() == launched


@pytest.mark.parametrize(("backend", "arch"), COMPILED)
def test_machine_code_is_what_the_kernels_promise(backend, arch):
    need(backend, arch)
    fail_on(judge.promises(measure.compiled(backend, arch).values(), OPERATORS), "What they promise is in gates/cases.")


@pytest.mark.parametrize(("backend", "arch"), COMPILED)
def test_registers_and_shared_memory_stay_within_budget(backend, arch):
    need(backend, arch)
    need_compiler_of_the_table(backend)
    recorded = table.of(table.load().compiled, backend=backend, arch=arch)
    fail_on(judge.against_table(measure.compiled(backend, arch), recorded), judge.REGENERATE)


@pytest.mark.parametrize(("backend", "arch"), EXECUTED)
def test_kernels_move_and_compute_what_is_necessary(backend, arch):
    need(backend, arch, execute=True)
    complaints = [line for row in measure.traffic(backend, arch).values() for line in judge.necessities(row)]
    fail_on(complaints, "The formulas are in gates/cases.")


@pytest.mark.parametrize(("backend", "arch"), EXECUTED)
def test_traffic_does_not_grow(backend, arch):
    need(backend, arch, execute=True)
    need_compiler_of_the_table(backend)
    recorded = table.of(table.load().traffic, backend=backend, arch=arch)
    fail_on(judge.against_table(measure.traffic(backend, arch), recorded), judge.REGENERATE)


@pytest.mark.parametrize("backend", measure.ARCHITECTURES)
def test_a_unit_of_work_keeps_to_its_budget(backend):
    need(backend, budgets.ARCH, execute=True)
    need_compiler_of_the_table(backend)
    measured = measure.slopes(backend, budgets.BUDGETS)
    fail_on(judge.slopes(backend, measured, table.load().slopes, budgets.BUDGETS), judge.REGENERATE)


@pytest.mark.compiles_nothing
def test_every_budget_was_measured():
    measured = {key.unit for key in table.load().slopes}
    assert measured == {budget.unit for budget in budgets.BUDGETS}


@pytest.mark.compiles_nothing
def test_auto_takes_what_the_model_of_the_table_says():
    now = _cuda_choices.load()
    assert choices.proposed(table.load(), now, "2026-01-01") == now, "run: make gpu-choices"


@pytest.mark.compiles_nothing
def test_the_page_is_made_from_the_table():
    assert page.PATH.read_text(encoding="utf-8") == page.markdown(table.load()), "run: make gpu-table"


@pytest.mark.compiles_nothing
def test_the_page_has_one_row_for_each_kernel():
    rows = re.findall(r"^\| `(\w+)` \|", page.markdown(table.load()), re.MULTILINE)
    assert sorted(rows) == sorted({kernel.name for entry in OPERATORS for kernel in entry.kernels})


@pytest.mark.compiles_nothing
@pytest.mark.parametrize(
    ("part", "column", "value", "shown"),
    [("compiled", "registers", 256, "256"), ("compiled", "spills", 7, "7"), ("traffic", "ratio", 99.0, "99.00")],
)
@pytest.mark.parametrize("place", [0, -1])
def test_the_page_shows_the_worst_of_a_kernel_and_where_it_is(part, column, value, shown, place):
    content = table.load()
    rows = {key: dict(row) for key, row in getattr(content, part).items()}
    mine = [key for key in rows if key.kernel == "spectral_filtered_kernel"]
    key = mine[place]
    rows[key][column] = value
    (line,) = (
        line
        for line in page.markdown(replace(content, **{part: rows})).splitlines()
        if line.startswith(f"| `{key.kernel}` |")
    )
    backend = report.BACKENDS[key.backend]
    assert f"| {shown} ({backend} sm_{key.arch}, {key.problem} {key.dtype}) |" in line


@pytest.mark.compiles_nothing
def test_the_report_has_a_row_for_each_kernel_backend_and_architecture():
    content = table.load()
    wanted = {(key.operator, key.kernel, key.backend, key.arch) for key in content.compiled}
    shown = report.markdown(content).splitlines()
    assert len([line for line in shown if re.match(r"\| `\w+` \| (Triton|CUDA C\+\+) \| sm_\d+ \| \d", line)]) == len(
        wanted
    )


@pytest.mark.compiles_nothing
def test_the_readme_links_the_page():
    assert f"({page.PATH.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")
