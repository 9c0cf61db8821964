"""Packages that come with an extra of this one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Where a package is absent that the block imports, say in one line what needs it and which extra brings it.

    Args:
        extra: the extra's name.
        what: the part of this package that the block imports.

    Raises:
        ImportError: naming the missing package and the remedy.
    """
    try:
        yield
    except ModuleNotFoundError as failure:
        missing = (failure.name or "").partition(".")[0]
        if missing in ("", "mlip_kernels"):
            raise
        raise ImportError(
            f"{what} needs the package {missing!r}, which is not installed: pip install 'mlip_kernels[{extra}]'",
            name=failure.name,
        ) from None


def check_version(package: str, distribution: str, lowest: tuple[int, int], below: tuple[int, int]) -> None:
    """Raise unless the installed version of a package is one that is known to work.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: its version is another; the message says which are known to work.
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package) from None
    release = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not lowest <= release < below:
        wanted = "{}>={}.{},<{}.{}".format(distribution, *lowest, *below)
        raise ImportError(f"{distribution}: expected {wanted}, got {found}: pip install '{wanted}'")
