"""Every rule: what breaks it is named with key, value and remedy; what fits passes."""

import functools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backends import install_backends
from model.validate import validate_recipe
from parallel.layout import Layout
from recipes.compose import choices, load_recipe
from recipes.errors import ConfigError
from recipes.schema import Recipe

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
FULL = "parallel.recompute_granularity=full"


TINY = ("experiment=tiny", "stage.global_batch_size=16", "stage.micro_batch_size=16")
"""The tiny recipe with a batch the numbers below are for."""


def message(*overrides: str, world_size: int | None = None, device: str | None = None) -> str:
    """What is said about a tiny recipe with these overrides."""
    with pytest.raises(ConfigError) as error:
        validate_recipe(load_recipe([*TINY, *overrides]), world_size, device)
    return str(error.value)


def layout(*overrides: str, world_size: int | None = None) -> Layout:
    """The layout of a tiny recipe with these overrides."""
    return validate_recipe(load_recipe([*TINY, *overrides]), world_size)


# Overrides -> key=value and remedy that the message must hold.
BROKEN: list[tuple[list[str], list[str]]] = [
    # model
    (
        ["model.fp32_residual_connection=true"],
        ["params_dtype=bf16", "use false, or precision=fp32"],
    ),
    (["model.hidden_size=0"], ["model.hidden_size=0", "at least 1", "use 1 or more"]),
    (["model.vocab_size=-5"], ["model.vocab_size=-5", "use 1 or more"]),
    (["model.mamba_state_dim=0"], ["model.mamba_state_dim=0", "use 1 or more"]),
    (["model.moe_router_topk=0"], ["model.moe_router_topk=0", "use 1 or more"]),
    (["model.moe_latent_size=0"], ["moe_latent_size=0", "or null (experts at full width)"]),
    (["model.mamba_d_conv=5"], ["model.mamba_d_conv=5", "use 2, 3 or 4"]),
    (["model.num_query_groups=3"], ["num_query_groups=3", "heads=4", "use 1, 2 or 4"]),
    (["model.mamba_num_groups=3"], ["mamba_num_groups=3", "heads=32", "use 1, 2, 4, 8, 16 or 32"]),
    (["model.num_moe_experts=null"], ["num_moe_experts=null", "MoE layers (E)", "give it"]),
    (["model.moe_ffn_hidden_size=null"], ["moe_ffn_hidden_size=null", "give it a size"]),
    (["model.hybrid_layer_pattern=M-"], ["ffn_hidden_size=null", "MLP layers (-)"]),
    (["model.hybrid_layer_pattern=MQ"], ["'Q' at position 1"]),
    (["model.moe_router_topk=17"], ["topk=17", "num_moe_experts=16", "use 16 or fewer"]),
    (["model.moe_router_score_function=tanh"], ["=tanh", "use sigmoid or softmax"]),
    (["model.moe_router_score_function=softmax"], ["enable_expert_bias=true", "use false"]),
    (
        [
            "model.moe_router_score_function=softmax",
            "model.moe_router_enable_expert_bias=false",
            "model.moe_router_topk=1",
        ],
        ["moe_router_topk=1", "no gradient", "use 2 or more, or sigmoid"],
    ),
    (["model.moe_router_dtype=bf16"], ["moe_router_dtype=bf16", "use fp32, fp64 or null"]),
    (
        ["model.moe_router_load_balancing_type=sinkhorn"],
        ["=sinkhorn", "use aux_loss, seq_aux_loss, global_aux_loss or none"],
    ),
    (["model.moe_aux_loss_coeff=-1"], ["moe_aux_loss_coeff=-1", "use 0 or more"]),
    (["model.moe_router_topk_scaling_factor=0"], ["scaling_factor=0", "or null (1)"]),
    (["model.moe_router_num_groups=4"], ["num_groups=4", "group_topk=null", "give both"]),
    (
        ["model.moe_router_num_groups=3", "model.moe_router_group_topk=1"],
        ["num_groups=3", "num_moe_experts=16", "use 1, 2, 4, 8 or 16"],
    ),
    (
        ["model.moe_router_num_groups=4", "model.moe_router_group_topk=3"],
        ["group_topk=3", "topk=4", "use 1, 2 or 4"],
    ),
    (["model.hidden_dropout=1.0"], ["hidden_dropout=1", "use a number in [0, 1)"]),
    (["model.init_method_std=0"], ["init_method_std=0", "above 0", "sqrt(0.8 / hidden_size)"]),
    (["model.layernorm_epsilon=0"], ["layernorm_epsilon=0", "use a number above 0"]),
    (["model.mtp_loss_scaling_factor=-0.1"], ["mtp_loss_scaling_factor=-0.1", "use 0 or more"]),
    # layout
    ([f"{TP}=0"], [f"{TP}=0", "use 1 or more"]),
    (["parallel.timeout_minutes=0"], ["timeout_minutes=0", "use a number above 0"]),
    (["guard.progress_timeout_minutes=0"], ["timeout_minutes=0", "use a number above 0"]),
    (
        ["guard.progress_timeout_minutes=10"],
        ["progress_timeout_minutes=10", "parallel.timeout_minutes=10", "raise"],
    ),
    ([f"{TP}=4"], [f"{TP}=4", "mamba_num_groups=2", "use 1 or 2"]),
    (
        [f"{TP}=3", "model.mamba_num_groups=3", "model.mamba_num_heads=9"],
        [f"{TP}=3", "num_attention_heads=4 (4 % 3 = 1)", "use 1, 2 or 4"],
    ),
    (
        [f"{TP}=4", "model.mamba_num_groups=4", "model.num_attention_heads=12"]
        + ["model.num_query_groups=6"],
        [f"{TP}=4", "neither a divisor nor a multiple of model.num_query_groups=6"]
        + ["use 1, 2, 3, 6 or 12"],
    ),
    ([f"{TP}=2", "model.vocab_size=4095"], [f"{TP}=2", "vocab_size=4095"]),
    (
        [f"{TP}=2", "model.moe_shared_expert_intermediate_size=255"],
        [f"{TP}=2", "moe_shared_expert_intermediate_size=255"],
    ),
    (["parallel.sequence_parallel=true"], ["sequence_parallel=true", "to null"]),
    (
        [f"{TP}=2", "parallel.sequence_parallel=false"],
        ["sequence_parallel=false", "MoE layers", "use true or null"],
    ),
    ([f"{CP}=3"], [f"{CP}=3", "mamba_num_heads", "=32", "use 1, 2, 4, 8, 16 or 32"]),
    (
        [f"{CP}=3", "model.mamba_num_heads=12"],
        [f"{CP}=3", "mamba_num_groups", "=2", "use 1, 2, 4, 6 or 12"],
    ),
    (["parallel.cp_comm_type=ring"], ["cp_comm_type=ring", "use p2p, all_gather or a2a"]),
    (
        [f"{CP}=4", "parallel.cp_comm_type=a2a"],
        ["cp_comm_type=a2a", "the 2 key/value heads", "use p2p or all_gather"],
    ),
    (["parallel.mamba_context=ring"], ["mamba_context=ring", "use heads or state"]),
    (
        ["model.hybrid_layer_pattern=MEME", "parallel.cp_comm_type=ring"],
        ["cp_comm_type=ring", "use p2p, all_gather or a2a"],
    ),
    (
        [f"{CP}=4", "parallel.mamba_context=state", "stage.sequence_length=16"],
        ["sequence_length=16", "use 24 or more"],
    ),
    (["parallel.cross_entropy_loss_chunk=0"], ["loss_chunk=0", "or null (all tokens at once)"]),
    (["data.inter_document_masking=true"], ["micro_batch_size=16", "use stage.micro_batch_size=1"]),
    ([f"{EP}=3"], [f"{EP}=3", "num_moe_experts=16", "use 1, 2, 4, 8 or 16"]),
    ([f"{ETP}=3"], [f"{ETP}=3", "moe_ffn_hidden_size=128"]),
    ([f"{EP}=2", "model.hybrid_layer_pattern=MM*"], [f"{EP}=2", "no MoE layer", "use 1"]),
    (
        ["parallel.moe_token_dispatcher_type=a2a"],
        ["dispatcher_type=a2a", "use alltoall, allgather or flex"],
    ),
    ([f"{PP}=2"], [f"{PP}=2", "the 9 layers", "use 1, 3 or 9, or cut the pattern"]),
    (
        [f"{PP}=2", "model.hybrid_layer_pattern=ME|M|*E"],
        [f"{PP}=2", "stages of model.hybrid_layer_pattern=3", "use 1 or 3"],
    ),
    (
        [f"{PP}=2", "model.hybrid_layer_pattern=M|E|E|M", "stage.global_batch_size=48"],
        ["global_batch_size=48", "3 micro batches", "interleaved", "use 32, 64 or 128"],
    ),
    ([f"{TP}=2", "model.hidden_size=127"], [f"{TP}=2", "model.hidden_size=127", "use 1 or 127"]),
    (["parallel.recompute_granularity=some"], ["=some", "use null, selective or full"]),
    (["parallel.recompute_modules=[moe]"], ["recompute_modules=[moe]", "=selective"]),
    (
        ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[moe,mamba]"],
        ["recompute_modules=mamba", "use core_attn, moe_act, layernorm, mlp, moe or shared"],
    ),
    (["parallel.recompute_method=block"], ["recompute_method=block", "=full"]),
    ([FULL], ["recompute_method=null", "use uniform or block"]),
    ([FULL, "parallel.recompute_method=block"], ["recompute_num_layers=null", "1 or more"]),
    (
        [FULL, "parallel.recompute_method=uniform", "parallel.recompute_num_layers=2"],
        ["recompute_num_layers=2", "use 1"],
    ),
    (["parallel.data_parallel_size=0"], ["data_parallel_size=0", "use 1 or more"]),
    (
        [f"{EP}=4", "parallel.data_parallel_size=2"],
        ["data_parallel_size=2", "expert_model_parallel_size", "use 4, 8 or 16"],
    ),
    # batch and sequence
    (["stage.global_batch_size=17"], ["global_batch_size=17", "ranks=16", "use 16 or 32"]),
    (["stage.micro_batch_size=32"], ["global_batch_size=16", "ranks=32", "use 32 or 64"]),
    ([f"{TP}=2", "stage.sequence_length=255"], ["sequence_length=255", "use 254 or 256"]),
    ([f"{CP}=2", "stage.sequence_length=254"], ["sequence_length=254", "use 252 or 256"]),
    (
        ["stage.sequence_length=2000000"],
        ["sequence_length=2000000", "max_position_embeddings=1048576", "shorten"],
    ),
    # stage
    (["stage.train_steps=null"], ["train_steps=null", "train_tokens=null", "give one"]),
    (["stage.train_tokens=1e6"], ["train_steps=300", "train_tokens=1e+06", "one of them to null"]),
    (["stage.train_steps=0"], ["train_steps=0", "use 1 or more"]),
    (["stage.train_steps=null", "stage.train_tokens=nan"], ["train_tokens=nan", "4096 or more"]),
    (["stage.train_steps=null", "stage.train_tokens=inf"], ["train_tokens=inf", "4096 or more"]),
    (
        [
            "model.hybrid_layer_pattern='M*'",
            "model.num_moe_experts=null",
            "parallel.recompute_granularity=selective",
            "parallel.recompute_modules=[moe_act]",
        ],
        ["recompute_modules=[moe_act]", "num_moe_experts=null", "leave moe_act out"],
    ),
    (["stage.train_steps=null", "stage.train_tokens=9"], ["train_tokens=9", "4096 or more"]),
    (["stage.eval_interval=0"], ["eval_interval=0", "or null (only at the end)"]),
    # optimizer
    (["optimizer.optimizer=sgd"], ["optimizer.optimizer=sgd", "use adam"]),
    (["optimizer.lr=0"], ["optimizer.lr=0", "use a number above 0"]),
    (["optimizer.lr=inf"], ["optimizer.lr=inf", "use a number above 0"]),
    (["optimizer.lr=nan"], ["optimizer.lr=nan", "use a number above 0"]),
    (["optimizer.min_lr=1"], ["optimizer.min_lr=1", "use a number in [0, 0.006]"]),
    (["optimizer.adam_beta2=1"], ["adam_beta2=1", "use a number in [0, 1)"]),
    (["optimizer.clip_grad=-1"], ["clip_grad=-1", "use 0 or more"]),
    (["optimizer.weight_decay=-1"], ["weight_decay=-1", "use 0 or more"]),
    (["optimizer.lr_decay_style=wsd"], ["=wsd", "use WSD, cosine, linear or constant"]),
    (["optimizer.lr_wsd_decay_style=sqrt"], ["=sqrt", "use minus_sqrt, linear"]),
    (["optimizer.lr_warmup_fraction=1.5"], ["fraction=1.5", "use a number in [0, 1]"]),
    (
        ["optimizer.lr_warmup_fraction=0.9"],
        ["lr_warmup_fraction=0.9", "longer than the schedule", "lr_schedule_tokens"],
    ),
    (
        ["optimizer.lr_warmup_tokens=2e6", "optimizer.lr_decay_style=cosine"],
        ["lr_warmup_tokens=2e+06", "longer than the schedule (1.2288e+06 tokens)"],
    ),
    # the rest
    (["precision.params_dtype=fp16"], ["params_dtype=fp16", "use bf16 or fp32"]),
    (["checkpoint.save_interval=0"], ["save_interval=0", "or null (only at the end)"]),
    (["checkpoint.keep_last=0"], ["keep_last=0", "or null (all)"]),
    (["checkpoint.keep_every=150"], ["keep_every=150", "save_interval=100", "use 100 or 200"]),
    (["guard.non_finite=ignore"], ["non_finite=ignore", "use stop, skip or rollback"]),
    (
        ["guard.non_finite=rollback", "checkpoint.save_interval=null"],
        ["non_finite=rollback", "save_interval=null", "set checkpoint.save_interval"],
    ),
    (["logging.wandb=on"], ["logging.wandb=on", "use disabled, offline or online"]),
    (["run.seed=-1"], ["run.seed=-1", "use a number in [0,"]),
    (["device=gpu"], ["device=gpu", "use auto, cuda or host"]),
    (["cluster.threads_per_rank=0"], ["threads_per_rank=0", "use 1 or more"]),
    (["data.tokenizer.library=sentencepiece"], ["library=sentencepiece", "use huggingface"]),
    (["data.train=[{path: a, weight: 0}]"], ["data.train[0].weight=0", "above 0"]),
]


