"""Quantized linear layers on two ranks against one.

Both halves of what is split hold the same numbers, so that the maximum of a tensor, and with it
its scale, is the same on one rank and on two. The sequence is not such: its halves differ by a
factor of 50, and with sequence parallelism the ranks have to share maxima.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.harness import run_distributed

S, B, HALF_IN, HALF_OUT = 64, 2, 64, 32
SIZE = torch.tensor([1.0] * (S // 2) + [50.0] * (S // 2))[:, None, None]


def half(x: Tensor, dim: int, rank: int) -> Tensor:
    return x.chunk(2, dim)[rank].contiguous()


def tensors(mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """x_sbi, w_oi and the gradient of y_sbo, doubled along what `mode` splits."""
    generator = torch.Generator().manual_seed(1)
    x, w, g = (
        torch.randn(shape, generator=generator)
        for shape in ((S, B, HALF_IN), (HALF_OUT, HALF_IN), (S, B, HALF_OUT))
    )
    x, g = x * SIZE, g / SIZE
    if mode == "column":
        return x, torch.cat((w, w), 0), torch.cat((g, g), 2)
    return torch.cat((x, x), 2), torch.cat((w, w), 1), g


def run(layer: Any, x: Tensor, g: Tensor, recipe: Any) -> tuple[Tensor, Tensor, Tensor]:
    import transformer_engine.pytorch as te

    x = x.requires_grad_()
    with te.autocast(recipe=recipe):
        y = layer(x)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def check(
    rank: int, mode: str, sequence_parallel: bool, recipe: Any, odd: float | None = None
) -> None:
    """`odd`: what a block of the last rank's tokens, in every layout, is made of."""
    import transformer_engine.pytorch as te

    x, w, g = tensors(mode)
    if odd is not None:
        for t in (x, g):
            t[-16:, :, :32] = odd
    one = te.Linear(w.shape[1], w.shape[0], bias=False)
    one.weight.data.copy_(w)
    y, dx, dw = run(one, x.clone(), g, recipe)
    layer = te.Linear(
        w.shape[1],
        w.shape[0],
        bias=False,
        tp_group=dist.group.WORLD,
        tp_size=2,
        parallel_mode=mode,
        sequence_parallel=sequence_parallel,
    )
    column = mode == "column"
    layer.weight.data.copy_(half(w, 0 if column else 1, rank))

    def sequence(t: Tensor) -> Tensor:
        return half(t, 0, rank) if sequence_parallel else t.clone()

    def features(t: Tensor) -> Tensor:
        return half(t, 2, rank)

    inward, outward = (sequence, features) if column else (features, sequence)
    found = run(layer, inward(x), outward(g), recipe)
    wanted = outward(y), inward(dx), half(dw, 0 if column else 1, rank)
    for actual, expected in zip(found, wanted, strict=True):
        scale = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)


def check_gradients_are_rounded_once(rank: int) -> None:
    """Stochastic rounding draws on the rank that has the token: the data gradients of two ranks,
    whose weights are the same, then are too, although their draws differ."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import NVFP4BlockScaling

    te.quantization.FP8GlobalStateManager.seed_stochastic_rounding(rank)
    x, w, g = tensors("row")
    layer = te.Linear(
        w.shape[1],
        w.shape[0],
        bias=False,
        tp_group=dist.group.WORLD,
        tp_size=2,
        parallel_mode="row",
        sequence_parallel=True,
    )
    layer.weight.data.copy_(half(w, 1, rank))
    _, dx, dw = run(layer, half(x, 2, rank), half(g, 0, rank), NVFP4BlockScaling())
    for gradient in (dx, dw):
        both = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(both, gradient)
        assert torch.equal(*both)


def check_a_shard_has_its_own_maximum(rank: int) -> None:
    """Where a weight's halves have other maxima, tensor-parallel ranks are not one rank: each rank
    scales its shard by the shard's own maximum, as a layer of that shard alone does. The real
    library shares maxima of gathered tokens only, too."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import NVFP4BlockScaling

    x, w, g = tensors("column")
    w = w * torch.cat((torch.ones(HALF_OUT), torch.full((HALF_OUT,), 1.7)))[:, None]
    recipe = NVFP4BlockScaling(disable_stochastic_rounding=True)

    def product(weight: Tensor, **parallel: Any) -> Tensor:
        layer = te.Linear(HALF_IN, w.shape[0] if parallel else len(weight), bias=False, **parallel)
        layer.weight.data.copy_(weight)
        return run(layer, x.clone(), g[..., : len(weight)], recipe)[0]

    group = {"tp_group": dist.group.WORLD, "tp_size": 2, "parallel_mode": "column"}
    found = product(half(w, 0, rank), **group)
    torch.testing.assert_close(found, product(half(w, 0, rank)))
    whole = half(product(w), 2, rank)
    # The half with the tensor's maximum has the scale it has on one rank, the other has not.
    assert torch.equal(found, whole) == (rank == 1)


def check_all(rank: int, world_size: int) -> int:
    from model.backends import install_backends

    install_backends("host")
    from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling

    checks = 0
    for recipe in (NVFP4BlockScaling(disable_stochastic_rounding=True), MXFP8BlockScaling()):
        for mode in ("column", "row"):
            for sequence_parallel in (False, True):
                check(rank, mode, sequence_parallel, recipe)
                checks += 1
    # Blocks that BF16 cannot hold, on one rank alone: the other gathers them all the same.
    for mode in ("column", "row"):
        for odd in (1e-34, float("nan")):
            check(rank, mode, True, MXFP8BlockScaling(), odd)
            checks += 1
    check_gradients_are_rounded_once(rank)
    check_a_shard_has_its_own_maximum(rank)
    return checks + 2


def test_two_ranks_equal_one() -> None:
    assert run_distributed(check_all, 2) == [14, 14]
