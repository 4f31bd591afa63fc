"""Parameters against the published numbers, Hugging Face and hand-worked layers; FLOPs against
PyTorch's counter, a counted recurrence and NVIDIA's reported throughput."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.backends import install_backends
from model.counts import Counts, count_parameters, flops_per_token, forward_flops, layer_flops
from parallel.payload import dispatched_bytes
from recipes.compose import load_recipe
from recipes.schema import ModelConfig, ParallelConfig
from tests.unit.world import fresh_world

ALL_KINDS = ["model.hybrid_layer_pattern=ME*-/*E/*E", "model.ffn_hidden_size=64"]


@pytest.fixture(scope="module", autouse=True)
def backends() -> None:
    install_backends("host")


def count(*overrides: str) -> Counts:
    return count_parameters(load_recipe(overrides))


def tiny(*overrides: str) -> ModelConfig:
    return load_recipe(["experiment=tiny", *overrides]).model


# Parameters


@pytest.mark.parametrize(
    ("experiment", "main", "mtp"),
    [
        ("nano_30b_a3b", 31_577_940_288, 0),
        ("super_120b_a12b", 120_668_707_840, 2_942_325_248),
        ("ultra_550b_a55b", 549_308_993_536, 11_215_610_368),
    ],
)
def test_published_sizes(experiment, main, mtp):
    found = count(f"experiment={experiment}")
    assert (found.main, found.mtp, found.total) == (main, mtp, main + mtp)
    assert sum(found.modules.values()) == found.total


def test_published_active_parameters():
    """Nano: 3.2 B with the head, 3.6 B with both embeddings."""
    nano = count("experiment=nano_30b_a3b")
    assert (nano.active_with_head, nano.active) == (3_227_754_816, 3_580_076_352)


def test_super_as_its_report_counts():
    """The report's 120.6 B, 12.7 B active and 12.1 B without embedding leave out the routers."""
    found = count("experiment=super_120b_a12b")
    routers = 40 * (512 * 4096 + 512)
    sizes = (found.main, found.active, found.active_with_head)
    assert [round((size - routers) / 1e9, 1) for size in sizes] == [120.6, 12.7, 12.1]


@pytest.mark.parametrize(
    ("experiment", "sizes", "changes"),
    [
        # Published: 8.09 B of 72.6 B, and 8.02 B of 72.8 B.
        ("moe_ablation_73b_a8b", (72_563_113_984, 8_088_272_896), (239_084_544, -25_156_608)),
        ("tiny_moe_ablation", (6_047_936, 2_640_064), (57_536, -8_000)),
    ],
)
def test_the_ablations_arms_have_one_size(experiment, sizes, changes):
    """The latent arm has latent projections and wider routers in place of two experts a token."""
    recipe = load_recipe([f"experiment={experiment}"])
    base, latent = (count(f"experiment={experiment}", f"model={m}") for m in recipe.compare.models)
    assert (base.total, base.active) == sizes
    assert (latent.total - base.total, latent.active - base.active) == changes
    layers = base.modules.keys() | latent.modules.keys()
    same = {n for n in layers if base.modules.get(n) == latent.modules.get(n)}
    assert "mlp.experts" in same
    assert layers - same == {"mlp.router", "mlp.fc1_latent_proj", "mlp.fc2_latent_proj"}
    models = [load_recipe([f"model={m}"]).model for m in recipe.compare.models]
    assert dispatched_bytes(models[1], 2) / dispatched_bytes(models[0], 2) == 11 / 12


