"""`docs/add_an_operator.md` works: its code is added to a copy of the package, compiled, and tested there."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import page_snippets
import pytest
from page_snippets import ROOT

import mlip_kernels
from mlip_kernels.testing import DTYPES

PACKAGE = Path(mlip_kernels.__file__).parent
PAGE = ROOT / "docs" / "add_an_operator.md"
BINDING = "csrc/bindings/cpu/merging.cpp"
TRY_IT = "try it"
PROMISES = ("accuracy", "derivatives", "empty_batch", "export", "layouts", "opcheck", "switch")


def changed(title: str, text: str, change: str) -> str:
    """A file without the lines that start with ``-`` and with those that start with ``+``, where the others say."""
    lines, at, pending, behind = text.splitlines(), 0, [], False
    for line in change.splitlines():
        if line.startswith("+"):
            if behind:
                lines.insert(at, line[1:])
                at += 1
            else:
                pending.append(line[1:])
        elif line == "...":
            behind = False
        else:
            assert line[1:] in lines[at:], f"the page is outdated: {title} has no line {line[1:]!r} there"
            found = lines.index(line[1:], at)
            lines[found : found + 1] = [*pending, *([line[1:]] if line.startswith(" ") else [])]
            at, pending, behind = found + len(pending) + line.startswith(" "), [], True
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the page changes, after its changes."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "gpu", "packaging")
    shutil.copytree(PACKAGE, folder / "mlip_kernels", ignore=ignored)
    for name in ("csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for library in PACKAGE.glob("_*.so"):
        (folder / "mlip_kernels" / library.name).symlink_to(library)
    for block in page_snippets.titled(PAGE):
        path = folder / block.title
        if block.language == "diff":
            path.write_text(changed(block.title, path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        elif path.exists():
            path.write_text(path.read_text(encoding="utf-8") + "\n\n" + block.text, encoding="utf-8")
        else:
            path.write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kernel(tree) -> Path:
    """The page's CPU kernel as a library of its own, so that only it is compiled."""
    sys.path.insert(0, str(ROOT / "_build"))
    try:
        import compilers
    finally:
        sys.path.pop(0)
    command = compilers.cxx()
    if not shutil.which(command[0]):
        pytest.skip(f"no C++ compiler: {command[0]}")
    (change,) = [block.text for block in page_snippets.titled(PAGE) if block.title == BINDING]
    added = [line[1:] for line in change.splitlines() if line.startswith("+")]
    includes = [line for line in added if line.startswith("#include")]
    registered = [line for line in added if line.startswith("  m.impl(")]
    function = [line for line in added if line not in (*includes, *registered)]
    binding = ['#include "bindings/cpu/tensors.h"', *includes, "namespace mlip::bindings {", "namespace {", *function]
    binding += ["STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {", *registered, "}", "}", "}"]
    (tree / "binding.cpp").write_text("\n".join(binding) + "\n", encoding="utf-8")
    sources = ["binding.cpp", "csrc/cpu/simd.cpp", "csrc/cpu/merging/center_tokens.cpp"]
    flags = [flag for flag in compilers.cxx_flags() if flag != "-O3"]
    library = tree / "kernel.so"
    compile_all = [*command, *flags, "-O1", "-Icsrc", "-shared", *sources, *compilers.torch_libraries(), "-o", library]
    subprocess.run(list(map(str, compile_all)), cwd=tree, check=True)
    return library


def run(tree: Path, *arguments: str, **variables: str) -> str:
    """What ``python <arguments>`` prints in the copy; it has to end well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(tree), **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_operator_works_in_plain_pytorch(tree):
    said = run(tree, TRY_IT).splitlines()
    assert float(said[0].rpartition(":")[2]) < 1e-14
    assert said[-1] == "prefix_tokens: expected fewer than the 197 tokens of x, got 197"


def test_the_row_of_the_table_tests_the_kernel(tree, kernel):
    (tree / "with_kernel.py").write_text(
        f"import torch, mlip_kernels\ntorch.ops.load_library({str(kernel)!r})\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('mlip_kernels::merging_center_tokens', 'CPU')\n",
        encoding="utf-8",
    )
    files = [f"tests/promises/test_{name}.py" for name in PROMISES]
    said = run(tree, "-m", "pytest", "-q", "-p", "with_kernel", "-k", "center_tokens", *files)
    passed = int(said.rpartition(" passed")[0].split()[-1])
    assert passed >= len(PROMISES) + len(DTYPES)


def test_the_triton_kernel_computes_the_definition(tree):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    (tree / "interpreted.py").write_text(
        """
import torch
from mlip_kernels.merging import plain
from mlip_kernels.testing import assert_as_accurate, permuted
from mlip_kernels.triton.merging.center_tokens import center_tokens

for shape, prefix in (((2, 37, 150), 5), ((1, 1, 1), 0), ((0, 4, 3), 1)):
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(shape).to(dtype)
        found = center_tokens(permuted(x), prefix)
        assert_as_accurate(found, plain.center_tokens(x, prefix), plain.center_tokens(x.double(), prefix))
""",
        encoding="utf-8",
    )
    run(tree, "interpreted.py", TRITON_INTERPRET="1")
