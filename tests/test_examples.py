"""Every script in examples/ runs, is short, and stands in the folder's table."""

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
OPTIONAL = {"accelerate", "onnx", "onnxscript", "open_clip", "timm", "transformers"}
MOST_LINES = 80


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_prints(path, capsys):
    with torch.random.fork_rng():
        try:
            runpy.run_path(str(path), run_name="__main__")
        except ImportError as missing:
            package = (missing.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            pytest.skip(f"needs the package {package}")
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < MOST_LINES
    assert f"python examples/{path.name}\n" in source


def test_the_table_lists_every_example():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 6
    assert [path.name for path in EXAMPLES if f"| [{path.name}]({path.name}) |" not in table] == []
