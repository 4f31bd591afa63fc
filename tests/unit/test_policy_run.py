"""The policy on a real Megatron model that runs: what each module says it computed in, inside of
Megatron's own contexts, in the decoder and in MTP, in training and in validation."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.gemms import policy_of
from model.hybrid import build_model, transformer_config
from precision.apply import (
    applied_formats,
    apply_policy,
    check_applied,
    environment,
    linear_modules,
    ran_in,
)
from precision.backend import seed_rounding
from precision.factories import mxfp8_backward, nvfp4_backward
from precision.policy import block_format
from precision.telemetry import Tally, layout_of, tally
from recipes.compose import load_recipe
from recipes.errors import PrecisionError
from recipes.schema import Recipe
from tests.unit.world import fresh_world

SIZES = ("model.mamba_num_heads=32", "model.mamba_head_dim=8")
LENGTH = 256


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with fresh_world(seed=1):
        yield


def tiny(*overrides: str) -> Recipe:
    return load_recipe(["experiment=tiny", *SIZES, *overrides])


def build(of: Recipe) -> Any:
    return build_model(of, transformer_config(of.model, of.precision, of.parallel))


def step(model: Any, training: bool = True) -> float:
    """A forward pass and, in training, a backward pass; the loss."""
    tokens = torch.randint(4096, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand_as(tokens)
    model.train(training)
    model.set_is_first_microbatch()
    with torch.set_grad_enabled(training):
        loss = model(tokens, positions, None, labels=tokens, loss_mask=torch.ones(1, LENGTH))
    if training:
        loss.sum().backward()
    return float(loss.mean())


def formats(model: Any) -> Counter[str]:
    return Counter(ran_in(m) for m in model.modules() if hasattr(m, "finish_init"))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        # 9 layers, of which the last two are protected: MEMEM*E, with 3 M, 3 E and 1 *.
        ("nvfp4", {"nvfp4": 3 + 3 * 4, "mxfp8": 3, "bf16": 3 * 2 + 2 + 2 + 6 + 9}),
        ("nvfp4_all", {"nvfp4": 43}),
        ("mxfp8", {"mxfp8": 43}),
        ("bf16", {"bf16": 43}),
    ],
)
def test_modules_run_in_the_formats_of_the_policy(precision, expected):
    of = tiny(f"precision={precision}")
    model = build(of)
    step(model)
    assert formats(model) == expected
    check_applied(applied_formats([model], policy_of(of)))


def test_validation_runs_in_its_own_format():
    of = tiny("precision=nvfp4", "precision.evaluation=bf16")
    model = build(of)
    plain = build(tiny("precision=bf16"))
    plain.load_state_dict(model.state_dict())
    assert step(model, training=False) == step(plain, training=False)
    assert set(formats(model)) == {"bf16"}
    step(model)
    assert set(formats(model)) == {"nvfp4", "mxfp8", "bf16"}


def test_a_policy_that_was_not_applied_is_noticed():
    of = tiny("precision=nvfp4")
    model = build(of)
    apply_policy([model], policy_of(tiny("precision=bf16")))
    step(model)
    with pytest.raises(PrecisionError, match="ran in bf16 instead of nvfp4"):
        check_applied(applied_formats([model], policy_of(of)))


def test_the_switch_changes_what_the_next_step_computes():
    """To BF16, and the numbers are those of a BF16 run."""
    of = tiny("precision=nvfp4", "precision.switch={to: bf16, at_tokens: 1000}")
    policy, model = policy_of(of), build(of)
    step(model)
    apply_policy([model], policy, 1000)
    plain = build(tiny("precision=bf16"))
    plain.load_state_dict(model.state_dict())
    assert step(model) == step(plain)
    check_applied(applied_formats([model], policy, 1000))
    with pytest.raises(PrecisionError):
        check_applied(applied_formats([model], policy, 999))


def test_forward_pass_in_bf16_with_quantised_gradients():
    """The loss is that of a BF16 run; the gradients are not."""
    of = tiny("precision=nvfp4", "precision.switch={to: bf16_forward, at_tokens: 1000}")
    policy, model = policy_of(of), build(of)
    apply_policy([model], policy, 1000)
    plain = build(tiny("precision=bf16"))
    plain.load_state_dict(model.state_dict())
    assert step(model) == step(plain)
    check_applied(applied_formats([model], policy, 1000))
    assert set(formats(model)) == {"nvfp4_backward", "mxfp8_backward", "bf16"}
    name = "decoder.layers.0.mixer.in_proj.weight"
    assert not torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_backward_formats_are_those_of_the_whole_format(name, monkeypatch):
    """Of one layer: output as in BF16, both gradients as when everything is quantised."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import (
        CustomRecipe,
        MXFP8BlockScaling,
        NVFP4BlockScaling,
    )

    monkeypatch.setenv("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING", "1")
    factory = {"nvfp4": nvfp4_backward, "mxfp8": mxfp8_backward}[name]
    whole = {"nvfp4": NVFP4BlockScaling, "mxfp8": MXFP8BlockScaling}[name]()
    torch.manual_seed(0)
    layer = te.Linear(64, 96, bias=False, params_dtype=torch.bfloat16)
    x, dy = torch.randn(128, 64).bfloat16(), torch.randn(128, 96).bfloat16()

    def products(recipe: Any) -> list[torch.Tensor]:
        layer.weight.grad = None
        given = x.clone().requires_grad_()
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = layer(given)
        y.backward(dy)
        return [y.detach(), given.grad, layer.weight.grad]

    plain, quantised = products(None), products(whole)
    y, dx, dw = products(CustomRecipe(qfactory=factory))
    assert torch.equal(y, plain[0]) and not torch.equal(y, quantised[0])
    assert torch.equal(dx, quantised[1]) and torch.equal(dw, quantised[2])


