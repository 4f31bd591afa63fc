"""Which module runs in which format: against the published table, and on the modules of real
Megatron models, whatever stage of the pipeline they are in."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from model.gemms import model_gemms, policy_of
from model.hybrid import build_model, transformer_config
from model.validate import validate_recipe
from parallel.device import meta_device
from precision.apply import (
    applied_formats,
    apply_policy,
    check_applied,
    environment,
    set_environment,
    transformer_fields,
)
from precision.policy import Policy
from recipes.compose import choices, load_recipe
from recipes.errors import ConfigError, PrecisionError
from recipes.schema import Recipe
from tests.unit.published_precision import FAMILY, published
from tests.unit.world import fresh_world

FEW_EXPERTS = ("model.num_moe_experts=4", "model.moe_router_topk=2")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with fresh_world(seed=1):
        yield


def recipe(experiment: str, precision: str, *overrides: str) -> Recipe:
    return load_recipe([f"experiment={experiment}", f"precision={precision}", *overrides])


def tiny(*overrides: str) -> Recipe:
    """The smallest model whose every size divides into blocks of 32."""
    sizes = ("model.mamba_num_heads=32", "model.mamba_head_dim=8")
    return load_recipe(["experiment=tiny", *sizes, *overrides])


def formats(policy: Policy, tokens: float = 0) -> dict[str, str]:
    return {d.gemm.name: d.format for d in policy.at(tokens)}


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "te_quant_params")}


def in_force(module: Any, training: bool = True) -> str:
    """The format Megatron's wrapper will open a context for, in whatever context it stands."""
    params = module.te_quant_params
    chosen = params.training_recipe
    if not training and params.evaluation_recipe is not None:
        chosen = params.evaluation_recipe
    asked = (chosen.fp4_quantization_recipe, chosen.fp8_quantization_recipe)
    name = {(None, None): "bf16", ("nvfp4", None): "nvfp4", (None, "mxfp8"): "mxfp8"}[asked]
    # Quantised or not, inside of Megatron's own context and outside of it.
    module.train(training)
    for context in (True, False):
        assert module.will_execute_quantized(context) == (name != "bf16")
    return name


def on_meta(of: Recipe, **stage: Any) -> Any:
    """The recipe's model without storage, and without Megatron's own quantised context, which
    decides nothing: `in_force` looks at both cases."""
    plain = load_recipe(["precision=bf16"]).precision
    config = transformer_config(of.model, plain, of.parallel)
    config.init_model_with_meta_device = True
    config.perform_initialization = False
    with meta_device():
        return build_model(of, config, **stage)


# The published recipe


@pytest.mark.parametrize("experiment", FAMILY)
def test_nvfp4_is_the_published_table(experiment):
    assert formats(policy_of(recipe(experiment, "nvfp4"))) == published(experiment)


@pytest.mark.parametrize("experiment", FAMILY)
def test_modules_of_the_real_model_follow_it(experiment):
    """Names, weights and formats of Megatron's own modules."""
    of = recipe(experiment, "nvfp4", "parallel=single", *FEW_EXPERTS)
    model = on_meta(of)
    found = linears(model)
    assert {name: in_force(m) for name, m in found.items()} == published(experiment)
    for gemm in model_gemms(of.model, of.parallel):
        weights = [p for n, p in found[gemm.name].named_parameters() if n.startswith("weight")]
        assert tuple(weights[0].shape) == (gemm.rows, gemm.columns)
        assert sum(p.numel() for p in weights) == gemm.parameters


def test_every_shipped_precision_fits_every_model_of_the_family():
    for experiment in FAMILY:
        for precision in choices("precision"):
            validate_recipe(recipe(experiment, precision))


def test_every_rule_of_the_recipe_is_used_by_super():
    """But the one for dense MLP layers, of which the family has none."""
    of = recipe("super_120b_a12b", "nvfp4")
    used = {d.rule.key for d in policy_of(of).start}
    idle = [
        r.module for i, r in enumerate(of.precision.rules) if f"precision.rules[{i}]" not in used
    ]
    assert idle == ["mlp.linear_fc[12]"]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("bf16", "bf16"), ("fp32", "fp32"), ("mxfp8", "mxfp8"), ("nvfp4_all", "nvfp4")],
)
def test_uniform_recipes(precision, expected):
    assert set(formats(policy_of(recipe("super_120b_a12b", precision))).values()) == {expected}


