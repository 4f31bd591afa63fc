"""The model is the one of the papers: where each part reads, what it ignores, how it starts."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from model.hybrid import build_model, init_method_std, params_dtype, transformer_config
from recipes.compose import load_recipe
from recipes.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recipe
from tests.unit.world import fresh_world

LENGTH = 24


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with fresh_world(seed=1):
        yield


def recipe(*overrides: str) -> Recipe:
    return load_recipe(["experiment=tiny", "precision=fp32", *overrides])


def config(of: Recipe, parallel: ParallelConfig | None = None) -> Any:
    return transformer_config(of.model, of.precision, parallel or of.parallel)


def build(of: Recipe) -> Any:
    return build_model(of, config(of))


@pytest.fixture(scope="module")
def tiny() -> Any:
    """Every architectural part, in FP32."""
    return build(recipe())


def logits(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """tokens [b, s] -> [b, s, vocabulary]."""
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, None)


def random_tokens(seed: int = 0) -> Tensor:
    return torch.randint(4096, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


# Configuration


def test_every_recipe_field_reaches_megatron_under_its_name():
    """Those that do not are named in model/hybrid.py, and none of them by mistake."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from model import hybrid

    megatron = {f.name for f in fields(TransformerConfig)}
    derived = {"init_method_std", "sequence_parallel"}
    for group, excluded in (
        (ModelConfig, hybrid._NOT_MEGATRON),
        (ParallelConfig, hybrid._NOT_CONFIG),
    ):
        ours = {f.name for f in fields(group)}
        assert excluded <= ours
        assert ours - excluded <= megatron
        assert not (excluded & megatron) - derived


@pytest.mark.parametrize(
    ("experiment", "published"),
    [
        ("nano_30b_a3b", 0.0173),
        ("pico_7b_a1b", 0.0256),
        ("super_120b_a12b", 0.014),
        ("ultra_550b_a55b", 0.0099),
    ],
)
def test_initial_std_is_the_published_one(experiment, published):
    model = load_recipe([f"experiment={experiment}"]).model
    assert init_method_std(model) == pytest.approx(published, rel=0.005)


def test_initial_std_can_be_given():
    assert config(recipe("model.init_method_std=0.5")).init_method_std == 0.5


def test_dtypes():
    assert params_dtype(PrecisionConfig(name="x", params_dtype="fp32")) is torch.float32
    bf16 = config(load_recipe(["experiment=tiny"]))
    assert bf16.bf16 and bf16.params_dtype is torch.bfloat16
    assert bf16.moe_router_dtype == "fp32"


def test_layout_reaches_the_configuration():
    of = recipe("model.hybrid_layer_pattern=M|E|M|E")
    two = config(of, ParallelConfig(pipeline_model_parallel_size=2, tensor_model_parallel_size=2))
    assert two.virtual_pipeline_model_parallel_size == 2
    assert two.sequence_parallel  # tp > 1
    assert two.expert_tensor_parallel_size == 1  # not tp, Megatron's own default
    one = config(of)
    assert one.virtual_pipeline_model_parallel_size is None and not one.sequence_parallel


# Shapes and places


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_router_and_shared_expert_read_the_full_width(tiny):
    """d 128, latent 64, 16 experts of 128, shared expert of 256."""
    found = shapes(tiny)
    moe = "decoder.layers.1.mlp"
    assert found[f"{moe}.router.weight"] == (16, 128)
    assert found[f"{moe}.shared_experts.linear_fc1.weight"] == (256, 128)
    assert found[f"{moe}.fc1_latent_proj.weight"] == (64, 128)
    assert found[f"{moe}.fc2_latent_proj.weight"] == (128, 64)
    assert found[f"{moe}.experts.linear_fc1.weight0"] == (128, 64)
    assert found[f"{moe}.experts.linear_fc2.weight15"] == (64, 128)


def test_embeddings_are_untied(tiny):
    embedding = tiny.embedding.word_embeddings.weight
    assert embedding.data_ptr() != tiny.output_layer.weight.data_ptr()
    assert not torch.equal(embedding, tiny.output_layer.weight)


def test_mtp_block_is_stored_once_and_run_twice(tiny):
    assert len(tiny.mtp.layers) == 1
    runs = []
    hook = tiny.mtp.layers[0].register_forward_hook(lambda *_: runs.append(1))
    tokens = random_tokens()
    tiny.train()(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=tokens)
    hook.remove()
    assert len(runs) == 2