@pytest.mark.parametrize(
    ("precision", "same"),
    [("nvfp4_no_rht", False), ("nvfp4_rtn", True), ("nvfp4", False)],
)
def test_switches_reach_the_quantisers(precision, same, monkeypatch):
    """Through the environment: rounding to nearest draws nothing, so gradients repeat."""
    of = tiny(f"precision={precision}")
    for variable, value in environment(of.precision).items():
        monkeypatch.setenv(variable, value)
    model = build(of)
    weight = model.get_parameter("decoder.layers.0.mixer.in_proj.weight")
    gradients = []
    for _ in range(2):
        weight.grad = None
        step(model)
        gradients.append(weight.grad)
    assert torch.equal(*gradients) == same


def test_the_transform_can_be_switched_off(monkeypatch):
    """It changes the gradient of weights and nothing before; rounding to nearest draws nothing."""
    model = build(tiny("precision=nvfp4_rtn"))
    weight = model.get_parameter("decoder.layers.0.mixer.in_proj.weight")
    losses, gradients = [], []
    for off in ("false", "true"):
        of = tiny("precision=nvfp4_rtn", f"precision.disable_rht={off}")
        for variable, value in environment(of.precision).items():
            monkeypatch.setenv(variable, value)
        weight.grad = None
        losses.append(step(model))
        gradients.append(weight.grad)
    assert losses[0] == losses[1]
    assert not torch.equal(*gradients)


def test_experts_are_padded_by_zeros_under_allgather():
    """Where the router cannot pad; the tokens of an expert are no multiple of 16 by themselves."""
    of = tiny("precision=nvfp4", "parallel.moe_token_dispatcher_type=allgather")
    model = build(of)
    step(model)
    check_applied(applied_formats([model], policy_of(of)))


@pytest.mark.parametrize(
    "recompute",
    [
        (
            "parallel.recompute_granularity=full",
            "parallel.recompute_method=uniform",
            "parallel.recompute_num_layers=1",
        ),
        (
            "parallel.recompute_granularity=selective",
            "parallel.recompute_modules=[moe,shared_experts]",
        ),
    ],
    ids=["full", "selective"],
)
@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8"])
def test_recomputation_changes_no_bit(precision: str, recompute: tuple[str, ...]) -> None:
    # Stochastic rounding draws in the backward pass only, whose order stays the same.
    found: list[Any] = []
    for overrides in ((), recompute):
        recipe = tiny(f"precision={precision}", *overrides)
        seed_rounding(3)
        torch.manual_seed(5)
        model = build(recipe)
        model.load_state_dict(found[0][2] if found else model.state_dict())
        apply_policy([model], policy_of(recipe))
        kept = {k: v.clone() if hasattr(v, "clone") else v for k, v in model.state_dict().items()}
        loss = step(model)
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append((loss, grads, kept))
        check_applied(applied_formats([model], policy_of(recipe)))
    (loss, grads, _), (again, recomputed, _) = found
    assert loss == again
    for name, grad in grads.items():
        assert torch.equal(grad, recomputed[name]), name