@pytest.mark.parametrize("precision", ["nvfp4_no_rht", "nvfp4_rtn"])
def test_ablations_differ_from_the_recipe_in_one_switch(precision):
    base, other = recipe("tiny", "nvfp4").precision, recipe("tiny", precision).precision
    changed = [f for f in vars(base) if getattr(base, f) != getattr(other, f)]
    switch = {"nvfp4_no_rht": "disable_rht", "nvfp4_rtn": "disable_stochastic_rounding"}
    assert changed == ["name", switch[precision]]
    switches = {k: v for k, v in environment(other).items() if "_DISABLE_" in k}
    assert switches.pop(f"NVTE_NVFP4_{switch[precision].upper()}") == "1"
    assert set(switches.values()) == {"0"} and len(switches) == 2


def test_what_a_shell_has_left_changes_no_recipe(monkeypatch):
    """Of the library's variables, in its own names (transformer_engine.common.recipe)."""
    left = {
        "NVTE_BACKWARD_OVERRIDE": "high_precision",
        "NVTE_NVFP4_DISABLE_RHT": "1",
        "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
        "NVTE_NVFP4_4OVER6": "all",
        "NVTE_NVFP4_4OVER6_E4M3_USE_256": "none",
        "NVTE_NVFP4_4OVER6_ERR_MODE": "MSE",
    }
    from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling

    with monkeypatch.context() as clean:
        for variable in left:
            clean.delenv(variable, raising=False)
        wanted = [NVFP4BlockScaling(), MXFP8BlockScaling()]
    for variable, value in left.items():
        monkeypatch.setenv(variable, value)
    assert wanted[0] != NVFP4BlockScaling() and wanted[1] != MXFP8BlockScaling()
    set_environment(recipe("tiny", "nvfp4").precision)
    assert wanted == [NVFP4BlockScaling(), MXFP8BlockScaling()]


# Rules


def decided(*overrides: str, pattern: str = "MEM*EMEMEM*EMEMEMEME") -> dict[int | None, set[str]]:
    """Layer -> formats of its modules, for a model of 20 layers (a multiple, so that shares are
    exact)."""
    of = tiny("precision=bf16", f"model.hybrid_layer_pattern={pattern}/*E", *overrides)
    layers: dict[int | None, set[str]] = {}
    for d in policy_of(of).start:
        layers.setdefault(d.gemm.layer, set()).add(d.format)
    return layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [*range(20), None]),
        ("mtp", [None]),
        ("last 15%", [17, 18, 19]),
        ("last 15.1%", [16, 17, 18, 19]),
        ("first 1%", [0]),
        ("first 2", [0, 1]),
        ("7", [7]),
        ("3-5", [3, 4, 5]),
        ("[3, 7-8, last 1, mtp]", [3, 7, 8, 19, None]),
    ],
)
def test_layers_of_a_rule(layers, expected):
    value = layers if layers.startswith("[") else f"'{layers}'"
    found = decided(f"precision.extra_rules=[{{layers: {value}, format: mxfp8}}]")
    assert [layer for layer, kinds in found.items() if kinds == {"mxfp8"}] == expected
    assert all(kinds == {"bf16"} for layer, kinds in found.items() if layer not in expected)


def test_the_first_rule_that_matches_decides():
    rules = "[{module: 'mixer.*', format: mxfp8}, {layers: 0-1, format: nvfp4}, {format: bf16}]"
    found = decided(f"precision.rules={rules}")
    assert found[0] == {"mxfp8"} and found[1] == {"nvfp4"} and found[2] == {"mxfp8"}
    extra = decided(f"precision.rules={rules}", "precision.extra_rules=[{layers: 0}]")
    assert extra[0] == {"bf16"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "precision.extra_rules=[{module: mixer.outproj}]",
            ["precision.extra_rules[0]", "mixer.outproj", "matches no module", "mixer.out_proj"],
        ),
        ("precision.extra_rules=[{module: mlp.linear_fc1}]", ["matches no module", "optional"]),
        (
            "precision.extra_rules=[{layers: 2}, {layers: 1-2, module: 'mixer.*'}]",
            ["extra_rules[1]", "decides for no module", "extra_rules[0] matches all", "move it up"],
        ),
        ("precision.rules=[{module: 'm*'}]", ["leaves", "self_attention", "end the list"]),
        ("precision.rules=[]", ["leaves decoder.layers.0.mixer.in_proj", "end the list"]),
        ("precision.extra_rules=[{layers: 7-9}]", ["layers=7-9", "9 layers", "0 to 8"]),
        ("precision.extra_rules=[{layers: last 10}]", ["layers=last 10", "9 layers"]),
        ("precision.extra_rules=[{layers: end}]", ["layers=end", "last 15%"]),
        ("precision.extra_rules=[{format: fp8}]", ["format=fp8", "nvfp4, mxfp8"]),
        ("precision.extra_rules=[{format: fp32}]", ["fp32", "params_dtype=bf16", "not quantised"]),
        ("precision.evaluation=fp8", ["evaluation=fp8", "bf16, mxfp8"]),
        ("precision.switch.to=bf16", ["switch.to=bf16", "at_tokens"]),
        ("precision.switch.at_tokens=1e5", ["switch.to=null", "target"]),
        ("precision.switch={to: nvfp4, at_tokens: 1}", ["switch.to=nvfp4", "quantise none"]),
        ("precision.evaluation=mxfp8", ["evaluation=mxfp8", "quantise none", "switch.rules"]),
    ],
)
def test_mistakes_name_key_rule_and_remedy(override, said):
    with pytest.raises(ConfigError) as error:
        validate_recipe(tiny("precision=bf16", override))
    for words in said:
        assert words in str(error.value)


