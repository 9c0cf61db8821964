"""The machine: what it is, and the ceilings that other times are held against."""

from __future__ import annotations

import shutil
import subprocess

import torch

from gpu_check.clock import measure
from gpu_check.record import Recorder
from mlip_kernels import env
from mlip_kernels._loading import outcomes


def run(recorder: Recorder, device: torch.device) -> None:
    """Record facts and ceilings."""
    with recorder.case("environment") as facts:
        facts |= {"report": env.report(), "parts": outcomes(), "torch": torch.__version__, "device": str(device)}
    if shutil.which("nvidia-smi"):
        with recorder.case("nvidia-smi") as facts:
            done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=15, check=True)
            facts["report"] = done.stdout
    cuda = device.type == "cuda"
    if cuda:
        with recorder.case("device") as facts:
            known = torch.cuda.get_device_properties(device)
            facts |= {"model": known.name, "capability": f"sm_{known.major}{known.minor}"}
            facts |= {"multiprocessors": known.multi_processor_count, "bytes": known.total_memory}
    with recorder.case("copy") as facts:
        source = torch.empty((4 << 30) if cuda else (16 << 20), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        target.copy_(source)
        facts["bytes/s"] = 2 * source.nbytes / measure(lambda: target.copy_(source), device).device
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        with recorder.case(f"product, {name}") as facts:
            side = (8192 if dtype == torch.bfloat16 else 4096) if cuda else 128
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b)
            facts["flop/s"] = 2 * side**3 / measure(lambda a=a, b=b: torch.mm(a, b), device).device
    torch.backends.cuda.matmul.allow_tf32 = False
    with recorder.case("small launch") as facts:
        one = torch.zeros(1, device=device)
        one.add_(1)
        facts |= measure(lambda: one.add_(1), device)._asdict()
