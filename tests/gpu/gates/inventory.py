"""Which kernels the sources have, so that none is left out of the table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def triton_kernels(folder: Path = ROOT / "mlip_kernels" / "triton") -> set[str]:
    """Every ``@triton.jit`` function named ``*_kernel``; other jit functions are parts of kernels."""
    return {
        node.name
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def cuda_kernels(folder: Path = ROOT / "csrc" / "cuda") -> set[str]:
    """Every ``__global__`` function."""
    found = set()
    for file in folder.rglob("*.cu*"):
        source = re.sub(r"//[^\n]*|/\*.*?\*/", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for declaration in re.findall(r"__global__(.*?)[{;]", source, re.DOTALL):
            bounds = r"__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)"
            found.add(re.search(r"(\w+)\s*\(", re.sub(bounds, " ", declaration)).group(1))
    return found
