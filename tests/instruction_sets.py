"""Instruction sets of the CPU kernels. They are chosen once per process: tests run again in one that uses a smaller."""

from mlip_kernels.env import cpu_capability

ORDER = ("baseline", "avx2", "avx512", "avx512_bf16")


def in_use() -> str | None:
    """What the kernels of this process use; None where they are not compiled, or disabled."""
    found = cpu_capability()
    return None if found.startswith("none") else ORDER[ORDER.index(found.split()[0])]


def smaller() -> tuple[str, ...]:
    """Those that a process can be held to in which the kernels then differ from those of this one."""
    used = in_use()
    return ORDER[: ORDER.index(used)] if used else ()
