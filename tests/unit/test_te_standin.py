"""The Transformer Engine stand-in against formulas written out in float64.

Shapes: s sequence, b batch, h head, g key-value group, d channel, i input, o output, t token,
v vocabulary entry.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backends import install_backends

install_backends("host")

import transformer_engine  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.pytorch import optimizers  # noqa: E402
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy  # noqa: E402
from transformer_engine.pytorch.distributed import CudaRNGStatesTracker, checkpoint  # noqa: E402
from transformer_engine.pytorch.norm import rms_norm  # noqa: E402

from precision.backend import needs_emulation  # noqa: E402

EPS = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norm_formula(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * w


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Value, and the gradients for a fixed upstream gradient, all in float64."""
    inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    y = function(*inputs)
    return y, list(torch.autograd.grad((y * upstream(y)).sum(), inputs))


def upstream(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = te.RMSNorm(16, eps=EPS, params_dtype=dtype)
    x = torch.randn(3, 2, 16, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    expected, (dx, dw) = gradients(norm_formula, x, norm.weight)
    y = norm(x)
    y.backward(upstream(y))
    assert y.dtype == dtype
    rtol, atol = (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    assert x.grad is not None and norm.weight.grad is not None
    for actual, wanted in ((y, expected), (x.grad, dx), (norm.weight.grad, dw)):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


def test_rms_norm_gradcheck() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, w))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    layer = te.Linear(8, 5, bias=bias, params_dtype=torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64) if bias else torch.zeros(5, dtype=torch.float64)
    if bias:
        layer.bias.data.copy_(shift)
    expected, wanted = gradients(lambda x, w, b: x @ w.T + b, x, layer.weight, shift)
    y = layer(x)
    y.backward(upstream(y))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([x.grad, layer.weight.grad], wanted[:2])
    if bias:
        torch.testing.assert_close(layer.bias.grad, wanted[2])


def test_layer_norm_linear() -> None:
    layer = te.LayerNormLinear(
        8, 5, eps=EPS, normalization="RMSNorm", bias=False, params_dtype=torch.float64
    )
    assert set(dict(layer.named_parameters())) == {"weight", "layer_norm_weight"}
    layer.layer_norm_weight.data.normal_()
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    expected, wanted = gradients(
        lambda x, n, w: norm_formula(x, n) @ w.T, x, layer.layer_norm_weight, layer.weight
    )
    y = layer(x)
    y.backward(upstream(y))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([x.grad, layer.layer_norm_weight.grad, layer.weight.grad], wanted)


def test_return_bias_leaves_the_addition_to_the_caller() -> None:
    x = torch.randn(2, 8)
    layer = te.Linear(8, 5, bias=True, return_bias=True)
    layer.bias.data.fill_(3.0)
    y, bias = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.T)
    assert bias is layer.bias
    assert te.Linear(8, 5, bias=False, return_bias=True)(x)[1] is None
    assert te.GroupedLinear(1, 8, 5, bias=False, return_bias=True)(x, [2])[1] is None


def test_extra_state_round_trip() -> None:
    layer = te.Linear(4, 4, bias=False)
    state = layer.state_dict()
    assert set(state) == {"weight", "_extra_state"}
    te.Linear(4, 4, bias=False).load_state_dict(state)
    with pytest.raises(NotImplementedError, match="FP8 delayed-scaling state"):
        layer.set_extra_state(torch.ones(3, dtype=torch.uint8))


