"""The chunked scan against the recurrence it stands for, step by step, in float64.

Shapes: b batch, l time, h head, p head channel, g group, n state.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import ssd
from model.ssd import ScanInputs, scan_backward, scan_forward

SHAPE = {"b": 2, "h": 4, "p": 3, "g": 2, "n": 5}


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = exp(dt A) S + dt x B^T, y = S C + D x, one token and one head at a time."""
    batch, length, heads, _ = x.shape
    per_group = heads // B.shape[2]
    rows = []
    for b in range(batch):
        columns = []
        for h in range(heads):
            S, g, outputs = state[b, h], h // per_group, []
            for t in range(length):
                step = dt[b, t, h]
                S = torch.exp(step * A[h]) * S + step * torch.outer(x[b, t, h], B[b, t, g])
                outputs.append(S @ C[b, t, g] + D[h] * x[b, t, h])
            columns.append((torch.stack(outputs), S))
        rows.append((torch.stack([y for y, _ in columns], 1), torch.stack([S for _, S in columns])))
    return torch.stack([y for y, _ in rows]), torch.stack([S for _, S in rows])


def draw(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Random inputs with decays between nearly none and nearly total."""
    rng = torch.Generator().manual_seed(seed)
    b, h, p, g, n = SHAPE.values()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    step = torch.rand(b, length, h, generator=rng, dtype=torch.float64) ** 4 * 2
    rate = -torch.rand(h, generator=rng, dtype=torch.float64) * 8
    return {
        "x": normal(b, length, h, p),
        "dt": step.to(dtype).requires_grad_(),
        "A": rate.to(dtype).requires_grad_(),
        "B": normal(b, length, g, n),
        "C": normal(b, length, g, n),
        "D": normal(h),
        "state": normal(b, h, p, n),
    }


def inputs_of(t: dict[str, Any], chunk_len: int, seq_idx: Tensor | None = None) -> ScanInputs:
    x, dt, A, B, C, D = (t[name].detach() for name in ("x", "dt", "A", "B", "C", "D"))
    return ScanInputs(x, dt, A, B, C, D, seq_idx, chunk_len)


@pytest.mark.parametrize("block_elements", [1, 1 << 20], ids=["chunk-by-chunk", "one-block"])
@pytest.mark.parametrize(("length", "chunk_len"), [(1, 8), (7, 8), (8, 8), (37, 8), (16, 1)])
def test_values_and_gradients_are_those_of_the_recurrence(
    length: int, chunk_len: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd, "BLOCK_ELEMENTS", block_elements)
    t = draw(length)
    y_true, final_true = recurrence(**t)
    dy, dfinal = torch.randn_like(y_true), torch.randn_like(final_true)
    true = torch.autograd.grad([y_true, final_true], list(t.values()), [dy, dfinal])

    inputs = inputs_of(t, chunk_len)
    y, starts, final = scan_forward(inputs, t["state"].detach())
    torch.testing.assert_close(y, y_true, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, final_true, rtol=1e-10, atol=1e-10)
    grads = scan_backward(dy, inputs, starts, dfinal)
    for name, expected, got in zip(t, true, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=f"{name}: {{}}".format)


def test_chunk_length_does_not_change_the_result() -> None:
    t = draw(50)
    y_true, _, final_true = scan_forward(inputs_of(t, 50), t["state"].detach())
    for chunk_len in (1, 3, 16, 49, 64):
        y, _, final = scan_forward(inputs_of(t, chunk_len), t["state"].detach())
        torch.testing.assert_close(y, y_true, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(final, final_true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_past_does_not_see_the_future(dtype: torch.dtype) -> None:
    t = draw(40, dtype=dtype)
    inputs = inputs_of(t, 16)._replace(dt_blh=t["dt"].detach().float(), A_h=t["A"].detach().float())
    now = 21
    changed = {}
    for name in ("x_blhp", "dt_blh", "B_blgn", "C_blgn"):
        changed[name] = getattr(inputs, name).clone()
        changed[name][:, now:] = 100
    y, _, _ = scan_forward(inputs)
    y_changed, _, _ = scan_forward(inputs._replace(**changed))
    assert torch.equal(y[:, :now], y_changed[:, :now])
    assert not torch.equal(y[:, now], y_changed[:, now])


def test_strong_decay_stays_finite() -> None:
    """exp(-s) alone would overflow here; only differences of s may be exponentiated."""
    t = draw(64, dtype=torch.float32)
    inputs = inputs_of(t, 64)._replace(
        dt_blh=torch.full((2, 64, 4), 10.0), A_h=torch.full((4,), -16.0)
    )
    y, starts, final = scan_forward(inputs)
    grads = scan_backward(torch.ones_like(y), inputs, starts)
    assert all(v is not None and torch.isfinite(v).all() for v in (y, final, *grads))


def test_a_step_of_zero_leaves_the_state_alone_and_has_a_gradient() -> None:
    t = draw(6)
    with torch.no_grad():
        t["dt"][:, 2:4] = 0
    y_true, final_true = recurrence(**t)
    (expected,) = torch.autograd.grad(y_true.sum() + final_true.sum(), t["dt"])
    inputs = inputs_of(t, 4)
    y, starts, final = scan_forward(inputs, t["state"].detach())
    grads = scan_backward(torch.ones_like(y), inputs, starts, torch.ones_like(final))
    torch.testing.assert_close(y, y_true, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads.dt_blh, expected, rtol=1e-9, atol=1e-9)


def test_documents_in_a_row_equal_documents_alone() -> None:
    """Borders inside a chunk, on its edge, two in one chunk, and a document over many chunks."""
    lengths, chunk_len = (3, 5, 1, 30, 2, 9), 8
    t = draw(sum(lengths))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = inputs_of(t, chunk_len, numbers.expand(2, -1))
    y, starts, _ = scan_forward(inputs)
    dy = torch.randn_like(y)
    packed = scan_backward(dy, inputs, starts)
    dA, dD = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for start, length in zip((0, 3, 8, 9, 39, 41), lengths, strict=True):
        rows = slice(start, start + length)
        cut = {
            name: getattr(inputs, name)[:, rows]
            for name in ("x_blhp", "dt_blh", "B_blgn", "C_blgn")
        }
        alone = inputs._replace(seq_idx_bl=None, **cut)
        y_alone, starts_alone, _ = scan_forward(alone)
        grads = scan_backward(dy[:, rows], alone, starts_alone)
        torch.testing.assert_close(y[:, rows], y_alone, rtol=1e-11, atol=1e-11)
        for name in cut:
            torch.testing.assert_close(
                getattr(packed, name)[:, rows], getattr(grads, name), rtol=1e-10, atol=1e-10
            )
        dA += grads.A_h
        assert grads.D_h is not None
        dD += grads.D_h
    torch.testing.assert_close(packed.A_h, dA, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed.D_h, dD, rtol=1e-10, atol=1e-10)


def test_another_document_cannot_be_seen_at_all() -> None:
    """Exactly zero, not merely small: a huge document leaves the next one bitwise the same."""
    t = draw(20, dtype=torch.float32)
    inputs = inputs_of(t, 8, (torch.arange(20) >= 11).long().expand(2, -1))
    y, _, _ = scan_forward(inputs)
    other = inputs.x_blhp.clone()
    other[:, :11] = 1e30
    y_other, _, _ = scan_forward(inputs._replace(x_blhp=other))
    assert torch.equal(y[:, 11:], y_other[:, 11:])


def test_an_initial_state_belongs_to_document_zero() -> None:
    t = draw(12)
    state = t["state"].detach()
    first = torch.zeros(2, 12, dtype=torch.long)
    first[:, 5:] = 1
    y, _, _ = scan_forward(inputs_of(t, 4, first), state)
    y_without, _, _ = scan_forward(inputs_of(t, 4, first))
    assert not torch.allclose(y[:, :5], y_without[:, :5])
    assert torch.equal(y[:, 5:], y_without[:, 5:])
    y_later, _, _ = scan_forward(inputs_of(t, 4, first + 1), state)
    assert torch.equal(y_later[:, 5:], y_without[:, 5:])


def test_two_halves_equal_the_whole() -> None:
    t = draw(45)
    whole = inputs_of(t, 8)
    y, _, final = scan_forward(whole)
    names = ("x_blhp", "dt_blh", "B_blgn", "C_blgn")
    state, parts = None, []
    for rows in (slice(0, 19), slice(19, 45)):
        half = whole._replace(**{name: getattr(whole, name)[:, rows] for name in names})
        part, _, state = scan_forward(half, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Relative error (norm of the difference over norm) of the output and of every gradient."""
    rng = torch.Generator().manual_seed(3)
    b, length, h, p, g, n = 2, 300, 8, 16, 2, 16
    x, B, C, dy = (
        torch.randn(b, length, *s, generator=rng).to(dtype)
        for s in ((h, p), (g, n), (g, n), (h, p))
    )
    dt = torch.rand(b, length, h, generator=rng) * 0.1
    A, D = -torch.rand(h, generator=rng) * 15 - 1, torch.ones(h)
    results = []
    for exact in (True, False):
        cast = (lambda t: t.double()) if exact else (lambda t: t)
        inputs = ScanInputs(
            cast(x), cast(dt), cast(A), cast(B), cast(C), cast(D), seq_idx_bl=None, chunk_len=32
        )
        y, starts, _ = scan_forward(inputs)
        results.append((y, *scan_backward(cast(dy), inputs, starts)[:6]))
    for name, expected, got in zip("y dx ddt dA dB dC dD".split(), *results, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


class LargestResult(TorchDispatchMode):
    """Records the size of the largest new tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_temporary_outgrows_a_block() -> None:
    """Nothing of size length x length, length x heads x chunk or B repeated over heads."""
    b, length, h, p, g, n = 1, 8192, 8, 16, 1, 16
    x, B, C = (torch.randn(b, length, *s) for s in ((h, p), (g, n), (g, n)))
    inputs = ScanInputs(x, torch.rand(b, length, h), -torch.ones(h), B, C, None, None, 32)
    with LargestResult() as largest:
        y, starts, _ = scan_forward(inputs)
        scan_backward(y, inputs, starts)
    assert largest.numel <= max(x.numel(), ssd.BLOCK_ELEMENTS)
    assert largest.numel < length * h * 32
