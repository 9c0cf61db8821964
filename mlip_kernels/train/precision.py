"""Which precision the towers compute in: bfloat16 where the hardware multiplies it, float32 elsewhere."""

from __future__ import annotations

import os
import platform
from typing import Literal, NamedTuple

import torch

Choice = Literal["auto", "bfloat16", "float32"]
CHOICES: tuple[Choice, ...] = ("auto", "bfloat16", "float32")

ONEDNN_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ``ONEDNN_MAX_CPU_ISA`` under which oneDNN converts bfloat16 to float32 and back around each product."""


class Precision(NamedTuple):
    """A precision and why it was taken."""

    name: Literal["bfloat16", "float32"]
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """Autocast of the towers to this precision on ``device``; it does nothing for float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bfloat16")


def resolve(choice: Choice, device: torch.device) -> Precision:
    """The precision that ``choice`` means on ``device``.

    ``auto`` is bfloat16 where `bfloat16_support` finds it native, else float32: without the instructions a product
    in bfloat16 is emulated, and a training step takes many times as long as in float32.
    """
    native, reason = bfloat16_support(device)
    if choice == "auto":
        return Precision("bfloat16" if native else "float32", reason)
    if choice == "bfloat16" and not native:
        return Precision(choice, f"as asked, though {reason}: expect float32 to be faster")
    return Precision(choice, "as asked")


def bfloat16_support(device: torch.device) -> tuple[bool, str]:
    """Whether ``device`` multiplies bfloat16 natively, and what that is known from."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"this GPU {'has' if native else 'emulates'} bfloat16"
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch has no oneDNN to multiply bfloat16 with"
    if platform.machine().lower() in ("arm64", "aarch64"):
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return native, f"this processor {'has' if native else 'lacks'} the bfloat16 instructions of ARM"
    # On x86 that operator is true for any AVX-512, where oneDNN emulates bfloat16: ask for the instructions.
    found = [
        name
        for name, supported in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX-512-BF16", torch.cpu._is_avx512_bf16_supported()),
        )
        if supported
    ]
    if not found:
        return False, "this processor has neither AVX-512-BF16 nor AMX"
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        limit = os.environ.get(variable, "")
        if limit.upper() in ONEDNN_WITHOUT_BFLOAT16:
            return False, f"{variable}={limit} keeps oneDNN from the {found[0]} of this processor"
    return True, f"this processor has {found[0]}"
