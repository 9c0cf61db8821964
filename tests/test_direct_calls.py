"""Direct calls of ``torch.ops.mlip_kernels``: arguments that do not fit together raise and touch no other memory."""

import re
from pathlib import Path

import pytest
import torch
from recorded import direct_calls

import mlip_kernels
from mlip_kernels import _library

CALLS = [
    parameter
    for parameter in direct_calls()
    if torch._C._dispatch_has_kernel_for_dispatch_key(parameter.values[0]._schema.name, "CPU")
]
PARTS = [Path(mlip_kernels.__file__).with_name(f"_{part}.so") for part in ("cpu", "cuda")]
OPERATORS = torch.ops.mlip_kernels
X, ROWS = torch.ones(1, 4, 8), torch.tensor([[0, 1, 2]])

needs_kernels = pytest.mark.skipif(_library.LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")


def failure_of(operator, arguments):
    try:
        operator(*arguments)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return error
    return None


def tensors_in(arguments):
    return [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]


@needs_kernels
@pytest.mark.parametrize(("operator", "arguments"), CALLS)
def test_a_dimension_of_size_0_is_computed_or_refused(operator, arguments):
    """One tensor loses all that it has along one dimension, as what it was made of may have."""
    for i in tensors_in(arguments):
        for axis in range(arguments[i].dim()):
            given = list(arguments)
            given[i] = arguments[i].narrow(axis, 0, 0)
            error = failure_of(operator, given)
            assert error is None or re.match(r"[a-z_, ]+: ", str(error)), error


@needs_kernels
@pytest.mark.parametrize(("operator", "arguments"), CALLS)
def test_errors_name_the_argument_and_no_file(operator, arguments):
    errors = []
    for i in tensors_in(arguments):
        for wrong in (arguments[i][None], arguments[i].to(torch.complex64)):
            given = list(arguments)
            given[i] = wrong
            errors.append(failure_of(operator, given))
    messages = [str(error) for error in errors if error is not None]
    assert messages
    assert not [message for message in messages if re.search(r"/|\.(cpp|h|cu)\b", message)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_no_path_of_the_machine_that_built_it_is_in_a_compiled_part(part):
    if not part.exists():
        pytest.skip(f"needs {part.name}")
    paths = re.findall(rb"/[\w./ +-]*/(?:csrc|include)/[\w./+-]+\.(?:h|cpp|cu|cuh)\b", part.read_bytes())
    assert not paths


@needs_kernels
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("spectral_separable", (torch.ones(2, 12, 8), torch.ones(0, 3), torch.ones(4, 4), 3, 4, 0)),
        ("spectral_separable", (torch.ones(2, 12, 8), torch.ones(3, 3), torch.ones(0, 4), 3, 4, 0)),
        ("spectral_analysis", (torch.ones(2, 12, 8), torch.ones(2, 0, 3), torch.ones(6, 4), 3, 4, 0)),
        ("spectral_analysis", (torch.ones(2, 12, 8), torch.ones(2, 3, 3), torch.ones(0, 4), 3, 4, 0)),
        ("spectral_synthesis", (*[torch.ones(2, 3, 3, 8)] * 2, torch.ones(2, 0, 3), torch.ones(4, 6), 0)),
        ("spectral_synthesis", (*[torch.ones(2, 3, 3, 8)] * 2, torch.ones(2, 3, 3), torch.ones(0, 6), 0)),
        ("spectral_synthesis", (*[torch.ones(2, 3, 0, 8)] * 2, torch.ones(2, 3, 3), torch.ones(4, 0), 0)),
        ("spectral_synthesis", (*[torch.ones(2, 0, 3, 8)] * 2, None, torch.ones(4, 6), 0)),
    ],
)
def test_matrices_without_rows_or_columns_are_refused(name, arguments):
    with pytest.raises(RuntimeError, match=r"^(matrix_[hw]|real): expected .*(at least one|>= 1)"):
        getattr(OPERATORS, name)(*arguments)


BAD_MAPS = [
    ("assignment", [[0, 2**40, 2, 2]], ROWS, [[3]]),
    ("assignment", [[0, -1, 2, 2]], ROWS, [[3]]),
    ("assignment", [[0, 3, 2, 2]], ROWS, [[3]]),
    ("kept", [[0, 1, 2, 2]], [[0, 1, 2**40]], [[3]]),
    ("kept", [[0, 1, 2, 2]], [[0, 1, -1]], [[3]]),
    ("removed", [[0, 1, 2, 2]], ROWS, [[2**62]]),
    ("removed", [[0, 1, 2, 2]], ROWS, [[-(2**63)]]),
    ("kept, removed", [[0, 0, 0, 1]], [[0, 3]], [[1, 1]]),
    ("kept, removed", [[0, 1, 2, 2]], ROWS, [[2]]),
    ("assignment, kept", [[0, 0, 0, 0]], ROWS, [[3]]),
    ("assignment, kept", [[0, 1, 1, 2]], [[0, 1, 1]], [[3]]),
    ("kept", [[0, 0, 0, 0]], torch.empty(1, 0, dtype=torch.int64), [[0, 1, 2, 3]]),
]


@needs_kernels
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(("name", "assignment", "kept", "removed"), BAD_MAPS)
def test_maps_that_are_none_of_a_matching_are_refused(name, assignment, kept, removed, batch):
    """Behind 39 samples that are right, so that it is found by any thread."""
    right = [torch.tensor(rows) for rows in ([[0, 1, 2, 2]], [[0, 1, 2]], [[3]])]
    maps = [torch.as_tensor(rows) for rows in (assignment, kept, removed)]
    if batch > 1 and maps[1].shape == right[1].shape:
        maps = [torch.cat([good] * (batch - 1) + [bad]) for good, bad in zip(right, maps, strict=True)]
    x = X.expand(len(maps[0]), -1, -1)
    for call in (
        lambda: OPERATORS.merging_merge(x, None, *maps, None, None),
        lambda: OPERATORS.merging_combine(x, None, *maps, None),
    ):
        with pytest.raises(RuntimeError, match=rf"^{name}: expected"):
            call()
    if name == "assignment":
        with pytest.raises(RuntimeError, match=r"^assignment: expected"):
            OPERATORS.merging_spread(x[:, :3], None, *maps, None)
