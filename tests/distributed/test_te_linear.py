"""Tensor-parallel layers and losses of the Transformer Engine stand-in on two ranks.

Shapes: x_sbi is [sequence, batch, in], y_sbo [sequence, batch, out], weights [out, in].
Column parallel: a rank has half the outputs. Row parallel: half the inputs. With sequence
parallelism what is not split that way is split along the sequence.
"""

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.harness import run_distributed

S, B, D_IN, D_OUT, V = 6, 3, 8, 10, 12
EPS = 1e-5


def half(x: Tensor, dim: int, rank: int) -> Tensor:
    return x.chunk(2, dim)[rank].contiguous()


def reference(normed: bool) -> dict[str, Tensor]:
    """The whole layer in float64 by plain autograd; `up` is the gradient of y."""
    generator = torch.Generator().manual_seed(1)
    x, n, w, up = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((S, B, D_IN), (D_IN,), (D_OUT, D_IN), (S, B, D_OUT))
    )
    x, n, w = (t.requires_grad_() for t in (x, n, w))
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
    y = (x * scale * n if normed else x) @ w.T
    (y * up).sum().backward()
    grads = {"dx": x.grad, "dw": w.grad}
    if normed:
        grads["dn"] = n.grad
    found = {"x": x, "n": n, "w": w, "up": up, "y": y, **grads}
    return {k: v.detach() for k, v in found.items() if v is not None}


def check_layer(rank: int, mode: str, sequence_parallel: bool, normed: bool) -> None:
    import transformer_engine.pytorch as te

    whole = reference(normed)
    settings: dict[str, Any] = {
        "bias": False,
        "tp_group": dist.group.WORLD,
        "tp_size": 2,
        "parallel_mode": mode,
        "sequence_parallel": sequence_parallel,
        "params_dtype": torch.float64,
    }
    if normed:
        layer = te.LayerNormLinear(D_IN, D_OUT, eps=EPS, normalization="RMSNorm", **settings)
        layer.layer_norm_weight.data.copy_(whole["n"])
    else:
        layer = te.Linear(D_IN, D_OUT, **settings)
    split = 0 if mode == "column" else 1
    layer.weight.data.copy_(half(whole["w"], split, rank))
    assert layer.weight.tensor_model_parallel and layer.weight.partition_dim == split

    def along_sequence(t: Tensor) -> Tensor:
        return half(t, 0, rank) if sequence_parallel else t.clone()

    column = mode == "column"
    x = (along_sequence(whole["x"]) if column else half(whole["x"], 2, rank)).requires_grad_()
    y = layer(x)
    up = half(whole["up"], 2, rank) if column else along_sequence(whole["up"])
    y.backward(up)
    assert x.grad is not None
    wanted_y = half(whole["y"], 2, rank) if column else along_sequence(whole["y"])
    wanted_dx = along_sequence(whole["dx"]) if column else half(whole["dx"], 2, rank)
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(x.grad, wanted_dx)
    torch.testing.assert_close(layer.weight.grad, half(whole["dw"], split, rank))
    if normed:
        # Each rank saw its part of the sequence; Megatron sums the gradients of parameters
        # that are marked so.
        gradient = layer.layer_norm_weight.grad
        assert layer.layer_norm_weight.sequence_parallel is sequence_parallel
        if sequence_parallel:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, whole["dn"])


def check_row_bias(rank: int) -> None:
    import transformer_engine.pytorch as te

    layer = te.Linear(
        D_IN,
        D_OUT,
        tp_group=dist.group.WORLD,
        tp_size=2,
        parallel_mode="row",
        params_dtype=torch.float64,
    )
    layer.weight.data.zero_()
    layer.bias.data.fill_(3.0)
    y = layer(torch.ones(S, D_IN // 2, dtype=torch.float64))
    assert (y == 3).all(), "the bias is added once, not once a rank"


def check_cross_entropy(rank: int, dtype: torch.dtype, scale: float) -> None:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    torch.manual_seed(2)
    logits = (torch.randn(S, B, V) * scale).to(dtype)
    logits[0, 0, : V // 2] += 5 * scale  # the largest entries are all on one rank
    target = torch.randint(V, (S, B))
    target[1, 2] = -100
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), target.flatten(), reduction="none")
    weights = torch.linspace(0.5, 2, S * B)
    expected.backward(weights.double())
    assert whole.grad is not None
    part = half(logits, 2, rank).requires_grad_()
    loss = parallel_cross_entropy(part, target, dist_process_group=dist.group.WORLD)
    loss.flatten().backward(weights)
    assert part.grad is not None and part.grad.dtype == dtype
    torch.testing.assert_close(loss.flatten().double(), expected, rtol=1e-5, atol=1e-5)
    rtol, atol = (2e-2, 1e-4) if dtype == torch.bfloat16 else (1e-4, 1e-6)
    torch.testing.assert_close(part.grad.double(), half(whole.grad, 2, rank), rtol=rtol, atol=atol)


def check_all(rank: int, world_size: int) -> int:
    """Everything in one start of the ranks; a failure names its line."""
    from model.backends import install_backends

    install_backends("host")
    checks = 0
    for mode, sequence_parallel in product(("column", "row"), (False, True)):
        check_layer(rank, mode, sequence_parallel, normed=False)
        checks += 1
    for sequence_parallel in (False, True):
        check_layer(rank, "column", sequence_parallel, normed=True)
        checks += 1
    check_row_bias(rank)
    for dtype, scale in product((torch.float32, torch.bfloat16), (1.0, 1e3)):
        check_cross_entropy(rank, dtype, scale)
        checks += 1
    return checks + 1


def test_two_ranks_equal_one() -> None:
    assert run_distributed(check_all, 2) == [11, 11]
