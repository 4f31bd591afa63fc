"""Linear layers of the Transformer Engine stand-in under a quantization recipe.

The reference works each product out by itself in float64 from dequantised operands, which
test_nvfp4.py and test_mxfp8.py hold against other sources.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends import install_backends
from precision import hadamard, mxfp8, nvfp4
from precision.formats import E4M3, E5M2

install_backends("host")

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common import recipe as recipes  # noqa: E402
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

TOKENS, INPUTS, OUTPUTS = 64, 96, 128
NEAREST = {"disable_stochastic_rounding": True}
RECIPES: dict[str, Callable[[], Any]] = {
    "nvfp4": lambda: recipes.NVFP4BlockScaling(**NEAREST),
    "nvfp4 no rht": lambda: recipes.NVFP4BlockScaling(disable_rht=True, **NEAREST),
    "nvfp4 no 2d": lambda: recipes.NVFP4BlockScaling(disable_2d_quantization=True, **NEAREST),
    "mxfp8": recipes.MXFP8BlockScaling,
    "mxfp8 2d": lambda: recipes.MXFP8BlockScaling(enable_2d_quantization=True),
    "mxfp8 hybrid": lambda: recipes.MXFP8BlockScaling(fp8_format=recipes.Format.HYBRID),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    FP8GlobalStateManager.reset()


def operands(x: Tensor, kind: str, recipe: Any) -> tuple[Tensor, Tensor]:
    """Row-wise and column-wise operands of a tensor by the recipe, float64."""
    if recipe.mxfp8() and kind == "weight" and recipe.enable_2d_quantization:
        pair = [mxfp8.quantize(x, mxfp8.SQUARE)] * 2
    elif recipe.mxfp8():
        gradient = kind == "grad" and recipe.fp8_format == recipes.Format.HYBRID
        form = E5M2 if gradient else E4M3
        pair = [mxfp8.quantize(x, way, form) for way in (mxfp8.ROWWISE, mxfp8.COLUMNWISE)]
    elif kind == "weight" and not recipe.disable_2d_quantization:
        pair = [nvfp4.quantize(x, nvfp4.SQUARE)] * 2
    else:
        turned = x if recipe.disable_rht or kind == "weight" else hadamard.transform(x)
        pair = [nvfp4.quantize(x, nvfp4.ROWWISE), nvfp4.quantize(turned, nvfp4.COLUMNWISE)]
    rows, columns = (p.dequantize().double() for p in pair)
    return rows, columns


def definition(x: Tensor, w: Tensor, g: Tensor, recipe: Any) -> list[Tensor]:
    """y, dx and dw, one product after the other."""
    xr, xc = operands(x, "input", recipe)
    wr, wc = operands(w, "weight", recipe)
    gr, gc = operands(g, "grad", recipe)
    return [xr @ wr.T, gr @ wc, gc.T @ xc]


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS)
    x, w, g = (torch.randn(s).to(dtype) for s in shapes)
    return x, w, g / 1000


def run(layer: Any, x: Tensor, g: Tensor, recipe: Any, **forward: Any) -> list[Tensor]:
    """y, dx, dw; the backward pass runs outside of the context, as in training."""
    x = x.detach().requires_grad_()
    layer.weight.grad = None
    with te.autocast(recipe=recipe):
        y = layer(x, **forward)
    y.backward(g.view_as(y))
    assert x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_against_the_definition(name: str, dtype: torch.dtype) -> None:
    recipe = RECIPES[name]()
    x, w, g = data(dtype)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=dtype)
    layer.weight.data.copy_(w)
    found = run(layer, x.view(16, 4, INPUTS), g, recipe)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    for actual, wanted in zip(found, definition(x, w, g, recipe), strict=True):
        assert actual.dtype == dtype
        # Sums in FP32 are off by a little of their largest terms.
        slack = 1e-6 * wanted.abs().max().item()
        slack += 2**-25 if dtype == torch.float16 else 0.0  # half a subnormal step
        torch.testing.assert_close(
            actual.double(), wanted.view_as(actual), rtol=rounding, atol=slack
        )
    assert layer.quantized_with == name.split()[0]


def test_saving_the_input_changes_when_it_is_quantized_only() -> None:
    x, w, g = data(torch.bfloat16)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    wanted = run(layer, x, g, RECIPES["nvfp4"]())
    layer.save_original_input = True
    assert all(map(torch.equal, run(layer, x, g, RECIPES["nvfp4"]()), wanted))
    # Megatron empties an input that it can recompute, and fills it again before it is needed.
    kept = x.clone().requires_grad_()
    layer.weight.grad = None
    with te.autocast(recipe=RECIPES["nvfp4"]()):
        y = layer(kept)
    with torch.no_grad():
        kept.untyped_storage().resize_(0)
        kept.untyped_storage().resize_(x.untyped_storage().size())
        kept.data.copy_(x)
    y.backward(g)
    assert torch.equal(layer.weight.grad, wanted[2])


def test_layer_norm_linear_quantizes_the_norm_as_stored() -> None:
    settings: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
    fused = te.LayerNormLinear(INPUTS, OUTPUTS, normalization="RMSNorm", **settings)
    norm = te.RMSNorm(INPUTS, params_dtype=torch.bfloat16)
    plain = te.Linear(INPUTS, OUTPUTS, **settings)
    plain.weight.data.copy_(fused.weight.data)
    x, _, g = data(torch.bfloat16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with te.autocast(recipe=RECIPES["nvfp4"]()):
        outputs = fused(inputs[0]), plain(norm(inputs[1]))
    for y in outputs:
        y.backward(g)
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    assert torch.equal(fused.weight.grad, plain.weight.grad)
    assert torch.equal(fused.layer_norm_weight.grad, norm.weight.grad)


@pytest.mark.parametrize("name", RECIPES)
def test_grouped_linear_is_a_linear_an_expert(name: str) -> None:
    recipe, splits = RECIPES[name](), [32, 0, 96, 64, 0]
    settings: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
    grouped = te.GroupedLinear(5, INPUTS, OUTPUTS, **settings)
    # Experts with very different magnitudes: a shared tensor scale would show.
    size = torch.tensor([1.0] * 32 + [30.0] * 96 + [0.01] * 64)[:, None]
    x = (torch.randn(192, INPUTS) * size).bfloat16().requires_grad_()
    g = (torch.randn(192, OUTPUTS) / size).bfloat16()
    with te.autocast(recipe=recipe):
        y = grouped(x, splits)
    y.backward(g)
    start = 0
    for i, count in enumerate(splits):
        weight, rows = getattr(grouped, f"weight{i}"), slice(start, start + count)
        if not count:
            assert not weight.grad.any()
            continue
        alone = te.Linear(INPUTS, OUTPUTS, **settings)
        alone.weight.data.copy_(weight.data)
        found = run(alone, x[rows], g[rows], recipe)
        assert x.grad is not None
        for actual, wanted in zip((y[rows], x.grad[rows], weight.grad), found, strict=True):
            assert torch.equal(actual, wanted)
        start += count
    assert grouped.quantized_with == name.split()[0]


def test_padding_of_experts() -> None:
    pad, unpad = te.Fp8Padding(3), te.Fp8Unpadding(3)
    x = torch.randn(75, 4, requires_grad=True)
    splits = [70, 0, 5]
    with te.autocast(recipe=recipes.NVFP4BlockScaling()):
        padded, counts = pad(x, splits)
        back = unpad(padded, splits)
    assert counts == [128, 0, 128] and padded.shape == (256, 4)
    assert torch.equal(padded[:70], x[:70]) and torch.equal(padded[128:133], x[70:])
    assert (padded[70:128] == 0).all() and (padded[133:] == 0).all()
    assert torch.equal(back, x)
    back.backward(torch.ones(75, 4))
    assert x.grad is not None and (x.grad == 1).all()
    exact = te.Fp8Padding(2, align_size=8)
    assert exact(x[:24], [8, 16])[0] is not None and exact(x[:24], [8, 16])[1] == [8, 16]


def test_stochastic_rounding_of_gradients_only() -> None:
    x, w, g = data(torch.bfloat16)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    recipe = recipes.NVFP4BlockScaling()
    FP8GlobalStateManager.seed_stochastic_rounding(5)
    first = run(layer, x, g, recipe)
    state = FP8GlobalStateManager.get_stochastic_rounding_state()
    second = run(layer, x, g, recipe)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[2], second[2])
    torch.rand(7)  # its draws are its own
    FP8GlobalStateManager.reset()
    FP8GlobalStateManager.set_stochastic_rounding_state(state)
    again = run(layer, x, g, recipe)
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    FP8GlobalStateManager.seed_stochastic_rounding(5)
    assert torch.equal(run(layer, x, g, recipe)[2], first[2])
    FP8GlobalStateManager.seed_stochastic_rounding(6)
    assert not torch.equal(run(layer, x, g, recipe)[2], first[2])

    mean = torch.stack([run(layer, x, g, recipe)[1].double() for _ in range(200)])
    exact = g.double() @ operands(w, "weight", recipe)[1]
    bias = (mean.mean(0) - exact).norm() / exact.norm()
    assert bias < 0.03, "one draw is 0.17 off; 200 draws average to a fourteenth of it"


def test_weights_are_quantized_once_a_step_and_never_stale() -> None:
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.float32)
    x, _, g = data(torch.float32)
    recipe = RECIPES["mxfp8"]()
    made: list[str] = []
    layer.observer = lambda module, role, before, after: made.append(role)

    def weights_made(**forward: Any) -> int:
        made.clear()
        found = run(layer, x, g, RECIPES["mxfp8"](), **forward)
        wanted = definition(x, layer.weight.detach(), g, recipe)
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-7)
        return sum(role.startswith("weight") for role in made)

    assert weights_made(is_first_microbatch=True) == 2
    assert weights_made(is_first_microbatch=False) == 0
    with torch.no_grad():
        layer.weight.mul_(2)  # changed behind the caller's back
    assert weights_made(is_first_microbatch=False) == 2
    layer.weight.data = layer.weight.data + 1
    assert weights_made(is_first_microbatch=False) == 2
    assert weights_made(is_first_microbatch=None) == 2
    assert weights_made(is_first_microbatch=True) == 2
    made.clear()
    with torch.no_grad(), te.autocast(recipe=RECIPES["mxfp8"]()):
        layer(x, is_first_microbatch=True)
    assert made == ["weight", "input"], "without gradients only what the forward product reads"
    assert weights_made(is_first_microbatch=False) == 2
    run(layer, x, g, RECIPES["nvfp4"](), is_first_microbatch=False)
    assert layer.quantized_with == "nvfp4", "another recipe never finds the weights of the last"


def test_contexts_nest_and_restore() -> None:
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.float32)
    x, _, _ = data(torch.float32)

    def ran() -> str:
        layer(x)
        return str(layer.quantized_with)

    manager = FP8GlobalStateManager
    outer = RECIPES["nvfp4"]()
    with te.autocast(recipe=outer):
        assert manager.is_fp8_enabled() and manager.get_fp8_recipe() is outer
        assert manager.is_first_fp8_module() and not manager.is_first_fp8_module()
        with te.fp8_autocast(fp8_recipe=RECIPES["mxfp8"]()):
            assert ran() == "mxfp8"
        with te.fp8_autocast(enabled=False):
            assert ran() == "bf16" and not manager.is_fp8_enabled()
        assert ran() == "nvfp4" and manager.get_fp8_recipe() is outer
        with pytest.raises(RuntimeError, match="inside"), te.autocast(enabled=False):
            raise RuntimeError("inside")
        assert ran() == "nvfp4"
    assert ran() == "bf16" and not manager.is_fp8_enabled()


def test_switches_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in ("rht", "stochastic_rounding", "2d_quantization"):
        assert not getattr(recipes.NVFP4BlockScaling(), f"disable_{switch}")
        monkeypatch.setenv(f"NVTE_NVFP4_DISABLE_{switch.upper()}", "1")
        assert getattr(recipes.NVFP4BlockScaling(), f"disable_{switch}")


def test_observer_sees_what_the_products_read() -> None:
    x, w, g = data(torch.float32)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.float32)
    layer.weight.data.copy_(w)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layer.observer = lambda module, role, before, after: seen.update({role: (before, after)})
    recipe = RECIPES["nvfp4"]()
    run(layer, x, g, recipe)
    wanted = {
        "input": (x, operands(x, "input", recipe)[0]),
        "weight": (w, operands(w, "weight", recipe)[0]),
        "input_columnwise": (hadamard.transform(x), operands(x, "input", recipe)[1]),
        "grad_output": (g, operands(g, "grad", recipe)[0]),
        "grad_output_columnwise": (hadamard.transform(g), operands(g, "grad", recipe)[1]),
    }
    assert seen.keys() == wanted.keys()
    for role, (before, after) in wanted.items():
        assert torch.equal(seen[role][0], before) and torch.equal(seen[role][1].double(), after)


def hybrid_factory(role: Any) -> Any:
    """High precision forward, MXFP8 backward; NVFP4 for modules called "four"."""
    if role.name == "four":
        return te.NVFP4Quantizer(with_2d_quantization=role.tensor_type == "weight")
    backward = te.MXFP8Quantizer(te.DType.kFloat8E4M3)
    if role.tensor_type == "grad_output":
        return backward
    return te.HybridQuantizer(
        rowwise_quantizer=te.IdentityQuantizer(), columnwise_quantizer=backward
    )


def test_custom_recipe() -> None:
    x, w, g = data(torch.float32)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.float32)
    layer.weight.data.copy_(w)
    recipe = recipes.CustomRecipe(qfactory=hybrid_factory)
    found = run(layer, x, g, recipe)
    wanted = definition(x, w, g, recipes.MXFP8BlockScaling())
    wanted[0] = x.double() @ w.double().T
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert layer.quantized_with == "hybrid_factory"
    seen: list[str] = []
    layer.observer = lambda module, role, before, after: seen.append(role)
    run(layer, x, g, recipe)
    assert sorted(seen) == [
        *("grad_output", "grad_output_columnwise", "input_columnwise", "weight_columnwise")
    ], "what is left as it is, is not observed"
    again = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.float32, name="four")
    again.weight.data.copy_(w)
    plain = RECIPES["nvfp4 no rht"]()
    for a, b in zip(run(again, x, g, recipe), run(again, x, g, plain), strict=True):
        assert torch.equal(a, b)


REFUSED: dict[str, Callable[[], Any]] = {
    "DelayedScaling": recipes.DelayedScaling,
    "Float8CurrentScaling": recipes.Float8CurrentScaling,
    "Float8BlockScaling": recipes.Float8BlockScaling,
    "the default recipe": lambda: None,
    "nvfp4_4over6": lambda: recipes.NVFP4BlockScaling(nvfp4_4over6="all"),
    "row_scaled_activation": lambda: recipes.NVFP4BlockScaling(row_scaled_activation=True),
    "fp8_dpa": lambda: recipes.MXFP8BlockScaling(fp8_dpa=True),
    "backward_override": lambda: recipes.NVFP4BlockScaling(backward_override="dequantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_recipes(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name), te.autocast(recipe=REFUSED[name]()):
        pass
    assert not FP8GlobalStateManager.is_fp8_enabled()


@pytest.mark.parametrize("tokens, inputs, outputs", [(24, 64, 64), (64, 72, 64), (64, 64, 72)])
def test_refused_shapes(tokens: int, inputs: int, outputs: int) -> None:
    layer = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16)
    refusal = pytest.raises(ValueError, match="multiples of 16")
    with te.autocast(recipe=recipes.NVFP4BlockScaling()), refusal:
        layer(torch.ones(tokens, inputs, dtype=torch.bfloat16))


def test_refused_factories() -> None:
    layer = te.Linear(64, 64, bias=False)
    for answer, error, match in (
        (None, ValueError, "IdentityQuantizer"),
        ("fp8", NotImplementedError, "quantizer str"),
    ):
        recipe = recipes.CustomRecipe(qfactory=lambda role, answer=answer: answer)
        with te.autocast(recipe=recipe), pytest.raises(error, match=match):
            layer(torch.ones(16, 64))
    with pytest.raises(NotImplementedError, match="nvfp4_use_4over6"):
        te.NVFP4Quantizer(nvfp4_use_4over6=True)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("tokens", [(0,), (0, 4), (16, 0)])
def test_without_tokens(name: str, tokens: tuple[int, ...]) -> None:
    layer = te.Linear(64, 32, bias=False, params_dtype=torch.bfloat16)
    x = torch.zeros(*tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    with te.autocast(recipe=RECIPES[name]()):
        y = layer(x)
    y.sum().backward()
    assert y.shape == (*tokens, 32) and (layer.weight.grad == 0).all()
    assert x.grad is not None and x.grad.shape == x.shape


def test_parts_of_the_recipe_can_be_replaced() -> None:
    x, w, g = data(torch.bfloat16)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    recipe = recipes.NVFP4BlockScaling(**NEAREST)
    run(layer, x, g, recipe)
    recipe.fp4_quant_fwd_inp = recipe.fp4_quant_bwd_grad = recipes.QParams()
    wanted = run(layer, x, g, RECIPES["nvfp4 no rht"]())
    assert all(map(torch.equal, run(layer, x, g, recipe), wanted))
    for form in ({"fp4_format": recipes.Format.E4M3}, {"fp8_format": recipes.Format.E5M2}):
        with pytest.raises(AssertionError, match="NVFP4 has"):
            recipes.NVFP4BlockScaling(**form)
