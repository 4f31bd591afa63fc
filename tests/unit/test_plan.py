"""The planner against published counts and figures, and against itself where rules are simple."""

import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from model.counts import flops_per_token, layer_flops, published_flops_per_token
from model.pattern import parse_pattern
from model.validate import validate_recipe
from parallel.gpus import GPUS
from parallel.job import Job, shares
from parallel.memory import memory, parameters
from parallel.plan import Plan, flops, make_plan, search, work_of
from parallel.traffic import traffic
from recipes.compose import load_recipe
from recipes.errors import ConfigError
from recipes.schema import Recipe

PARAMETERS = {
    "nano_30b_a3b": 31_577_940_288 - 23 * 128,
    "super_120b_a12b": 123_611_033_088 - 41 * 512,
    "ultra_550b_a55b": 560_524_603_904 - 49 * 512,
}
"""Elements of the released checkpoints without the router biases, which are buffers."""

TFLOPS = [
    # experiment, sequence, TFLOP/s and tokens/s of a GPU (Megatron-Bridge, performance-summary,
    # its archive, and model verification cards)
    ("nano_30b_a3b", 8192, 776, 34_816),
    ("nano_30b_a3b", 8192, 831, 37_316),
    ("nano_30b_a3b", 8192, 328, 14_719),
    ("nano_30b_a3b", 8192, 938, 42_094),
    ("nano_30b_a3b", 8192, 905, 40_960),
    ("nano_30b_a3b", 8192, 726, 32_768),
    ("super_120b_a12b", 8192, 831, 9_856),
    ("super_120b_a12b", 8192, 600, 7_040),
    ("super_120b_a12b", 8192, 667, 7_867),
    ("super_120b_a12b", 8192, 689, 8_131),
    ("super_120b_a12b", 4096, 248.6, 2_969),
    ("ultra_550b_a55b", 8192, 1_281, 3_552),
]

THROUGHPUT = [
    # experiment, precision, GPU, GPUs, tp, ep, micro batch, sequences, recomputed, tokens/s a GPU
    ("nano_30b_a3b", "mxfp8", "gb300", 8, 1, 8, 4, 512, "", 39_936),
    ("nano_30b_a3b", "mxfp8", "gb200", 8, 1, 8, 4, 512, "", 34_816),
    ("super_120b_a12b", "mxfp8", "gb200", 64, 2, 64, 1, 512, "", 7_040),
    ("super_120b_a12b", "nvfp4", "gb200", 64, 2, 64, 1, 512, "", 7_168),
    ("super_120b_a12b", "bf16", "gb200", 64, 2, 64, 1, 512, "", 6_600),
    ("super_120b_a12b", "mxfp8", "gb300", 64, 1, 64, 1, 512, "", 9_856),
    ("super_120b_a12b", "nvfp4", "gb300", 64, 1, 64, 1, 512, "", 10_240),
    ("super_120b_a12b", "mxfp8", "b200", 64, 1, 8, 1, 512, "moe_act,layernorm", 6_400),
    ("super_120b_a12b", "mxfp8", "b300", 64, 1, 8, 1, 512, "moe_act,layernorm", 7_867),
    ("ultra_550b_a55b", "mxfp8", "gb200", 256, 2, 64, 1, 256, "moe_act", 2_528),
    ("ultra_550b_a55b", "mxfp8", "gb300", 256, 1, 64, 1, 256, "moe_act", 3_552),
]
"""Published (same sources; what is recomputed: Megatron-Bridge's perf_recipes), MTP and 8192
tokens; BF16 is 559 TFLOP/s in the table's counting."""


@cache
def loaded(*overrides: str) -> Recipe:
    return load_recipe(list(overrides))


SUPER = "experiment=super_120b_a12b"
LONG = (SUPER, "parallel=super_long", "stage.sequence_length=1048576", "stage.global_batch_size=16")


def recomputing(modules: str) -> dict[str, Any]:
    """Keys of `parallel` that recompute modules selectively; "full" all layers; "" nothing."""
    if modules == "full":
        return full("uniform", 1)
    keys: dict[str, Any] = dict.fromkeys(full("", 0))
    if modules:
        keys |= {"recompute_granularity": "selective", "recompute_modules": modules.split(",")}
    return keys


