"""1,000 inputs of the fuzzer, and what it has to notice. More: ``make fuzz``."""

import subprocess
from pathlib import Path

import pytest
import torch

import mlip_kernels as mk
from mlip_kernels.testing import threads
from robustness import compare, fuzz
from robustness.cases import OPERATORS, Case
from robustness.draws import Draw

SEED, INPUTS, BLOCK = 0, 1000, 50


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems would spend their time waiting for a second one."""
    with threads(1):
        yield


@pytest.mark.parametrize("first", range(0, INPUTS, BLOCK))
def test_every_input_is_computed_right(first):
    for number in range(first, first + BLOCK):
        fuzz.check(SEED, number)


def test_every_operator_is_drawn():
    drawn = {Draw(f"{SEED}/{number}").choice(tuple(OPERATORS)) for number in range(INPUTS)}
    assert drawn == set(OPERATORS)


def test_an_input_is_the_same_every_time():
    cases = [OPERATORS["spectral_filter"](Draw("7/8")).arguments for _ in range(2)]
    assert cases[0]["x"].stride() == cases[1]["x"].stride()
    assert torch.equal(cases[0]["x"].nan_to_num(), cases[1]["x"].nan_to_num())


def mean(x, weight=None, prefix_tokens=0):
    return mk.weighted_mean(x, weight, prefix_tokens=prefix_tokens)


def slightly_wrong(x, **options):
    return mean(x, **options) * (1 + 1e-4)


def writes_to_its_input(x, **options):
    return mean(x.detach().add_(0) * 1 if not x.requires_grad else x, **options)


def scales_its_gradient(x, **options):
    y = mean(x, **options)
    return 2 * y - y.detach() if y.requires_grad else y


def mixes_samples(x, **options):
    return mean(x + 0 * x.sum(0), **options)


def reads_a_row_too_far(x, **options):
    y = mean(x, **options).clone()
    y.view(-1)[-1] = torch.nan
    return y


def narrows(x, **options):
    return mean(x, **options).half()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (slightly_wrong, "result 0: error"),
        (writes_to_its_input, "x: was written to"),
        (scales_its_gradient, "gradient x: error"),
        (mixes_samples, "beside a spoilt one"),
        (reads_a_row_too_far, "not finite where the truth is"),
        (narrows, "where the reference has"),
    ],
)
def test_a_broken_operator_is_noticed(broken, message):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    case = Case("weighted_mean", {"x": x, "prefix_tokens": 1}, ("x",))
    compare.run(case, Draw("0/0"))
    with pytest.raises(AssertionError, match=message):
        compare.run(case._replace(call=broken, definition=mean), Draw("0/0"))


def test_a_failure_says_how_to_see_it_again(monkeypatch):
    monkeypatch.setattr(compare, "run", lambda case, draw: slightly_wrong("no tensor"))
    with pytest.raises(AssertionError) as raised:
        fuzz.check(3, 4)
    assert str(raised.value).startswith("PYTHONPATH=tests python -m robustness.fuzz --seed 3 --only 4\n")


def test_an_input_that_ends_the_process_is_named(monkeypatch, capsys):
    def die(command, check):
        Path(command[command.index("--worker") + 3]).write_text("         123")
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(subprocess, "run", die)
    assert fuzz.main(["--inputs", "500", "--seed", "9"]) == 1
    shown = capsys.readouterr().out
    assert "robustness.fuzz --seed 9 --only 123\n" in shown
    assert "ended with status -11" in shown