@pytest.mark.parametrize(("overrides", "said"), BROKEN, ids=lambda x: " ".join(x)[:60])
def test_broken_rules(overrides, said):
    text = message(*overrides)
    for words in said:
        assert words in text
    assert "\n" not in text and ";" in text  # one sentence with a remedy


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_shipped_experiments_are_valid(experiment):
    recipe = load_recipe([f"experiment={experiment}"])
    found = validate_recipe(recipe)
    assert found.tp == recipe.parallel.tensor_model_parallel_size
    tokens = found.num_microbatches * found.dp * recipe.stage.micro_batch_size
    assert tokens == recipe.stage.global_batch_size


def test_layout_of_super():
    found = validate_recipe(load_recipe(["experiment=super_120b_a12b"]), world_size=128)
    assert found == Layout(
        world_size=128, tp=2, pp=1, cp=1, dp=64, ep=64, etp=1, edp=2,
        sequence_parallel=True, virtual_stages=1, num_microbatches=48,
    )  # fmt: skip


def test_top_1_routing_and_null_dtype_are_allowed():
    layout("model.moe_router_topk=1", "model.moe_router_dtype=null")


def test_boundaries_do_nothing_on_one_pipeline_rank():
    assert layout("model.hybrid_layer_pattern=MEM|*E/*E").virtual_stages == 1
    two = layout("model.hybrid_layer_pattern=M|E|E|M", f"{PP}=2", "stage.micro_batch_size=4")
    assert (two.virtual_stages, two.num_microbatches) == (2, 4)