def test_stage_boundaries_build_all_layers_on_one_rank():
    assert len(build(recipe("model.hybrid_layer_pattern=ME|*E")).decoder.layers) == 4


def test_own_convolution_width_and_chunk_reach_the_mixer():
    mixer = build(recipe("model.mamba_d_conv=3", "model.mamba_chunk_size=32")).decoder.layers[0]
    assert mixer.mixer.conv1d_weight.shape[-1] == 3
    assert mixer.mixer.chunk_size == 32


# Behaviour


def test_no_position_embedding(tiny):
    """Positions given from outside change nothing."""
    tokens = random_tokens()
    shifted = torch.arange(LENGTH).flip(0).expand_as(tokens) + 7
    assert torch.equal(logits(tiny, tokens), logits(tiny, tokens, shifted))
    assert not [name for name, _ in tiny.named_modules() if "rotary" in name]


@pytest.mark.parametrize("changed", [1, 10, LENGTH - 1])
def test_causality(tiny, changed):
    """A token changes its own logits and later ones only."""
    tokens = random_tokens()
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 4096
    before, after = logits(tiny, tokens), logits(tiny, other)
    # Experts see other groups of tokens, so that sums may differ in the last bit.
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=1e-5, atol=3e-6)
    assert not torch.allclose(before[:, changed], after[:, changed])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_expert_bias_chooses_but_does_not_weigh(tiny):
    """A bias equal for all experts changes nothing; one that favours four experts moves
    every token to them."""
    tokens = random_tokens()
    router = tiny.decoder.layers[1].mlp.router
    before = logits(tiny, tokens)
    try:
        router.expert_bias.fill_(5.0)
        assert torch.equal(before, logits(tiny, tokens))
        router.expert_bias.zero_()[:4] = 5.0
        chosen = []
        hook = router.register_forward_hook(lambda _m, _i, out: chosen.append(out))
        logits(tiny, tokens)
        hook.remove()
    finally:
        router.expert_bias.zero_()
    weights, routed = chosen[0]
    assert routed[:, :4].all() and not routed[:, 4:].any()
    # Sigmoid scores without the bias, normalised, times the scaling factor of tiny, 2.5.
    torch.testing.assert_close(weights.sum(-1), torch.full((weights.shape[0],), 2.5))


def test_initial_loss_and_gradients():
    """An untrained model knows nothing, and every parameter learns: MTP's as well, and those of
    all experts once the router spreads tokens over them."""
    of = recipe()
    model = build(of).train()
    tokens = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(3))
    losses = model(
        tokens,
        torch.arange(128).expand_as(tokens),
        None,
        labels=tokens.roll(-1, 1),
        loss_mask=torch.ones(tokens.shape),
    )
    assert losses.mean().item() == pytest.approx(math.log(4096), rel=0.1)
    losses.sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_initial_weights_have_the_derived_spread():
    """std = sqrt(0.8 / d); output projections are narrower by sqrt(number of layers)."""
    of = recipe()
    weights = dict(build(of).named_parameters())
    std, layers = math.sqrt(0.8 / 128), 9

    def spread(name: str) -> float:
        return weights[name].std().item()

    for name in (
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.layers.0.mixer.in_proj.weight",
        "decoder.layers.1.mlp.experts.linear_fc1.weight3",
        "decoder.layers.1.mlp.fc1_latent_proj.weight",
        "decoder.layers.1.mlp.router.weight",
    ):
        assert spread(name) == pytest.approx(std, rel=0.06), name
    for name in (
        "decoder.layers.0.mixer.out_proj.weight",
        "decoder.layers.1.mlp.experts.linear_fc2.weight3",
        "decoder.layers.1.mlp.fc2_latent_proj.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
        "decoder.layers.5.self_attention.linear_proj.weight",
    ):
        assert spread(name) == pytest.approx(std / math.sqrt(layers), rel=0.06), name


def test_initial_state_space_parameters():
    """A in -[1, 16], D one, time steps between 0.001 and 0.1 (Mamba-2's ranges)."""
    mixer = build(recipe()).decoder.layers[0].mixer
    a = mixer.A_log.exp()
    assert a.min() >= 1 and a.max() <= 16
    assert torch.equal(mixer.D, torch.ones(32))
    step = torch.nn.functional.softplus(mixer.dt_bias.double())
    assert step.min() >= 1e-4 and step.max() <= 0.1 + 1e-6
