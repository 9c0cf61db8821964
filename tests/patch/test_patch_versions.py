"""Patches name the package that they lack, and the versions of it that they know."""

import importlib
import importlib.metadata
import sys
from typing import Any

import pytest

from mlip_kernels import _extras

PATCHES = {"mlip_kernels.patch.open_clip": "open_clip_torch", "mlip_kernels.patch.transformers": "transformers"}


def forget(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.parametrize(("module", "distribution"), PATCHES.items())
def test_another_version_is_refused_with_the_known_ones(
    module: str, distribution: str, monkeypatch: pytest.MonkeyPatch
):
    forget(monkeypatch, module)
    monkeypatch.setattr(_extras, "version", lambda name: "2.9.1.dev0")
    with pytest.raises(ImportError, match=rf"{distribution}: expected {distribution}>=\d+\.\d+,<\d+\.0, got 2.9.1"):
        importlib.import_module(module)


@pytest.mark.parametrize(("module", "distribution"), PATCHES.items())
def test_a_missing_package_is_named_with_the_extra(module: str, distribution: str, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    forget(monkeypatch, module)
    monkeypatch.setattr(_extras, "version", version)
    with pytest.raises(ImportError, match=rf"{module} needs the package .* pip install 'mlip_kernels\[integrations\]'"):
        importlib.import_module(module)