def test_key_value_heads_may_be_fewer_than_tensor_ranks():
    layout(f"{TP}=4", "model.mamba_num_groups=4", "model.num_query_groups=2")


def test_launched_ranks_must_fit():
    small = "stage.micro_batch_size=1"
    assert layout(small, world_size=4).dp == 4
    text = message(small, f"{EP}=2", world_size=3)
    assert "world size=3" in text and "launch 2, 4 or 8 ranks" in text
    text = message(small, "parallel.data_parallel_size=2", world_size=4)
    assert "data_parallel_size=2" in text and "4 were launched" in text


def test_host_refuses_what_its_standins_do_not_do():
    dropout = [f"{CP}=2", "model.attention_dropout=0.1"]
    assert validate_recipe(load_recipe(["experiment=tiny", *dropout]), device="cuda").cp == 2
    assert "or device=cuda" in message(*dropout, device="host")
    assert "or device=cuda" in message(*dropout, "device=host")
    documents = ["data.inter_document_masking=true", "stage.micro_batch_size=1"]
    assert "use 0, or device=cuda" in message(*documents, dropout[1], device="host")
    assert "or device=host" in message(*documents, f"{CP}=2", device="cuda")
    flex = "parallel.moe_token_dispatcher_type=flex"
    assert "use alltoall or allgather" in message(flex, device="host")
    assert "or use alltoall" in message(flex, device="cuda")
    experts = [flex, "parallel.expert_model_parallel_size=2", "stage.micro_batch_size=1"]
    assert "use fp32" in message(*experts, "model.moe_router_dtype=fp64", device="cuda")
    recipe = load_recipe(["experiment=tiny", *experts])
    assert validate_recipe(recipe, device="cuda").ep == 2


