"""The environment variables of the package: what each may hold, and a clear error where it holds something else.

Only the standard library is imported: `setup.py` and the build backend load this file by its path.
"""

from __future__ import annotations

import difflib
import os

PREFIX = "MLIP_KERNELS_"
FLAG = ("1", "0")
AT_RUN_TIME = {
    "MLIP_KERNELS_CPU_CAPABILITY": ("baseline", "avx2", "avx512", "avx512_bf16", "default"),
    "MLIP_KERNELS_CUDA_BACKEND": ("auto", "triton", "cuda"),
    "MLIP_KERNELS_DISABLE_EXT": FLAG,
}
AT_BUILD_TIME = {"MLIP_KERNELS_SKIP_EXT": FLAG, "MLIP_KERNELS_STRICT": FLAG, "FORCE_CUDA": FLAG}
"""Variable -> the values that are understood. Unset and empty are the same."""


def read(name: str) -> str:
    """The value of a variable of the package, ``""`` where it is unset.

    Raises:
        ValueError: it holds something that is not understood.
    """
    value = os.environ.get(name, "")
    allowed = (AT_RUN_TIME | AT_BUILD_TIME)[name]
    if value and value not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {value!r}")
    return value


def flag(name: str) -> bool:
    """Whether a variable that holds 1 or 0 is set to 1; raises as `read`."""
    return read(name) == "1"


def check(names: dict[str, tuple[str, ...]]) -> None:
    """Raise `ValueError` if one of these variables holds what is not understood."""
    for name in names:
        read(name)


def unknown() -> dict[str, str]:
    """Variables that are set and named like ours, but are none of ours -> what to say about each."""
    known = AT_RUN_TIME | AT_BUILD_TIME
    said = {}
    for name in sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name not in known):
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(n for n in known if PREFIX in n)}"
        said[name] = f"{name} is not a variable of this package; {meant}"
    return said