def test_layers_by_hand():
    """tiny: d 128, inner 256, state 32, 2 groups, 32 heads, 16 experts, top 4, latent 64."""
    found = count("experiment=tiny", *ALL_KINDS)
    mamba, moe, attention, mlp = found.layers
    convolved = 256 + 2 * 2 * 32
    assert mamba.parameters == (
        128 + 128 * (256 + convolved + 32)  # norm, in_proj: z, (x B C), dt
        + 5 * convolved + 3 * 32  # convolution and its bias; A_log, D, dt_bias
        + 256 + 256 * 128  # gated norm, out_proj
    )  # fmt: skip
    expert = 2 * 64 * 128
    around = 128 + 16 * 128 + 16 + 2 * 64 * 128 + 2 * 128 * 256  # norm, router, latent, shared
    assert moe.parameters == around + 16 * expert
    assert moe.active == around + 4 * expert
    assert attention.parameters == 128 + 128 * (4 + 2 * 2) * 32 + 4 * 32 * 128
    assert mlp.parameters == 128 + 2 * 128 * 64
    assert [x.active for x in (mamba, attention, mlp)] == [
        x.parameters for x in (mamba, attention, mlp)
    ]
    assert found.embedding == found.head == 4096 * 128
    assert found.mtp_projections == 2 * 128 * 128 + 3 * 128
    assert [x.parameters for x in found.mtp_layers] == [attention.parameters, moe.parameters]


def test_repeated_mtp_is_stored_once():
    once = count("experiment=tiny")
    twice = count("experiment=tiny", "model.mtp_use_repeated_layer=false")
    assert twice.mtp == 2 * once.mtp and len(twice.mtp_layers) == 2 * len(once.mtp_layers)
    assert twice.main == once.main


def test_count_does_not_depend_on_the_layout():
    """Nor on stage boundaries, with which Megatron would build the first stage alone."""
    cut = count("experiment=tiny", "model.hybrid_layer_pattern=MEM|EM*EME/*E/*E")
    assert cut.total == count("experiment=tiny", "model.hybrid_layer_pattern=MEMEM*EME/*E/*E").total