@functools.cache
def twelve() -> Recipe:
    """A recipe whose sizes every number of ranks up to 4 divides. Loaded once: composing takes
    longer than validating."""
    return load_recipe(
        ["experiment=tiny", "model.num_attention_heads=24", "model.num_query_groups=24"]
        + ["model.hidden_size=72"]
        + ["model.kv_channels=24", "model.mamba_num_heads=288", "model.mamba_num_groups=24"]
        + ["model.num_moe_experts=12", "model.moe_ffn_hidden_size=12", "model.vocab_size=24"]
        + ["model.moe_shared_expert_intermediate_size=24", "stage.sequence_length=720"]
        + ["stage.global_batch_size=1728", "stage.micro_batch_size=1"]
    )


def changed(recipe: Recipe, **groups: dict[str, Any]) -> Recipe:
    """A copy with other values: `changed(recipe, model={"hidden_size": 4})`."""
    parts = {name: replace(getattr(recipe, name), **values) for name, values in groups.items()}
    return replace(recipe, **parts)


sizes = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=100, deadline=None)
@given(tp=sizes, cp=sizes, pp=sizes, ep=sizes, etp=sizes)
def test_smallest_world_is_the_first_that_megatron_accepts(tp, cp, pp, ep, etp):
    """Megatron wants world % (tp * cp * pp) == 0 and world % (etp * ep * pp) == 0."""
    found = validate_recipe(
        changed(
            twelve(),
            model={"hybrid_layer_pattern": "|".join("E" * pp)},
            parallel={
                "tensor_model_parallel_size": tp,
                "context_parallel_size": cp,
                "pipeline_model_parallel_size": pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
            },
        )
    )
    first = next(w for w in range(1, 1000) if w % (tp * cp * pp) == 0 == w % (etp * ep * pp))
    assert found.world_size == first
    assert found.dp * tp * cp * pp == first == found.edp * ep * etp * pp


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 6, 8]),
    groups=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    sequence_parallel=st.sampled_from([True, None]),
)
def test_agrees_with_megatrons_configuration(tp, groups, sequence_parallel):
    """Megatron's TransformerConfig, which checks heads and sequence parallelism, and our
    rules accept the same."""
    install_backends("host")
    from model.hybrid import transformer_config

    recipe = changed(
        twelve(),
        model={"num_query_groups": groups},
        parallel={"tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel},
    )

    def accepts(check, error) -> bool:
        try:
            check()
        except error:
            return False
        return True

    ours = accepts(lambda: validate_recipe(recipe), ConfigError)
    theirs = accepts(
        lambda: transformer_config(recipe.model, recipe.precision, recipe.parallel), ValueError
    )
    assert ours == theirs


def test_validation_needs_no_torch():
    code = (
        "import sys, model.validate, model.counts\n"
        "from recipes.compose import load_recipe\n"
        "recipe = load_recipe(['experiment=super_120b_a12b'])\n"
        "model.validate.validate_recipe(recipe)\n"
        "model.counts.flops_per_token(recipe.model, 8192)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