def test_what_keeps_from_quantising_may_meet_nothing():
    """A comparison gives it to its BF16 arm too."""
    for to in ("bf16", "bf16_forward"):
        switch = f"precision.switch={{to: {to}, at_tokens: 1}}"
        validate_recipe(tiny("precision=bf16", switch, "precision.evaluation=bf16"))


def test_a_rule_may_be_optional():
    validate_recipe(tiny("precision.extra_rules=[{module: mlp.linear_fc1, optional: true}]"))


@pytest.mark.parametrize(
    ("precision", "override", "said"),
    [
        # Rows of in_proj: 2 * 256 + 2 * 2 * 32 + heads.
        ("nvfp4", ["model.mamba_num_heads=8", "model.mamba_head_dim=32"], ["in_proj", "% 16 = 8"]),
        ("mxfp8", ["model.mamba_num_heads=16", "model.mamba_head_dim=16"], ["in_proj", "% 32"]),
        ("nvfp4", ["model.moe_latent_size=72"], ["experts.linear_fc1", "[128, 72]", "72 columns"]),
        (
            "nvfp4",
            ["parallel.expert_tensor_parallel_size=16", "stage.global_batch_size=128"],
            ["experts.linear_fc1", "[8, 64]", "8 rows % 16"],
        ),
        ("nvfp4", ["stage.sequence_length=250", "stage.micro_batch_size=1"], ["250 tokens % 16"]),
        ("mxfp8", ["model.mamba_num_heads=8", "model.mamba_head_dim=32"], ["heads=8", "648 rows"]),
        (
            "bf16",
            ["precision.evaluation=nvfp4", "precision.extra_rules=[{module: mlp.experts.*, "
             "format: mxfp8}]", "model.moe_latent_size=80"],
            ["80 columns % 32"],
        ),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_into_blocks(precision, override, said):
    with pytest.raises(ConfigError) as error:
        validate_recipe(tiny(f"precision={precision}", *override))
    for words in said:
        assert words in str(error.value)


def test_tensor_parallel_ranks_are_checked_with_their_own_weights():
    """Super's in_proj has 18560 rows: 2320 on each of 8 ranks, which only NVFP4 divides."""
    layout = ["parallel.tensor_model_parallel_size=8"]
    validate_recipe(recipe("super_120b_a12b", "nvfp4", *layout))
    with pytest.raises(ConfigError, match=r"2320 rows % 32 = 16"):
        validate_recipe(recipe("super_120b_a12b", "mxfp8", *layout))


# Megatron's configuration


def fields(precision: str, **others: Any) -> dict[str, Any]:
    of = recipe("tiny", precision).precision
    for name, value in others.items():
        setattr(of, name, value)
    return transformer_fields(of, has_experts=True, moe_token_dispatcher_type="alltoall")


def test_fields_of_the_configuration():
    padding = {"moe_router_padding_for_quantization": True}
    assert fields("bf16") == {} == fields("fp32")
    assert fields("nvfp4") == {"fp4": "e2m1", "fp4_recipe": "nvfp4"} | padding
    assert fields("mxfp8") == {"fp8": "e4m3", "fp8_recipe": "mxfp8"} | padding
    # What comes only later, or only in validation, needs the same support.
    assert fields("mxfp8", evaluation="nvfp4")["fp4"] == "e2m1"
    switched = recipe("tiny", "bf16", "precision.switch.rules=[{format: nvfp4_backward}]")
    assert transformer_fields(switched.precision, True, "allgather") == {
        "fp4": "e2m1",
        "fp4_recipe": "nvfp4",
        "moe_router_padding_for_quantization": False,
    }


def test_evaluation_format():
    of = tiny("precision=nvfp4", "precision.evaluation=bf16")
    model = on_meta(of)
    found = linears(model).values()
    assert {in_force(m, training=False) for m in found} == {"bf16"}
    assert {in_force(m) for m in found} == {"bf16", "nvfp4", "mxfp8"}


# The switch


def test_switch_is_a_function_of_consumed_tokens():
    of = tiny("precision=nvfp4", "precision.switch={to: bf16, at_tokens: 1000}")
    policy = policy_of(of)
    before = Counter(formats(policy).values())
    assert set(before) == {"nvfp4", "mxfp8", "bf16"}
    assert Counter(formats(policy, 999).values()) == before
    for tokens in (1000, 1e12):
        assert set(formats(policy, tokens).values()) == {"bf16"}


def test_switch_at_a_share_of_the_stage():
    of = tiny("precision=nvfp4", "precision.switch={to: mxfp8, at_fraction: 0.82}")
    of.stage.train_steps, of.stage.train_tokens = None, 1e12
    assert math.isclose(policy_of(of).switch_tokens, 0.82e12)
    of.precision.switch.at_fraction, of.stage.train_tokens = 0.55, 204_800
    assert policy_of(of).switch_tokens == 112_640, "of the step that starts with as many"


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("bf16", {"nvfp4": "bf16", "mxfp8": "bf16"}),
        ("mxfp8", {"nvfp4": "mxfp8", "mxfp8": "mxfp8"}),
        ("bf16_forward", {"nvfp4": "nvfp4_backward", "mxfp8": "mxfp8_backward"}),
    ],
)
def test_switch_changes_quantised_modules_only(to, expected):
    policy = policy_of(tiny("precision=nvfp4", f"precision.switch={{to: {to}, at_tokens: 1}}"))
    before, after = formats(policy), formats(policy, 1)
    assert {(before[n], after[n]) for n in before} == {*expected.items(), ("bf16", "bf16")}