def full(method: str, num_layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_modules": None,
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


def changed(recipe: Recipe, **parallel: Any) -> Recipe:
    return replace(recipe, parallel=replace(recipe.parallel, **parallel))


def plan(recipe: Recipe, ranks: int | None, gpu: str) -> Plan:
    layout = validate_recipe(recipe, ranks, "cuda")
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    return make_plan(recipe, layout, pattern, work_of(recipe), GPUS[gpu])


def job_of(*overrides: str, **parallel: Any) -> tuple[Job, Any]:
    recipe = changed(loaded(*overrides, "run.dir=unused"), **parallel)
    layout = validate_recipe(recipe, device="cuda")
    arguments = (recipe.model, recipe.parallel, recipe.precision, recipe.stage, layout)
    return Job(*arguments, on_gpu=True), parse_pattern(recipe.model.hybrid_layer_pattern)


@pytest.mark.parametrize(("name", "elements"), PARAMETERS.items())
def test_parameters_of_a_whole_model_are_those_released(name: str, elements: int) -> None:
    job, pattern = job_of(f"experiment={name}", "parallel=single")
    (share,) = shares(pattern.stages, pattern.mtp, pattern.mtp_depths, 1)
    assert sum(parameters(job, share)) == elements


@pytest.mark.parametrize(("name", "sequence", "tflops", "tokens"), TFLOPS)
def test_the_convention_of_the_throughput_tables(
    name: str, sequence: int, tflops: float, tokens: int
) -> None:
    model = load_recipe([f"experiment={name}"]).model
    published = tflops * 1e12 / tokens
    assert published_flops_per_token(model, sequence) == pytest.approx(published, rel=0.01)


def test_the_widest_row_of_the_throughput_tables() -> None:
    """901 TFLOP/s at 39,936 tokens/s: 39 sequences a second on 8 GPUs, give or take a half."""
    counted = published_flops_per_token(loaded("experiment=nano_30b_a3b").model, 8192)
    low, high = (901e12 / (sequences * 8192 / 8) for sequences in (39.5, 38.5))
    assert low < counted < high


@pytest.mark.parametrize("row", THROUGHPUT)
def test_published_throughput_within_a_quarter(row: tuple[Any, ...]) -> None:
    name, precision, gpu, ranks, tp, ep, size, batch, recomputed, published = row
    recipe = load_recipe(
        [
            f"experiment={name}",
            f"precision={precision}",
            "parallel=single",
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.expert_model_parallel_size={ep}",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            "parallel.moe_token_dispatcher_type=flex",
            f"stage.micro_batch_size={size}",
            f"stage.global_batch_size={batch}",
        ]
    )
    recipe = changed(recipe, **recomputing(recomputed))
    assert plan(recipe, ranks, gpu).tokens_per_second == pytest.approx(published, rel=0.25)


def test_memory_follows_what_is_split_and_recomputed() -> None:
    job, pattern = job_of(SUPER, pipeline_model_parallel_size=4)
    cut = shares(pattern.stages, pattern.mtp, pattern.mtp_depths, 4)
    assert "".join(share.layers for share in cut) == pattern.main
    # 1F1B: earlier ranks hold more micro batches; the last one holds the heads.
    first, second = (memory(job, share).activations for share in cut[:2])
    assert first > second
    recomputed, _ = job_of(SUPER, pipeline_model_parallel_size=4, **recomputing("moe"))
    assert memory(recomputed, cut[0]).activations < memory(job, cut[0]).activations
    wider = {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 4}
    job, _ = job_of(SUPER, **wider)
    assert memory(job, cut[1]).activations == pytest.approx(second / 2, rel=0.02)


SUPER_SYMBOLS = "M" * 40 + "E" * 42 + "*" * 10
"""Layers of Super with both multi-token-prediction depths."""


def test_recomputation_costs_time_and_saves_memory() -> None:
    recipe = loaded(SUPER)
    base = plan(recipe, None, "gb200")
    for modules in ("moe_act", "layernorm", "shared_experts", "core_attn", "moe", "full"):
        found = plan(changed(recipe, **recomputing(modules)), None, "gb200")
        assert found.seconds > base.seconds, modules
        assert found.needed <= base.needed, modules


@pytest.mark.parametrize(
    ("parallel", "modules"),
    [
        (recomputing("core_attn"), {"*": "self_attention.core"}),
        (recomputing("shared_experts"), {"E": "mlp.shared"}),
        (recomputing("moe"), {"E": "mlp"}),
        (recomputing("moe_act,layernorm"), {}),  # bound by memory
        ({"cross_entropy_loss_chunk": 128}, {"head": ""}),
    ],
)
def test_flops_of_what_is_recomputed(parallel: dict[str, Any], modules: dict[str, str]) -> None:
    def total(parallel: dict[str, Any]) -> float:
        job, pattern = job_of(SUPER, **parallel)
        (share,) = shares(pattern.stages, pattern.mtp, pattern.mtp_depths, 1)
        return sum(flops(job, share, work_of(loaded(SUPER)), pattern).values())

    model = loaded(SUPER).model
    again = 3 * 2.0 * 4096 * 131_072 * ("head" in modules)
    for symbol in SUPER_SYMBOLS:  # model.counts is held against the real modules
        for module, count in layer_flops(model, symbol, 8192).items():
            again += count * module.startswith(modules.get(symbol, "nothing"))
    assert total(parallel) - total({}) == pytest.approx(again)
    assert total({}) == pytest.approx(flops_per_token(model, 8192))


def test_the_search_ranks_what_fits() -> None:
    recipe = load_recipe(["experiment=nano_30b_a3b", "stage.global_batch_size=512"])
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    found = search(recipe, 16, pattern, work_of(recipe), GPUS["h100"])
    speeds = [each.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True) and speeds
    assert all(each.needed <= GPUS["h100"].memory for each in found)
    assert all(each.layout.world_size == 16 for each in found)
    assert not search(recipe, 1, pattern, work_of(recipe), GPUS["h100"])


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['plan', 'experiment=super_120b_a12b', 'cluster.gpu=gb200']\n"
        "import runpy\n"
        "try: runpy.run_module('parallel.plan', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest micro batch that fits" in done.stdout


def test_an_unknown_gpu_is_refused() -> None:
    from parallel.plan import main

    with pytest.raises(ConfigError, match=r"cluster.gpu=a100.*h100"):
        main(load_recipe(["experiment=tiny", "cluster.gpu=a100"]))
    with pytest.raises(ConfigError, match=r"plan.ranks"):
        main(load_recipe(["experiment=tiny", "plan.search=true"]))


def context_bytes(layer: str, *overrides: str, **parallel: Any) -> float:
    """Of one layer of Super, tp 2, cp 64, in each of 16 micro batches."""
    job, _ = job_of(*LONG, *overrides, **parallel)
    (share,) = shares((layer,), "", 0, 1)
    return sum(x.bytes for x in traffic(job, share) if x.purpose == "context") / 16


def test_heads_share_groups_between_context_parallel_ranks() -> None:
    # Three times 64 heads of 64, B and C of 64 groups (there are 4) of 128, 64 steps; of them
    # 63 / 64 go away, in BF16, both ways.
    elements = 3 * 4096 + 2 * 64 * 128 + 64
    assert context_bytes("M") == pytest.approx(2 * 2 * 16_384 * elements * 63 / 64)


def test_states_cross_ranks_whatever_the_length() -> None:
    kept = {"mamba_context": "state", **recomputing("")}
    # Two segments: 3 tokens of 64 heads of 64 and 4 groups of 128 in BF16; states in FP32 and,
    # forward, a decay a head.
    halo, states = 3 * (4096 + 2 * 4 * 128) * 2, 4096 * 128 * 4
    forward, backward = (63 * 2 * (halo + states + decays) for decays in (64 * 4, 0))
    assert context_bytes("M", **kept) == forward + backward
    assert context_bytes("M", "stage.sequence_length=8192", **kept) == forward + backward
    recomputed = kept | recomputing("layernorm")  # and the mixer with any selection
    assert context_bytes("M", **recomputed) == 2 * forward + backward


def test_gpus_send_gradients_of_keys_in_their_own_type() -> None:
    # Transformer Engine: one head's keys and values take 63 hops forward and 63 backward, and
    # their gradients 63, in BF16.
    hops = 63 * 16_384 * 2 * 128 * 2
    assert context_bytes("*") == 3 * hops
    assert context_bytes("*", **recomputing("core_attn")) == 4 * hops


def test_flex_sends_a_token_once_to_every_domain() -> None:
    keys: dict[str, Any] = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 32}
    job, _ = job_of(SUPER, moe_token_dispatcher_type="flex", **keys)
    (share,) = shares(("E",), "", 0, 1)
    found = [x for x in traffic(job, share, domain=8) if x.purpose == "expert_dispatch"]
    inside, outside = (x.bytes / 2 / job.layout.num_microbatches for x in found)
    assert [x.span for x in found] == [8, 32]
    row = 8192 * (1024 * 2 + 22 * 4)
    # 22 experts are on 16 of 32 ranks, and in every one of 4 domains but one time in 500.
    assert outside == pytest.approx(3 * row, rel=0.002)
    chosen = random.Random(0)
    ranks = [len({chosen.randrange(32) for _ in range(22)} - {0}) for _ in range(20_000)]
    assert inside == pytest.approx(row * sum(ranks) / len(ranks), rel=0.01)


