"""Groups of gloo processes, each started once for all tests that look at what they computed."""

import importlib.util

import loss_ranks
import pytest


@pytest.fixture(scope="session", params=[2, 4])
def ranks(request, tmp_path_factory):
    """The results of every rank of a group of processes, by case."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("parity needs open_clip_torch")
    return loss_ranks.run(request.param, tmp_path_factory.mktemp("ranks"))
