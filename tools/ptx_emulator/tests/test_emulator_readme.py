"""The examples of README.md run as they stand there, and say what they say there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_sources import cuda_home

PACKAGE = Path(__file__).resolve().parents[1]
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def blocks(section: str) -> dict[str, str]:
    """The code of a section, by language."""
    text = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def reports(text: str) -> list[str]:
    """The lines of a report, but for registers and lines of PTX, which are the compiler's own."""
    return [re.sub(r"PTX line \d+|%\w+", "_", line) for line in text.splitlines()]


def run(folder: Path, code: str) -> subprocess.CompletedProcess:
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    return subprocess.run(
        [sys.executable, script.name], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def compiled(folder: Path, source: str, command: str) -> None:
    name, *arguments = command.split()
    (folder / arguments[-1]).write_text(source, encoding="utf-8")
    subprocess.run([cuda_home() / "bin" / name, *arguments], cwd=folder, check=True)


def test_the_cuda_example_raises_what_it_says(tmp_path: Path):
    code = blocks("A CUDA kernel")
    compiled(tmp_path, code["cuda"], code["sh"])
    reported = reports(run(tmp_path, code["python"]).stderr)
    for line in reports(code["text"]):
        assert any(line in said for said in reported), f"{line!r} is not in {reported}"


def test_the_cuda_example_is_right_with_its_barrier(tmp_path: Path):
    code = blocks("A CUDA kernel")
    compiled(tmp_path, code["cuda"].replace("x[threadIdx.x];\n", "x[threadIdx.x]; __syncthreads();\n"), code["sh"])
    done = run(tmp_path, code["python"] + "\nprint((x == np.arange(256)[::-1]).all())\n")
    assert done.stdout == "True\n", done.stderr


def test_the_triton_example_prints_what_it_says(tmp_path: Path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    code = blocks("A Triton kernel")
    done = run(tmp_path, code["python"])
    counted = r"\d+"  # as the compiler laid out the loads
    assert re.sub(counted, "_", done.stdout) == re.sub(counted, "_", code["text"]), done.stderr