def test_ultra_fits_as_published_and_as_its_recipe_has_it() -> None:
    """Megatron-Bridge's README: TP2 PP3 EP32 on 96 GB200, sequences of 4096, BF16."""
    name, memory = "experiment=ultra_550b_a55b", GPUS["gb200"].memory
    assert plan(loaded(name), None, "gb200").needed < memory
    readme = changed(loaded(name, "precision=bf16"), expert_model_parallel_size=32)
    short = replace(readme, stage=replace(readme.stage, sequence_length=4096))
    assert plan(short, 96, "gb200").needed < memory < plan(readme, 96, "gb200").needed


def test_block_formats_keep_copies_of_weights() -> None:
    job, pattern = job_of(SUPER)
    early = pattern.main[:74]  # the rest is BF16, like attention, latents and MTP
    nvfp4, mxfp8 = 2 * (1 / 2 + 1 / 16), 2 * (1 + 1 / 32)  # by rows and by columns, with scales
    projection = (2 * 8192 + 2 * 1024 + 128) * 4096 / 2 * nvfp4 + 8192 * 4096 / 2 * mxfp8
    experts = (8 * 2 * 1024 * 2688 + 2 * 4096 * 5376 / 2) * nvfp4
    found = plan(loaded(SUPER), None, "gb200").ranks[0][1].quantised
    assert found == pytest.approx(early.count("M") * projection + early.count("E") * experts)