def test_same_number_as_hugging_face():
    """transformers' Nemotron-H has no MTP; it runs in a process without our stand-ins."""
    code = (
        "from tests.benchmarks.hf_loop import TINY, COMMON\n"
        "import torch\n"
        "from transformers import NemotronHConfig, NemotronHForCausalLM\n"
        "with torch.device('meta'):\n"
        "    model = NemotronHForCausalLM(NemotronHConfig(**TINY, **COMMON))\n"
        "bias = [b for n, b in model.named_buffers() if n.endswith('e_score_correction_bias')]\n"
        "print(sum(x.numel() for x in [*model.parameters(), *bias]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert count("experiment=tiny").main == int(output.stdout.split()[-1])


# FLOPs


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """Products of a forward and a backward pass of a tiny model with every kind of layer, as
    PyTorch counts them, and the number of tokens."""
    from model.hybrid import build_model, transformer_config

    recipe = load_recipe(["experiment=tiny", "precision=fp32", *ALL_KINDS])
    batch, length = 2, 16
    tokens = torch.randint(4096, (batch, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(batch, length)
    with fresh_world():
        config = transformer_config(recipe.model, recipe.precision, ParallelConfig())
        model = build_model(recipe, config).train()
        with FlopCounterMode(display=False) as forward:
            mask = torch.ones(batch, length)
            losses = model(tokens, positions, None, labels=tokens, loss_mask=mask)
        with FlopCounterMode(display=False) as backward:
            losses.sum().backward()
    return {
        "model": recipe.model,
        "tokens": batch * length,
        "forward": {name: flops[torch.ops.aten.mm]  # scan and attention do not use `mm`
                    for name, flops in forward.get_flop_counts().items()},
        "backward": backward.get_flop_counts()["Global"][torch.ops.aten.mm],
    }  # fmt: skip


def products(model: ModelConfig, symbol: str) -> dict[str, float]:
    """The matrix products with weights among a layer's FLOPs."""
    other = ("mixer.scan", "mixer.conv1d", "self_attention.core_attention")
    return {k: v for k, v in layer_flops(model, symbol, 1).items() if k not in other}


@pytest.mark.parametrize(("index", "symbol"), list(enumerate("ME*-")))
def test_products_of_each_layer_are_those_pytorch_counts(counted, index, symbol):
    expected = products(counted["model"], symbol)
    place = f"HybridModel.decoder.layers.{index}"
    for name, flops in expected.items():
        assert counted["forward"][f"{place}.{name}"] == counted["tokens"] * flops, name
    assert counted["forward"][place] == counted["tokens"] * sum(expected.values())


def test_products_of_the_whole_model_are_those_pytorch_counts(counted):
    """Twice through the MTP block, three times through the head."""
    model, tokens = counted["model"], counted["tokens"]
    linear = Counter[str]()
    for symbol in "ME*-" + 2 * "*E":
        linear.update(products(model, symbol))
    head, projection = 2 * 128 * 4096, 2 * 2 * 128 * 128
    expected = sum(linear.values()) + 3 * head + 2 * projection
    assert counted["forward"]["Global"] == tokens * expected
    # What is counted besides is linear in nothing but the scan, convolution and attention.
    length = 16
    rest = sum(
        sum(layer_flops(model, s, length).values()) - sum(products(model, s).values())
        for s in "ME*-*E*E"
    )
    assert sum(forward_flops(model, length).values()) == expected + rest


def test_backward_is_twice_forward(counted):
    assert counted["backward"] == 2 * counted["forward"]["Global"]
    model = counted["model"]
    assert flops_per_token(model, 16) == 3 * sum(forward_flops(model, 16).values())


class Ticking(float):
    """A number that counts the operations done with it."""

    operations = Counter[str]()

    def __mul__(self, other: float) -> "Ticking":
        self.operations["*"] += 1
        return Ticking(float(self) * float(other))

    def __add__(self, other: float) -> "Ticking":
        self.operations["+"] += 1
        return Ticking(float(self) + float(other))


def test_scan_and_convolution_cost_what_their_loops_do(monkeypatch):
    model = tiny("model.mamba_num_heads=2", "model.mamba_head_dim=4", "model.mamba_num_groups=1")
    monkeypatch.setattr(Ticking, "operations", Counter())
    inner, state = 8, 32
    number = Ticking(0.5)
    for _ in range(inner):  # one token; number stands for every value
        y = number
        for _ in range(state):
            h = number * number + number * number  # h = a h + (dt x) B
            y = y + h * number  # y += C h
    flops = layer_flops(model, "M", 256)
    assert flops["mixer.scan"] == Ticking.operations.total()

    Ticking.operations.clear()
    for _ in range(inner + 2 * state):
        y = number  # the bias
        for _ in range(model.mamba_d_conv):
            y = y + number * number
    assert flops["mixer.conv1d"] == Ticking.operations.total()


@pytest.mark.parametrize("length", [1, 2, 7, 256])
def test_attention_counts_the_pairs_it_keeps(length):
    """4 heads of 32; a score and a weighted value cost 2 * 32 FLOPs a head and pair each."""
    kept = sum(1 for query in range(length) for key in range(length) if key <= query)
    flops = layer_flops(tiny(), "*", length)["self_attention.core_attention"]
    assert flops == pytest.approx(kept * 4 * (2 + 2) * 32 / length, rel=1e-12)


def test_experts_cost_top_k_and_the_latent_width():
    """LatentMoE: experts of width l, the router and the shared expert of width d."""
    latent, full = tiny(), tiny("model.moe_latent_size=null")
    with_latent, without = layer_flops(latent, "E", 256), layer_flops(full, "E", 256)
    assert without["mlp.experts"] == 2 * with_latent["mlp.experts"]  # d / l
    for name in ("mlp.router", "mlp.shared_experts"):
        assert without[name] == with_latent[name]
    assert "mlp.fc1_latent_proj" not in without
    more = layer_flops(tiny("model.moe_router_topk=8"), "E", 256)
    assert more["mlp.experts"] == 2 * with_latent["mlp.experts"]
    idle = layer_flops(tiny("model.num_moe_experts=32"), "E", 256)
    assert idle["mlp.experts"] == with_latent["mlp.experts"]


@pytest.mark.parametrize(
    ("experiment", "reported"), [("super_120b_a12b", 84.3e9), ("ultra_550b_a55b", 360.6e9)]
)
def test_near_what_nvidia_reports(experiment, reported):
    """TFLOP/s over tokens/s in Megatron-Bridge's performance summary, sequences of 8192. Its
    counter has another cost of the scan, and no router or MTP projection."""
    model = load_recipe([f"experiment={experiment}"]).model
    assert flops_per_token(model, 8192) == pytest.approx(reported, rel=0.02)
