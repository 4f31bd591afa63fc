"""mamba_ssm's public functions as the stand-in provides them, against independent formulas.

Shapes: b batch, l time, h head, p head channel, g group, n state, w tap.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.causal_conv import CausalConv
from model.mamba_ssm_standin import (
    RMSNorm,
    causal_conv1d_fn,
    causal_conv1d_varlen_states,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

B_, H, P, G, N, W = 2, 4, 3, 2, 5, 4
INNER = H * P
CHANNELS = INNER + 2 * G * N


def mixer_step_by_step(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    gated: bool = True,
) -> Tensor:
    """Convolution, scan and gate of one document, a token at a time."""
    outputs, state = [], torch.zeros(len(zxbcdt), H, P, N, dtype=zxbcdt.dtype)
    for t in range(zxbcdt.shape[1]):
        v = conv1d_bias
        for tap in range(W):
            source = t - (W - 1 - tap)
            if source >= 0:
                v = v + conv1d_weight[:, tap] * zxbcdt[:, source, INNER : INNER + CHANNELS]
        v = v * torch.sigmoid(v)
        x = v[:, :INNER].reshape(-1, H, P)
        B = v[:, INNER : INNER + G * N].reshape(-1, G, 1, N).expand(-1, G, H // G, N)
        C = v[:, INNER + G * N :].reshape(-1, G, 1, N).expand(-1, G, H // G, N)
        dt = torch.log1p(torch.exp(zxbcdt[:, t, -H:] + dt_bias))
        decay = torch.exp(dt * A)
        state = decay[..., None, None] * state + torch.einsum(
            "bh,bhp,bhn->bhpn", dt, x, B.reshape(-1, H, N)
        )
        y = torch.einsum("bhpn,bhn->bhp", state, C.reshape(-1, H, N)) + D[:, None] * x
        z = zxbcdt[:, t, :INNER]
        outputs.append(y.reshape(-1, INNER) * (z * torch.sigmoid(z) if gated else 1))
    return torch.stack(outputs, 1)


def draw(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    rate = -torch.rand(H, generator=rng, dtype=torch.float64) * 4
    return {
        "zxbcdt": normal(B_, length, INNER + CHANNELS + H),
        "conv1d_weight": normal(CHANNELS, W),
        "conv1d_bias": normal(CHANNELS),
        "dt_bias": normal(H),
        "A": rate.to(dtype).requires_grad_(),
        "D": normal(H),
    }


def split_scan(t: dict[str, Any], **options: Any) -> Any:
    return mamba_split_conv1d_scan_combined(**t, chunk_size=128, headdim=P, ngroups=G, **options)


def assert_same_gradients(t: dict[str, Tensor], expected: Tensor, got: Tensor) -> None:
    weights = torch.randn_like(expected)
    true = torch.autograd.grad(expected, list(t.values()), weights)
    mine = torch.autograd.grad(got, list(t.values()), weights)
    for name, a, b in zip(t, true, mine, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("length", [1, 3, 32, 75])
def test_split_scan_is_the_mixer_step_by_step(length: int) -> None:
    t = draw(length)
    expected, got = mixer_step_by_step(**t), split_scan(t)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(t, expected, got)


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_split_scan_with_norm_and_output_projection(norm_before_gate: bool) -> None:
    t = draw(9)
    extra = {
        "rmsnorm_weight": torch.randn(INNER, dtype=torch.float64, requires_grad=True),
        "outproj_weight": torch.randn(7, INNER, dtype=torch.float64, requires_grad=True),
        "outproj_bias": torch.randn(7, dtype=torch.float64, requires_grad=True),
    }
    y = mixer_step_by_step(**t, gated=False)
    z = t["zxbcdt"][..., :INNER]
    gate = z * torch.sigmoid(z)
    y = y if norm_before_gate else y * gate
    groups = y.unflatten(-1, (G, -1))
    y = (groups / torch.sqrt((groups**2).mean(-1, keepdim=True) + 1e-6)).flatten(-2)
    y = y * extra["rmsnorm_weight"]
    y = y * gate if norm_before_gate else y
    expected = y @ extra["outproj_weight"].T + extra["outproj_bias"]
    got = split_scan(t, norm_before_gate=norm_before_gate, **extra)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(t | extra, expected, got)


@pytest.mark.parametrize("lengths", [(5, 1, 2, 40, 3), (32, 32), (1, 1, 1)])
def test_packed_documents_equal_documents_alone(lengths: tuple[int, ...]) -> None:
    t = draw(sum(lengths))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    got = split_scan(t, seq_idx=numbers.expand(B_, -1).to(torch.int32))
    alone = [
        mixer_step_by_step(**(t | {"zxbcdt": part}))
        for part in t["zxbcdt"].split(list(lengths), dim=1)
    ]
    expected = torch.cat(alone, dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(t, expected, got)


def test_the_past_of_the_mixer_does_not_see_the_future() -> None:
    t = draw(70, torch.float32)
    future = t["zxbcdt"].detach().clone()
    future[:, 41:] = 50
    y, y_changed = split_scan(t), split_scan(t | {"zxbcdt": future})
    assert torch.equal(y[:, :41], y_changed[:, :41])
    assert not torch.equal(y[:, 41], y_changed[:, 41])


def test_a_split_sequence_continues_from_the_final_state() -> None:
    """Without a convolution (a single tap), so that the state is all there is to carry."""
    t = draw(50)
    t["conv1d_weight"] = torch.randn(CHANNELS, 1, dtype=torch.float64, requires_grad=True)
    whole, final = split_scan(t, return_final_states=True)
    first, second = t["zxbcdt"].split([33, 17], dim=1)
    y1, state = split_scan(t | {"zxbcdt": first}, return_final_states=True)
    y2, end = split_scan(t | {"zxbcdt": second}, initial_states=state, return_final_states=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(end, final, rtol=1e-11, atol=1e-11)
    # The gradient reaches the first half through the state as well.
    loss = (y2.square().sum() + end.sum(), whole[:, 33:].square().sum() + final.sum())
    for a, b in zip(*(torch.autograd.grad(v, list(t.values())) for v in loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_split_scan() -> None:
    t = draw(4)
    state = torch.randn(B_, H, P, N, dtype=torch.float64, requires_grad=True)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return split_scan(
            dict(zip(t, tensors, strict=False)),
            initial_states=tensors[-1],
            return_final_states=True,
            dt_limit=(0.1, 2.0),
        )

    assert torch.autograd.gradcheck(run, (*t.values(), state))


def chunk_scan_arguments(length: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).requires_grad_()

    return {
        "x": normal(B_, length, H, P),
        "dt": normal(B_, length, H),
        "A": (-torch.rand(H, generator=rng, dtype=torch.float64)).requires_grad_(),
        "B": normal(B_, length, G, N),
        "C": normal(B_, length, G, N),
        "D": normal(H),
        "z": normal(B_, length, H, P),
        "dt_bias": normal(H),
        "initial_states": normal(B_, H, P, N),
    }


def test_gradcheck_of_the_chunk_scan() -> None:
    t = chunk_scan_arguments(3)

    def run(*tensors: Tensor) -> Any:
        named: dict[str, Any] = dict(zip(t, tensors, strict=True))
        return mamba_chunk_scan_combined(
            **named, chunk_size=2, dt_softplus=True, return_final_states=True
        )

    assert torch.autograd.gradcheck(run, tuple(t.values()))


def test_chunk_scan_agrees_with_hugging_face() -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h

    reference = modeling_nemotron_h.mamba2_chunk_scan.__wrapped__  # the plain PyTorch function
    t = {name: v.detach().float() for name, v in chunk_scan_arguments(70).items()}
    z = t.pop("z")
    options: dict[str, Any] = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
    y_true, final_true = reference(t.pop("x"), **t, **options)
    t = {name: v.detach().float() for name, v in chunk_scan_arguments(70).items()}
    y, final = mamba_chunk_scan_combined(**t, **options)
    torch.testing.assert_close(y, y_true * F.silu(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final.float(), final_true, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float64() -> None:
    t16 = {k: v.detach().requires_grad_() for k, v in draw(100, torch.bfloat16).items()}
    for name in ("dt_bias", "A", "D"):  # as Megatron passes them
        t16[name] = t16[name].detach().float().requires_grad_()
    t64 = {k: v.detach().double().requires_grad_() for k, v in t16.items()}
    expected, got = mixer_step_by_step(**t64), split_scan(t16)
    assert got.dtype == torch.bfloat16
    weights = torch.randn_like(expected).bfloat16()
    true = torch.autograd.grad(expected, list(t64.values()), weights.double())
    mine = torch.autograd.grad(got, list(t16.values()), weights)
    for name, a, b in zip(["y", *t16], [expected, *true], [got, *mine], strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error < 2e-2, f"{name}: {error:.1e}"
    assert [g.dtype for g in mine] == [t.dtype for t in t16.values()]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (3, 4), (300, 4), (7, 1), (7, 2)])
def test_convolution_is_conv1d(
    length: int, width: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.tiling.SPAN_ELEMENTS", 64 * 6)
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 6, length), (6, width), (6,))
    )
    expected = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=6)[..., :length]
    expected = F.silu(expected) if activation else expected
    got = causal_conv1d_fn(x, weight, bias, activation=activation)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients({"x": x, "weight": weight, "bias": bias}, expected, got)


def test_convolution_of_packed_documents_across_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.tiling.SPAN_ELEMENTS", 4 * 3)  # spans of four tokens
    lengths = (1, 2, 3, 4, 5, 2)
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    got = CausalConv.apply(x, weight, None, numbers, True)
    alone = [CausalConv.apply(part, weight, None, None, True) for part in x.split(lengths, dim=1)]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients({"x": x, "weight": weight}, expected, got)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("gate", ["none", "before", "after"])
def test_gated_norm_is_its_formula(
    gate: str, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.tiling.SPAN_ELEMENTS", 50)
    norm = RMSNorm(12, 1e-5, group_size, norm_before_gate=gate == "after", dtype=torch.float64)
    assert list(norm.state_dict()) == ["weight"]
    assert norm.bias is None
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    silu = z / (1 + torch.exp(-z))
    y = x * silu if gate == "before" else x
    blocks = y.unflatten(-1, (-1, group_size or 12))
    y = (blocks / (blocks.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * norm.weight
    expected = y * silu if gate == "after" else y
    got = norm(x, None if gate == "none" else z)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    t = {"x": x, "weight": norm.weight} | ({} if gate == "none" else {"z": z})
    assert_same_gradients(t, expected, got)


def test_gated_norm_agrees_with_hugging_face() -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    reference = NemotronHRMSNormGated(32, group_size=8, eps=1e-5)
    norm = RMSNorm(32, eps=1e-5, group_size=8, norm_before_gate=False)
    weight = torch.randn(32)
    reference.weight.data, norm.weight.data = weight, weight.clone()
    x, z = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    torch.testing.assert_close(norm(x, z), reference(x, z), rtol=1e-5, atol=1e-6)
    assert norm(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        ({"return_varlen_states": True}, "return_varlen_states"),
        ({"D": torch.ones(H, P)}, "D of shape"),
        ({"dt_limit": (-1.0, 1.0)}, "dt_limit"),
        ({"seq_idx": torch.tensor([[-1, 0, 0], [0, 0, 0]])}, "seq_idx"),
    ],
)
def test_chunk_scan_names_what_it_does_not_implement(options: dict[str, Any], named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        mamba_chunk_scan_combined(**(chunk_scan_arguments(3) | options), chunk_size=4)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"activation": "gelu"}, NotImplementedError, "activation='gelu'"),
        ({"outproj_bias": torch.ones(3)}, ValueError, "outproj_bias"),
        ({"ngroups": 3}, ValueError, "ngroups=3"),
        ({"headdim": None}, ValueError, "headdim"),
        ({"headdim": 3 * P}, ValueError, "conv1d_weight"),
        ({"zxbcdt": torch.ones(1, 3, 100)}, NotImplementedError, "zxbcdt wider"),
        ({"zxbcdt": torch.ones(1, 3, 10)}, ValueError, "zxbcdt"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_split_scan_refuses_by_name(
    options: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments = {"chunk_size": 4, "headdim": P, "ngroups": G} | draw(3) | options
    with pytest.raises(error, match=named):
        mamba_split_conv1d_scan_combined(**arguments)


def test_other_refusals() -> None:
    x, weight = torch.ones(1, 6, 4), torch.ones(6, 4)
    with pytest.raises(NotImplementedError, match="initial_states"):
        causal_conv1d_fn(x, weight, initial_states=torch.ones(1, 6, 3))
    with pytest.raises(NotImplementedError, match="return_final_states"):
        causal_conv1d_fn(x, weight, return_final_states=True)
    with pytest.raises(NotImplementedError, match="causal_conv1d_varlen_states"):
        causal_conv1d_varlen_states(x, torch.tensor([0, 4]), 3)
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast"):
        split_scan(draw(3))
    with pytest.raises(ValueError, match="group_size=5"):
        RMSNorm(12, group_size=5)


INSTALLED = """
import importlib, importlib.util, sys
from model.mamba_ssm_standin import install
assert install() == install() == ("stand-in", "2.3.2")
for name in ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"):
    assert importlib.util.find_spec(name).name == name
    assert importlib.import_module(name) is sys.modules[name]
import mamba_ssm
assert mamba_ssm.__strata_standin__ and mamba_ssm.__path__ == []
try:
    import mamba_ssm.modules.mamba2
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("a module that is not there was imported")
from megatron.core.ssm import mamba_mixer
assert mamba_mixer.HAVE_MAMBA_SSM
assert mamba_mixer.RMSNormGated.__module__ == "model.mamba_ssm_standin"
assert mamba_mixer._check_mamba_sequence_packing_support(False) == (True, None)
print("fine")
"""

TOO_LATE = """
import sys, types
sys.modules["megatron.core.ssm.mamba_mixer"] = types.ModuleType("imported before")
from model.mamba_ssm_standin import install
try:
    install()
except RuntimeError as error:
    assert "before megatron" in str(error)
    print("fine")
"""


@pytest.mark.parametrize("script", [INSTALLED, TOO_LATE], ids=["in-time", "too-late"])
def test_install(script: str) -> None:
    """In a process of its own: what is imported cannot be taken back."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip().endswith("fine"), result.stderr