SPLITS = [[5, 0, 70, 1], [0, 0, 3, 0], [64, 128, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
"""Empty experts, uneven ones, exact multiples of the padding, and a tiny last one."""


def run_experts(dtype: torch.dtype, splits: list[int], x: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(1)
    layer = te.GroupedLinear(len(splits), 24, 16, bias=False, params_dtype=dtype)
    for w in layer.parameters():
        w.data.normal_()
    x = x.to(dtype).requires_grad_()
    y = layer(x, splits)
    y.backward(upstream(y))
    return layer, y.detach(), x.grad, [w.grad for w in layer.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_experts_against_a_loop(dtype: torch.dtype, splits: list[int]) -> None:
    x = torch.randn(sum(splits), 24).to(dtype)
    layer, y, dx, dw = run_experts(dtype, splits, x)
    weights = [w.detach().double() for w in layer.parameters()]
    start = 0
    for own, (count, w) in enumerate(zip(splits, weights, strict=True)):
        rows = slice(start, start := start + count)
        up = upstream(y)[rows].double()
        wanted = (x.detach()[rows].double() @ w.T, up @ w, up.T @ x.detach()[rows].double())
        for actual, exact in zip((y[rows], dx[rows], dw[own]), wanted, strict=True):
            assert actual.dtype == dtype
            # The products sum in float32 and round once; dw sums up to 128 rows.
            scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-3) * scale
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_rows_of_one_expert_never_reach_another(garbage: float, bad: int) -> None:
    splits = [5, 70, 3]
    x = torch.randn(sum(splits), 24)
    _, y, dx, dw = run_experts(torch.bfloat16, splits, x)
    start = sum(splits[:bad])
    poisoned = x.clone()
    poisoned[start : start + splits[bad]] = garbage
    _, y2, dx2, dw2 = run_experts(torch.bfloat16, splits, poisoned)
    clean = torch.ones(len(x), dtype=torch.bool)
    clean[start : start + splits[bad]] = False
    assert torch.equal(y[clean], y2[clean])
    assert torch.equal(dx, dx2)  # does not depend on x
    assert all(torch.equal(dw[i], dw2[i]) for i in range(3) if i != bad)
    assert not torch.equal(dw[bad], dw2[bad])


def test_expert_gradient_garbage_stays_with_its_expert() -> None:
    splits = [5, 70, 3]
    layer = te.GroupedLinear(3, 24, 16, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(78, 24, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(78, 16, dtype=torch.bfloat16)
    grad[5:75] = float("nan")
    layer(x, splits).backward(grad)
    assert x.grad is not None
    assert torch.isfinite(x.grad[:5]).all() and torch.isfinite(x.grad[75:]).all()
    assert torch.isfinite(layer.weight0.grad).all() and torch.isfinite(layer.weight2.grad).all()
    assert torch.isnan(layer.weight1.grad).all()


def test_experts_refuse_rows_that_belong_to_nobody() -> None:
    with pytest.raises(ValueError, match=r"m_splits=\[1, 1\] sums to 2, .* 3 rows"):
        te.GroupedLinear(2, 4, 4, bias=False)(torch.randn(3, 4), [1, 1])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_attention(groups: int, mask: str) -> None:
    s, b, h, d = 7, 2, 4, 6
    attention = te.DotProductAttention(h, d, groups, attn_mask_type=mask)
    q, k, v = (
        torch.randn(s, b, n, d, dtype=torch.float64, requires_grad=True)
        for n in (h, groups, groups)
    )

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(h // groups, 2) for t in (k, v))
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / d**0.5
        if mask == "causal":
            future = torch.arange(s)[:, None] < torch.arange(s)
            scores = scores.masked_fill(future, float("-inf"))
        return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), v).reshape(s, b, h * d)

    expected, wanted = gradients(explicit, q, k, v)
    y = attention(q, k, v)
    y.backward(upstream(y))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([q.grad, k.grad, v.grad], wanted)


def test_attention_is_exactly_causal() -> None:
    attention = te.DotProductAttention(4, 8, 2)
    q, k, v = (torch.randn(33, 2, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    y = attention(q, k, v)
    for t in (q, k, v):
        t[20:] = 100 * torch.randn_like(t[20:])
    y2 = attention(q, k, v)
    assert torch.equal(y[:20], y2[:20])
    assert not torch.equal(y[20:], y2[20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.randn(3, 5, 300) * scale).clamp(-1e4, 1e4).to(dtype).requires_grad_()
    target = torch.randint(300, (3, 5))
    target[0, 0] = target[2, 3] = -100
    x = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none").view(3, 5)
    expected.backward(upstream(expected))
    loss = parallel_cross_entropy(logits, target)
    loss.backward(upstream(loss))
    assert loss.dtype == torch.float32 and logits.grad is not None and logits.grad.dtype == dtype
    # A loss is a difference of float32 numbers as large as the logits: one unit in the last
    # place of those is what it, and p - 1 at the target, can be wrong by.
    unit = 1e-6 if scale == 1.0 else 1e4 * 2**-23
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=unit)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits.grad.double(), x.grad, rtol=rtol, atol=unit)
    assert (logits.grad[target == -100] == 0).all()


def test_cross_entropy_in_blocks_without_gradient_and_reduced() -> None:
    logits = torch.randn(70, 9000)  # more than one block of rows
    target = torch.randint(9000, (70,))
    target[5] = 7
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    loss = parallel_cross_entropy(logits, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    mean = parallel_cross_entropy(logits, target, reduce_loss=True)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-5, atol=1e-6)
    assert parallel_cross_entropy(logits, target, ignore_idx=7)[5] == 0


def test_adam_against_torch() -> None:
    start = [torch.randn(5, 3), torch.randn(7)]
    settings: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))

    def groups(p: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}]

    adam = optimizers.FusedAdam(groups(ours), **settings)
    reference = torch.optim.AdamW(groups(theirs), **settings)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert set(adam.state[a]) == {"exp_avg", "exp_avg_sq"}
        for name in adam.state[a]:
            torch.testing.assert_close(adam.state[a][name], reference.state[b][name])
    assert [g["step"] for g in adam.param_groups] == [10, 10]


def test_multi_tensor_helpers() -> None:
    xs = [torch.randn(4, 3), torch.randn(9)]
    flag = torch.zeros(1, dtype=torch.int)
    apply = optimizers.multi_tensor_applier
    norm, each = apply(optimizers.multi_tensor_l2norm, flag, [xs], True)
    torch.testing.assert_close(norm, torch.cat([x.flatten() for x in xs]).norm().reshape(1))
    torch.testing.assert_close(each, torch.stack([x.norm() for x in xs]))
    outs = [torch.empty_like(x) for x in xs]
    apply(optimizers.multi_tensor_scale, flag, [xs, outs], 0.5)
    torch.testing.assert_close(outs, [x / 2 for x in xs])
    before = [x.clone() for x in xs]
    apply(optimizers.multi_tensor_scale, flag, [xs, xs], 3.0)
    torch.testing.assert_close(xs, [3 * x for x in before])


Q = torch.zeros(4, 1, 2, 8)


class TwoRanks:
    """As much of a process group as a constructor asks for."""

    def size(self) -> int:
        return 2


REFUSED: dict[str, Callable[[], Any]] = {
    "fuse_wgrad_accumulation": lambda: te.Linear(4, 4, fuse_wgrad_accumulation=True),
    "ub_overlap_ag": lambda: te.Linear(4, 4, ub_overlap_ag=True),
    "bias": lambda: te.GroupedLinear(2, 4, 4, bias=True),
    "tp_size": lambda: te.GroupedLinear(2, 4, 4, bias=False, tp_size=2),
    "normalization": lambda: te.LayerNormLinear(4, 4),
    "return_layernorm_output": lambda: te.LayerNormLinear(4, 4, return_layernorm_output=True),
    "zero_centered_gamma": lambda: te.RMSNorm(4, zero_centered_gamma=True),
    "LayerNorm": lambda: te.LayerNorm(4),
    "cp_comm_type": lambda: te.DotProductAttention(2, 8, cp_comm_type="a2a+p2p"),
    "attention_type": lambda: te.DotProductAttention(2, 8, attention_type="cross"),
    "window_size": lambda: te.DotProductAttention(2, 8, window_size=(4, 0)),
    "qkv_format='bshd'": lambda: te.DotProductAttention(2, 8)(Q, Q, Q, qkv_format="bshd"),
    "documents": lambda: te.DotProductAttention(2, 8, attn_mask_type="padding_causal")(
        Q, Q, Q, qkv_format="thd"
    ),
    "attention_dropout": lambda: te.DotProductAttention(2, 8, 2, 0.1, cp_group=TwoRanks())(Q, Q, Q),
    "attention_mask": lambda: te.DotProductAttention(2, 8)(Q, Q, Q, torch.ones(4, 4)),
    "attn_mask_type='padding'": lambda: te.DotProductAttention(2, 8, attn_mask_type="padding")(
        Q, Q, Q
    ),
    "core_attention_bias": lambda: te.DotProductAttention(2, 8)(Q, Q, Q, core_attention_bias="x"),
    "causal mask over 3 keys": lambda: te.DotProductAttention(2, 8)(Q, Q[:3], Q[:3]),
    "label_smoothing": lambda: parallel_cross_entropy(Q, Q, label_smoothing=0.1),
    "is_cg_capturable": lambda: parallel_cross_entropy(Q, Q, is_cg_capturable=True),
    "quantized parameters": lambda: te.quantized_model_init().__enter__(),
    "CudaRNGStatesTracker": CudaRNGStatesTracker,
    "checkpoint": lambda: checkpoint(print, distribute_saved_activations=True),
    "FusedSGD": lambda: optimizers.FusedSGD([]),
    "amsgrad": lambda: optimizers.FusedAdam([Q], amsgrad=True),
    "master_weights": lambda: optimizers.FusedAdam([Q], master_weights=True),
    "without_bias_correction": lambda: optimizers.FusedAdam([Q], bias_correction=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        REFUSED[name]()


def test_contexts_that_are_off_do_nothing() -> None:
    with te.autocast(enabled=False), te.quantized_model_init(enabled=False):
        assert te.Linear(4, 4)(torch.ones(1, 4)).shape == (1, 4)


def test_looks_like_an_installed_package() -> None:
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.origin == transformer_engine.__file__
    assert list(transformer_engine.__path__)
    assert tuple(map(int, transformer_engine.__version__.split(".")[:2])) >= (2, 14)


@pytest.mark.parametrize(
    ("call", "result"), [("install()", "real"), ("install(emulate=True)", "stand-in")]
)
def test_an_installed_library_comes_first_unless_its_gpu_lacks_a_format(
    call: str, result: str, tmp_path: Path
) -> None:
    real = tmp_path / "transformer_engine"
    real.mkdir()
    (real / "__init__.py").write_text("__version__ = '9.9'\n")
    code = (
        "import sys; sys.path.append(sys.argv[1]);"
        "from precision.backend import install_transformer_engine as install;"
        f"assert {call}[0] == {call}[0] == {result!r};"
        f"assert any('standins' in p for p in sys.path) == ({result!r} == 'stand-in')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2]
    )


@pytest.mark.parametrize(
    ("capability", "native"), [((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_which_gpus_have_which_formats(capability: tuple[int, int], native: bool) -> None:
    asked = {"nvfp4", "mxfp8", "bf16"}
    assert needs_emulation(asked, capability) == ([] if native else ["mxfp8", "nvfp4"])
    assert needs_emulation({"bf16"}, capability) == []
