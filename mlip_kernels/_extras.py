"""Packages that come with an extra of this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
