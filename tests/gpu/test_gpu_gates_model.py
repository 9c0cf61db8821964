"""The model of times, the budgets of instructions and the choices that are made of both, on counts made up here."""

from dataclasses import replace

import pytest
from gates import budgets, choices, judge, model, report, table
from gates.budgets import Budget, Limits, Seconds
from gates.cases import OPERATORS
from gates.model import A100, H100, H200, issue_share, times
from gates.records import Slope, SlopeKey

pytestmark = pytest.mark.compiles_nothing

NOTHING = {"instructions": 0, "moved": 0, "waves": 0, "macs_executed": 0, "warpgroup_products": 0, "tf32_products": 0}
FULL = {**NOTHING, "warps": 8, "resident": 6}  # 48 warps
SLOPE = Slope(
    backend="triton", unit="pair", operator=OPERATORS[0].name, instructions=100.0, moved=0.0, waves=0.0, barriers=0.0,
    macs_executed=0.0, warpgroup_products=0.0, tf32_products=0.0, warps=8, resident=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "needed", "seconds", "bound"),
    [
        ({"instructions": 1e9}, 0, 1e9 / (132 * 4 * 1.98e9 * 0.7), "issue"),
        ({}, 4.3e9, 1e-3, "DRAM"),
        ({"moved": 5.5e9}, 4.3e8, 1e-3, "L2"),
        ({"waves": 132 * 1.98e6}, 0, 1e-3, "shared memory"),
        ({"macs_executed": 350e9, "warpgroup_products": 1}, 0, 1e-3, "tensor cores"),
        ({"macs_executed": 350e9}, 0, 1e-3 / 0.62, "tensor cores"),  # by mma.sync
    ],
)
def test_the_slowest_resource_binds(counts, needed, seconds, bound):
    found = times({**FULL, **counts}, 1, needed, H200)
    assert found.total == pytest.approx(seconds)
    assert found.bound == bound


def test_tf32_multiplies_at_half_the_rate_and_more_work_takes_longer():
    half, tf32 = ({**FULL, "macs_executed": 1e9, "tf32_products": count} for count in (0, 1))
    assert times(tf32, 1, 0, H200).total == pytest.approx(2 * times(half, 1, 0, H200).total)
    assert times(tf32, 3, 0, H200).total == pytest.approx(3 * times(tf32, 1, 0, H200).total)


def test_more_resident_warps_fill_more_issue_slots():
    shares = [issue_share(warps) for warps in (1, 4, 8, 10, 12, 16, 24, 32, 48, 64)]
    assert shares == sorted(shares)
    assert issue_share(8) == 0.375
    assert issue_share(10) == pytest.approx(0.4375)
    assert issue_share(64) == issue_share(48) < 1


def test_gpus_are_told_apart():
    streaming, counting = ({**FULL, "instructions": count} for count in (0, 1e9))
    assert times(streaming, 1, 1e9, H100).total > times(streaming, 1, 1e9, H200).total
    assert times(counting, 1, 0, H100) == times(counting, 1, 0, H200)
    assert times(counting, 1, 0, A100).total > times(counting, 1, 0, H100).total


def test_every_kernel_of_the_table_can_be_modelled():
    content, entries = table.load(), {operator.name: operator for operator in OPERATORS}
    for gpu in model.GPUS:
        rows = [row for key, row in content.traffic.items() if key.arch == gpu.arch and key.kernel != "*"]
        assert rows
        assert all(model.kernel_times(entries[row["operator"]], row, gpu).total > 0 for row in rows)


def budget(limit: Limits | Seconds) -> Budget:
    return replace(
        budgets.BUDGETS[0], unit=SLOPE.unit, operator=SLOPE.operator, limit=limit, amount=1_000_000, bytes=0.0
    )


def measured(**instructions: float) -> dict[SlopeKey, Slope]:
    rows = [replace(SLOPE, backend=backend, instructions=count) for backend, count in instructions.items()]
    return {row.key: row for row in rows}


def recorded(**instructions: float) -> dict[SlopeKey, dict[str, object]]:
    return {key: row.fields() for key, row in measured(**instructions).items()}


