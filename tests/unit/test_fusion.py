"""The host's versions of Megatron's pointwise functions, against float64 autograd."""

import pytest
import torch

from parallel.fusion import fuse, weighted_squared_relu, weighted_squared_relu_back


@pytest.mark.parametrize("shape", [(0, 7), (1, 3), (1000, 96), (3, 70000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    w = torch.rand(shape[0], 1)
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = exact_x.clamp_min(0) ** 2 * exact_w
    exact.backward(g.double())
    dx, dw = weighted_squared_relu_back(g, x, w)
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    for ours, theirs in (
        (weighted_squared_relu(x, w), exact),
        (dx, exact_x.grad),
        (dw, exact_w.grad),
    ):
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=1e-3)
    assert dx.dtype == dtype and dw.dtype == torch.float32


def test_inputs_stay_as_they_are() -> None:
    x, g, w = torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, 1)
    copies = [t.clone() for t in (x, g, w)]
    weighted_squared_relu(x, w)
    weighted_squared_relu_back(g, x, w)
    assert all(torch.equal(a, b) for a, b in zip((x, g, w), copies, strict=True))


def test_only_known_functions_are_replaced() -> None:
    def other() -> None: ...

    assert fuse(other) is other
    assert fuse(weighted_squared_relu) is weighted_squared_relu