def test_recomputing_more_layers_of_a_stage_keeps_less() -> None:
    def activations(count: int) -> float:
        recipe = changed(loaded(SUPER), pipeline_model_parallel_size=4, **full("block", count))
        return plan(recipe, None, "gb200").ranks[0][1].activations

    first, half, whole = (activations(n) for n in (1, 11, 22))
    assert first > half > whole == activations(40)


@pytest.mark.parametrize(
    ("experiment", "ranks", "use"),
    [("tiny", 5, "4 or 8"), ("nano_30b_a3b", 100, "96 or 128"), ("nano_30b_a3b", 10**5, "3072,")],
)
def test_ranks_that_divide_no_batch(experiment: str, ranks: int, use: str) -> None:
    from parallel.plan import main

    search = ["plan.search=true", f"plan.ranks={ranks}"]
    with pytest.raises(ConfigError, match=rf"plan.ranks={ranks} .*use {use}"):
        main(load_recipe([f"experiment={experiment}", *search]))


def layouts_found(*overrides: str) -> list[Plan]:
    recipe = load_recipe(["experiment=tiny", *overrides])
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    return search(recipe, 2, pattern, work_of(recipe), GPUS["h100"])


def test_the_search_starts_from_any_recomputation() -> None:
    full = (
        "parallel.recompute_granularity=full",
        "parallel.recompute_method=uniform",
        "parallel.recompute_num_layers=1",
    )
    assert len(layouts_found(*full)) == len(layouts_found()) > 0


def test_the_search_shows_only_what_would_run() -> None:
    found = layouts_found("data.inter_document_masking=true", "stage.sequence_length=65536")
    assert {plan.recipe.stage.micro_batch_size for plan in found} == {1}
    assert {plan.layout.cp for plan in found} == {1}  # GPUs do not cut packed documents


@pytest.mark.parametrize(
    "override", ["model.num_moe_experts=null", "stage.global_batch_size=0", "model.hidden_size=0"]
)
def test_the_search_validates_the_recipe(override: str) -> None:
    from parallel.plan import main

    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        main(load_recipe(["experiment=tiny", "plan.search=true", "plan.ranks=2", override]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.inter_document_masking=true", "stage.micro_batch_size=1"],
        [
            "model.hybrid_layer_pattern='ME|ME|M*|EME/*E/*E'",
            "parallel.pipeline_model_parallel_size=2",
            "stage.micro_batch_size=4",
        ],
    ],
)
def test_the_largest_micro_batch_is_one_that_runs(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from model.validate import validate_recipe
    from parallel.plan import main

    main(load_recipe(["experiment=tiny", *overrides]))
    said = re.search(r"largest micro batch that fits +(\d+)", capsys.readouterr().out)
    assert said
    largest = f"stage.micro_batch_size={said[1]}"
    validate_recipe(load_recipe(["experiment=tiny", *overrides[:-1], largest]), device="cuda")


def test_every_length_of_a_mix_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    from parallel.plan import main

    main(load_recipe(["experiment=nano_30b_a3b_stages", "run.stage=long_context"]))
    printed = capsys.readouterr().out
    sequences = [int(n) for n in re.findall(r"micro batch \d+, (\d+) sequences a step", printed)]
    seconds = [float(s) for s in re.findall(r"predicted seconds per step +(\S+)", printed)]
    last = printed.strip().splitlines()[-1]
    shares = [float(s) for s in re.findall(r"([\d.]+) of \d", last)]
    assert [int(n) for n in re.findall(r"\d of (\d+)", last)] == [524288, 4096]
    mean = sum(share * one for share, one in zip(shares, seconds, strict=True))
    tokens = shares[0] * sequences[0] * 524288 + shares[1] * sequences[1] * 4096
    found = re.search(r"([\d.]+) s on average, ([\d,]+) tokens/s per GPU", last)
    assert found and float(found[1]) == pytest.approx(mean, abs=0.02)
    assert float(found[2].replace(",", "")) == pytest.approx(tokens / mean / 256, rel=1e-3)