@pytest.mark.parametrize(
    ("triton", "cuda", "met"), [(100, 200, "yes"), (200, 100, "yes"), (101, 200, "**no**"), (90, 201, "**no**")]
)
def test_the_better_and_the_other_backend_have_limits_of_their_own(triton, cuda, met):
    line = report.budget_line(
        budget(Limits(100, 200)), budgets.by_backend(recorded(triton=triton, cuda=cuda), budget(None))
    )
    assert line.startswith(f"| pair | {triton} | {cuda} | 100 | 200 | {met} |")


def test_a_limit_may_be_a_time_of_the_model():
    slots = 132 * 4 * 1.98e9 * issue_share(16)
    wanted = budget(Seconds(1e6 * 100 / slots, "the usual way"))
    assert wanted.kept(recorded(triton=200, cuda=100) and budgets.by_backend(recorded(triton=200, cuda=100), wanted))
    assert not wanted.kept(budgets.by_backend(recorded(triton=200, cuda=103), wanted))


def complaints(now, before, limit=Limits(100, 200)):  # noqa: B008
    return judge.slopes("triton", measured(**now), recorded(**before), [budget(limit)])


def test_a_unit_of_work_that_costs_more_is_noticed():
    assert not complaints({"triton": 100}, {"triton": 50, "cuda": 60})  # within its budget
    (told,) = complaints({"triton": 102}, {"triton": 50, "cuda": 60})
    assert told == "pair (triton): takes 102 instructions, was 50; 100 are allowed"
    assert not complaints({"triton": 301}, {"triton": 300, "cuda": 60})  # missed before, and no worse
    (told,) = complaints({"triton": 304}, {"triton": 300, "cuda": 60})
    assert "was 300; 300 are allowed" in told
    (told,) = complaints({"triton": 102}, {"triton": 100}, limit=Seconds(1.0, "the usual way"))
    assert "100 are allowed" in told


def test_a_unit_of_work_that_comes_or_goes_is_noticed():
    (told,) = complaints({"triton": 100}, {"cuda": 60})
    assert told == "pair (triton): is not in the table"
    (told,) = complaints({}, {"triton": 60})
    assert "launches nothing now" in told
    assert not complaints({}, {"cuda": 60})


def rows_of(content, name):
    return {arch: rows[name] for arch, rows in content.items() if name in rows}


def test_the_model_proposes_what_is_clearly_faster():
    name, content = "spectral_separable", table.load()
    dtypes = ("float32", "float16", "bfloat16")
    entry = next(operator for operator in OPERATORS if operator.name == name)

    def with_instructions(**counts):
        changed = {
            key: {**row, "instructions": counts[key.backend], "moved": 1, "macs_executed": 1, "waves": 1, "distinct": 1}
            | {"resident": 6, "warps": 8}
            for key, row in content.traffic.items()
            if key.operator == name and key.problem == next(iter(entry.problems))
        }
        return replace(content, traffic={**content.traffic, **changed})

    def proposed(now, basis="modelled", **counts):
        row = {**dict.fromkeys(dtypes, now), "basis": basis, "date": "2026-01-02"}
        before = {arch: {name: row} for arch in ("sm_80", "sm_90")}
        return rows_of(choices.proposed(with_instructions(**counts), before, "2026-03-04"), name)

    slow, slower = 1_000_000, 1_050_000
    kept = {**dict.fromkeys(dtypes, "triton"), "basis": "modelled", "date": "2026-01-02"}
    turned = {**dict.fromkeys(dtypes, "cuda"), "basis": "modelled", "date": "2026-03-04"}
    assert proposed("triton", triton=slower, cuda=slow) == {"sm_80": kept, "sm_90": kept}
    assert proposed("triton", triton=2 * slow, cuda=slow) == {"sm_80": turned, "sm_90": turned}
    assert proposed("triton", "measured", triton=2 * slow, cuda=slow)["sm_90"]["bfloat16"] == "triton"


def test_the_host_decides_where_kernels_are_short():
    content = table.load()
    entry = next(operator for operator in OPERATORS if operator.name == "merging_weighted_mean")
    costs = choices.costs(content, entry, H200, "bf16")
    assert costs["triton"] >= choices.HOST["triton"][0] > costs["cuda"]
