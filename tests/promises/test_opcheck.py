"""Every registered operator that the table ends in keeps the contract of torch's dispatcher, in every layout."""

import pytest
import torch
from recorded import direct_calls

from mlip_kernels.testing import permuted


@pytest.mark.parametrize(("operator", "arguments"), direct_calls())
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, arguments)
    strided = [permuted(a.detach()) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(operator, strided, test_utils=("test_schema", "test_faketensor"))
