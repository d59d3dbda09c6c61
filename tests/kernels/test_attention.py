import pytest
import torch

from ssast.kernels import attention


def test_equals_the_definition():
    q, k, v = torch.randn(3, 2, 3, 130, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ((q @ k.transpose(2, 3)) / 8.0).softmax(dim=3) @ v
    torch.testing.assert_close(attention(q, k, v), expected)
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, backend="cuda")