def test_switch_to_other_rules():
    rules = "[{module: 'mlp.*', format: mxfp8}, {format: bf16}]"
    policy = policy_of(
        tiny("precision=nvfp4_all", f"precision.switch={{rules: {rules}, at_tokens: 1}}")
    )
    after = formats(policy, 1)
    assert {n for n in after if after[n] == "mxfp8"} == {n for n in after if ".mlp." in n}


def test_a_format_the_library_cannot_do_is_refused_before_the_run(monkeypatch):
    """Though it is needed only after the switch."""
    import transformer_engine.pytorch as te

    monkeypatch.delattr(te, "HybridQuantizer", raising=False)
    switch = "precision.switch={to: bf16_forward, at_tokens: 1e12}"
    with pytest.raises(ConfigError, match="nvfp4_backward of decoder.* needs .*HybridQuantizer"):
        on_meta(tiny("precision=nvfp4", switch))


def test_applying_the_switch_to_modules_forwards_and_back():
    """As after a resume behind the switch, and after a rollback to before it."""
    of = tiny("precision=nvfp4", "precision.switch={to: bf16, at_tokens: 1000}")
    policy = policy_of(of)
    model = on_meta(of)
    for tokens in (0, 1000, 999, 5000):
        apply_policy([model], policy, tokens)
        found = {name: in_force(m) for name, m in linears(model).items()}
        assert found == formats(policy, tokens)


# After a step


def ran(module, name: str) -> None:
    """Leave behind what a forward pass in a format does."""
    from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling

    module.fp8 = name != "bf16"
    if module.fp8:
        module.fp8_meta["recipe"] = {"nvfp4": NVFP4BlockScaling, "mxfp8": MXFP8BlockScaling}[name]()


def test_modules_that_ran_in_another_format_are_an_error():
    of = tiny("precision=nvfp4")
    policy = policy_of(of)
    model = on_meta(of)
    for name, module in linears(model).items():
        ran(module, formats(policy)[name])
    check_applied(applied_formats([model], policy))
    for name in ("decoder.layers.0.mixer.in_proj", "decoder.layers.5.self_attention.linear_qkv"):
        module, right = linears(model)[name], formats(policy)[name]
        ran(module, "mxfp8")
        with pytest.raises(PrecisionError, match=f"{name} ran in mxfp8 instead of {right}"):
            check_applied(applied_formats([model], policy))
        ran(module, right)
    for module in linears(model).values():
        ran(module, "bf16")
    with pytest.raises(PrecisionError, match="and 10 more"):
        check_applied(applied_formats([model], policy))