def test_the_input_of_mamba_output_projections_loses_most_in_nvfp4_and_nothing_in_mxfp8() -> None:
    # In kind what the white paper of Nemotron 3 reports (section 2.4): up to 40 % of Nano's.
    flushed: dict[tuple[str, str, str], float] = {}
    for precision in ("nvfp4_all", "mxfp8"):
        recipe = tiny(f"precision={precision}")
        torch.manual_seed(5)
        model = build(recipe)
        apply_policy([model], policy_of(recipe))
        seen: dict[tuple[str, str], Tally] = defaultdict(Tally)
        for name, module in linear_modules([model]).items():
            module.observer = partial(_observe, seen, name)  # type: ignore[assignment]
        step(model)
        for kind in ("out_proj", "in_proj", "experts.linear_fc1", "linear_qkv"):
            for role in ("input", "weight", "grad_output"):
                total = Tally()
                for (name, where), one in seen.items():
                    if kind in name and where == role:
                        total += one
                flushed[precision, kind, role] = total.shares()["flushed"]
    of_nvfp4 = {key[1:]: share for key, share in flushed.items() if key[0] == "nvfp4_all"}
    assert max(of_nvfp4, key=lambda key: of_nvfp4[key]) == ("out_proj", "input")
    assert 0.2 < of_nvfp4["out_proj", "input"] < 0.4
    assert of_nvfp4["out_proj", "input"] > 2 * of_nvfp4["out_proj", "weight"]
    assert all(share < 1e-3 for key, share in flushed.items() if key[0] == "mxfp8")


def _observe(
    seen: dict[tuple[str, str], Tally],
    name: str,
    module: Any,
    role: str,
    source: torch.Tensor,
    quantized: torch.Tensor,
) -> None:
    form = block_format(module.quantized_with)
    seen[name, role] += tally(source, quantized, layout_of(form, role, form == "nvfp4"))


@pytest.mark.parametrize(
    ("precision", "without"),
    [("nvfp4_no_rht", "rht"), ("nvfp4_rtn", "stochastic_rounding")],
)
def test_switched_off_parts_are_told(
    precision: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(f"precision={precision}")
    for name, value in environment(recipe.precision).items():
        monkeypatch.setenv(name, value)
    model = build(recipe)
    apply_policy([model], policy_of(recipe))
    step(model)
    found = applied_formats([model], policy_of(recipe))
    check_applied(found)
    assert found["decoder.layers.0.mixer.in_proj"] == (f"nvfp4 without {without}",) * 2
    with pytest.raises(PrecisionError, match=f"nvfp4 without {without} instead of nvfp4"):
        check_applied(applied_formats([model], policy_of(tiny("precision=nvfp4"))))


@pytest.mark.parametrize(
    ("precision", "change", "told"),
    [
        ("nvfp4", {"fp4_quant_bwd_grad": None}, "nvfp4 without rht, stochastic_rounding"),
        ("nvfp4", {"backward_override": "high_precision"}, "nvfp4 with backward_override="),
        ("nvfp4", {"nvfp4_4over6": "all"}, "nvfp4 with nvfp4_4over6=all"),
        ("mxfp8", {"backward_override": "dequantized"}, "mxfp8 with backward_override="),
    ],
)
def test_a_recipe_of_the_library_that_is_another_is_told(
    precision: str, change: dict[str, Any], told: str
) -> None:
    from transformer_engine.common import recipe as library

    recipe = {"nvfp4": library.NVFP4BlockScaling, "mxfp8": library.MXFP8BlockScaling}[precision]()
    module: Any = SimpleNamespace(fp8=True, fp8_meta={"recipe": recipe})
    assert ran_in(module) == precision
    for name, value in change.items():
        setattr(recipe, name, library.QParams() if value is None else value)
    assert ran_in(module).startswith(told)
