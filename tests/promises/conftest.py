"""What tests of promises share."""

import pytest

from mlip_kernels.spectral import constants


@pytest.fixture
def forget():
    """Forget the matrices that earlier tests left."""
    constants._remembered.cache_clear()
