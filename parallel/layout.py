"""How the ranks of a run are laid out, checked before anything is built.

Megatron places ranks on two grids over the same world (parallel_state.RankGenerator): the
dense layers on tp x cp x dp x pp, the experts on etp x ep x edp x pp. So

    world = tp * cp * pp * dp = etp * ep * pp * edp

and the smallest world is pp * lcm(tp * cp, etp * ep): tp * cp ranks share a layer, etp * ep
ranks share its experts, and the data-parallel ranks of the dense grid are where the experts'
ranks come from.
"""

from dataclasses import dataclass
from math import lcm

from recipes.rules import above, at_least, divides, fail, listed, multiple, one_of
from recipes.schema import ModelConfig, ParallelConfig, StageConfig

RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")
"""What Megatron can recompute selectively in the layers of this family."""

CP_COMM_TYPES = ("p2p", "all_gather", "a2a")
"""How attention crosses context-parallel ranks. Transformer Engine's a2a+p2p, which needs groups
of groups, is left out."""


@dataclass(frozen=True)
class Layout:
    """A valid layout, every size known."""

    world_size: int
    """Ranks of the run."""
    tp: int
    pp: int
    cp: int
    dp: int
    """Ranks of the dense grid: tensor, pipeline, context, data parallel."""
    ep: int
    etp: int
    edp: int
    """Ranks of the experts' grid: expert, expert tensor, expert data parallel."""
    sequence_parallel: bool
    """Activations are split along the sequence between tensor-parallel ranks."""
    virtual_stages: int
    """Pieces of the model a pipeline rank holds; more than one: interleaved schedule."""
    num_microbatches: int
    """Forward passes of a rank in one optimizer step."""

    def __str__(self) -> str:
        virtual = f" with {self.virtual_stages} pieces each" if self.virtual_stages > 1 else ""
        split = " and sequence" if self.sequence_parallel else ""
        return (
            f"ranks {self.world_size} = tensor{split} {self.tp} x context {self.cp} x pipeline "
            f"{self.pp}{virtual} x data {self.dp}; experts: expert {self.ep} x tensor "
            f"{self.etp} x data {self.edp}; micro batches a step: {self.num_microbatches}"
        )


def validate_layout(
    parallel: ParallelConfig,
    model: ModelConfig,
    stage: StageConfig,
    world_size: int | None,
    *,
    symbols: str,
    num_layers: int,
    num_stages: int,
    mtp_depths: int,
) -> Layout:
    """Check that the model, the batch and the ranks divide, and fill in what is derived.

    Args:
        world_size: ranks that were launched; None: the fewest the recipe can run on.
        symbols: the kinds of layer in use (M, *, E, -), those of MTP included.
        num_layers: layers of the decoder.
        num_stages: parts of the pattern between `|`; 1 without boundaries.
        mtp_depths: multi-token-prediction depths.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for name in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
        key = f"{name}_parallel_size"
        at_least(f"parallel.{key}", getattr(parallel, key), 1)
    at_least("parallel.data_parallel_size", parallel.data_parallel_size, 1, "what the ranks allow")
    above("parallel.timeout_minutes", parallel.timeout_minutes, 0)
    one_of("parallel.mamba_context", parallel.mamba_context, ("heads", "state"))
    one_of("parallel.cp_comm_type", parallel.cp_comm_type, CP_COMM_TYPES)
    sequence_parallel = _sequence_parallel(parallel, "E" in symbols)
    if "M" in symbols:
        _mamba(parallel, model)
        _mamba_context(parallel, model, stage)
    _tensor(parallel, model)
    if mtp_depths:  # eh_proj is split by rows
        divides(
            "parallel.tensor_model_parallel_size",
            parallel.tensor_model_parallel_size,
            "model.hidden_size",
            model.hidden_size,
        )
    if "*" in symbols:
        _attention_context(parallel, model)
    _experts(parallel, model, "E" in symbols)
    virtual = _pipeline(parallel, num_layers, num_stages)
    _recompute(parallel, mtp_depths, model.num_moe_experts is not None)
    world = _world(parallel, world_size)
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    layout = Layout(
        world_size=world,
        tp=parallel.tensor_model_parallel_size,
        pp=pp,
        cp=parallel.context_parallel_size,
        dp=world // (dense * pp),
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        edp=world // (_expert_ranks(parallel) * pp),
        sequence_parallel=sequence_parallel,
        virtual_stages=virtual,
        num_microbatches=_microbatches(stage, world // (dense * pp), pp, virtual),
    )
    _sequence(stage, model, layout)
    return layout


def _expert_ranks(parallel: ParallelConfig) -> int:
    return parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size


def _sequence_parallel(parallel: ParallelConfig, has_experts: bool) -> bool:
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel is None:
        return tp > 1
    if parallel.sequence_parallel and tp == 1:
        fail(
            "parallel.sequence_parallel",
            True,
            "splits the sequence between tensor-parallel ranks, but there is one",
            "set parallel.tensor_model_parallel_size above 1, or sequence_parallel to null",
        )
    if has_experts and tp > 1 and not parallel.sequence_parallel:
        fail(
            "parallel.sequence_parallel",
            False,
            f"cannot train MoE layers with tensor_model_parallel_size={tp}",
            "use true or null",
        )
    return parallel.sequence_parallel


def _tensor(parallel: ParallelConfig, model: ModelConfig) -> None:
    key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    divides(key, tp, "model.num_attention_heads", model.num_attention_heads)
    divides(key, tp, "model.vocab_size", model.vocab_size)
    # With fewer key/value heads than ranks Megatron gives several ranks the same head.
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        heads = model.num_attention_heads
        fits = [d for d in range(1, heads + 1) if not heads % d and not (groups % d and d % groups)]
        fail(
            key,
            tp,
            f"is neither a divisor nor a multiple of model.num_query_groups={groups}",
            f"use {listed(fits)}",
        )
    rows = (model.num_attention_heads + 2 * groups) * model.kv_channels
    divides(key, tp, "the rows of linear_qkv", rows)
    for name in ("ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(model, name) is not None:
            divides(key, tp, f"model.{name}", getattr(model, name))


def _mamba(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Tensor parallelism splits heads and groups; context parallelism splits what is left of
    the heads, and shares groups when there are fewer of them than ranks
    (megatron.core.ssm.mamba_context_parallel)."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    divides(
        "parallel.tensor_model_parallel_size", tp, "model.mamba_num_groups", model.mamba_num_groups
    )
    divides(
        "parallel.tensor_model_parallel_size", tp, "model.mamba_num_heads", model.mamba_num_heads
    )
    if parallel.mamba_context == "state":
        return
    heads, groups = model.mamba_num_heads // tp, model.mamba_num_groups // tp
    divides(
        "parallel.context_parallel_size", cp, "mamba_num_heads / tensor_model_parallel_size", heads
    )
    if groups % cp and cp % groups:
        fits = [d for d in range(1, heads + 1) if not heads % d and not (groups % d and d % groups)]
        fail(
            "parallel.context_parallel_size",
            cp,
            "is neither a divisor nor a multiple of mamba_num_groups / "
            f"tensor_model_parallel_size={groups}",
            f"use {listed(fits)}",
        )


def _mamba_context(parallel: ParallelConfig, model: ModelConfig, stage: StageConfig) -> None:
    cp, reach = parallel.context_parallel_size, model.mamba_d_conv - 1
    if parallel.mamba_context == "state" and cp > 1:
        at_least("stage.sequence_length", stage.sequence_length, 2 * cp * reach)


def _attention_context(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Rules of Transformer Engine's context parallelism."""
    if parallel.cp_comm_type != "a2a":
        return
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    # With fewer key/value heads than tensor-parallel ranks each rank has one.
    heads = max(1, model.num_query_groups // tp)
    if heads % cp:
        fail(
            "parallel.cp_comm_type",
            "a2a",
            f"splits the {listed([heads])} key/value heads of a tensor-parallel rank between "
            f"context_parallel_size={cp} ranks, which does not go",
            "use p2p or all_gather",
        )


def _experts(parallel: ParallelConfig, model: ModelConfig, has_experts: bool) -> None:
    one_of(
        "parallel.moe_token_dispatcher_type",
        parallel.moe_token_dispatcher_type,
        ("alltoall", "allgather", "flex"),
    )
    one_of(
        "parallel.moe_flex_dispatcher_backend",
        parallel.moe_flex_dispatcher_backend,
        ("deepep", "hybridep"),
    )
    at_least(
        "parallel.moe_flex_dispatcher_num_sms",
        parallel.moe_flex_dispatcher_num_sms,
        1,
        "the package's default",
    )
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if getattr(parallel, name) > 1 and not has_experts:
            fail(
                f"parallel.{name}",
                getattr(parallel, name),
                "splits experts, but model.hybrid_layer_pattern has no MoE layer (E)",
                "use 1",
            )
    if model.num_moe_experts is not None:
        divides(
            "parallel.expert_model_parallel_size",
            parallel.expert_model_parallel_size,
            "model.num_moe_experts",
            model.num_moe_experts,
        )
    if model.moe_ffn_hidden_size is not None:
        divides(
            "parallel.expert_tensor_parallel_size",
            parallel.expert_tensor_parallel_size,
            "model.moe_ffn_hidden_size",
            model.moe_ffn_hidden_size,
        )


def _pipeline(parallel: ParallelConfig, num_layers: int, num_stages: int) -> int:
    """Returns the virtual stages of a rank."""
    key, pp = "parallel.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size
    if pp == 1:
        return 1  # boundaries in the pattern do nothing on one pipeline rank
    if num_stages == 1:
        if num_layers % pp:
            fail(
                key,
                pp,
                f"does not divide the {num_layers} layers of model.hybrid_layer_pattern",
                f"use {listed(d for d in range(1, num_layers + 1) if num_layers % d == 0)}, or "
                "cut the pattern into stages with |",
            )
        return 1
    divides(key, pp, "the stages of model.hybrid_layer_pattern", num_stages)
    return num_stages // pp


def _recompute(parallel: ParallelConfig, mtp_depths: int, experts: bool) -> None:
    at_least(
        "parallel.cross_entropy_loss_chunk",
        parallel.cross_entropy_loss_chunk,
        1,
        "all tokens at once",
    )
    granularity, modules = parallel.recompute_granularity, parallel.recompute_modules
    one_of("parallel.recompute_granularity", granularity, (None, "selective", "full"))
    if modules is not None and granularity != "selective":
        fail(
            "parallel.recompute_modules",
            modules,
            "is used only by parallel.recompute_granularity=selective",
            "set that, or recompute_modules to null",
        )
    for module in modules or ():
        one_of("parallel.recompute_modules", module, RECOMPUTE_MODULES)
    if "moe_act" in (modules or ()) and not experts:
        fail(
            "parallel.recompute_modules",
            modules,
            "names moe_act, but model.num_moe_experts=null",
            "leave moe_act out",
        )
    if granularity != "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(parallel, name) is not None:
                fail(
                    f"parallel.{name}",
                    getattr(parallel, name),
                    "is used only by parallel.recompute_granularity=full",
                    f"set that, or {name} to null",
                )
        return
    one_of("parallel.recompute_method", parallel.recompute_method, ("uniform", "block"))
    at_least("parallel.recompute_num_layers", parallel.recompute_num_layers, 1)
    if mtp_depths and parallel.recompute_method == "uniform":
        # Megatron recomputes MTP blocks only as units of one layer.
        one_of("parallel.recompute_num_layers", parallel.recompute_num_layers, (1,))


def _world(parallel: ParallelConfig, world_size: int | None) -> int:
    """The ranks of the run, launched or the fewest that fit."""
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    pp, dp = parallel.pipeline_model_parallel_size, parallel.data_parallel_size
    smallest = pp * lcm(dense, _expert_ranks(parallel))
    if dp is not None and dp * dense * pp % smallest:
        step = smallest // (dense * pp)
        fail(
            "parallel.data_parallel_size",
            dp,
            f"times tp * cp = {dense} is not a multiple of expert_model_parallel_size * "
            f"expert_tensor_parallel_size = {_expert_ranks(parallel)}: the experts are spread "
            "over the ranks of the dense layers",
            f"use {listed([step, 2 * step, 4 * step])}",
        )
    if world_size is None:
        return smallest if dp is None else dp * dense * pp
    if dp is not None and world_size != dp * dense * pp:
        fail(
            "parallel.data_parallel_size",
            dp,
            f"needs {dp * dense * pp} ranks (tp * cp * pp * dp), but {world_size} were launched",
            f"launch {dp * dense * pp}, or set data_parallel_size to null",
        )
    if world_size % smallest:
        fail(
            "world size",
            world_size,
            f"is not a multiple of {smallest}, the ranks the layout needs: pipeline {pp} * "
            f"lcm(tensor * context = {dense}, experts = {_expert_ranks(parallel)})",
            f"launch {listed([smallest, 2 * smallest, 4 * smallest])} ranks or change the layout",
        )
    return world_size


def _microbatches(stage: StageConfig, dp: int, pp: int, virtual: int) -> int:
    together = stage.micro_batch_size * dp
    multiple(
        "stage.global_batch_size",
        stage.global_batch_size,
        "micro_batch_size * data-parallel ranks",
        together,
    )
    count = stage.global_batch_size // together
    if virtual > 1 and count % pp:
        unit = together * pp
        fail(
            "stage.global_batch_size",
            stage.global_batch_size,
            f"gives {count} micro batches, and the interleaved schedule of {virtual} stages a "
            f"rank needs a multiple of pipeline_model_parallel_size={pp}",
            f"use {listed([unit, 2 * unit, 4 * unit])}",
        )
    return count


def _sequence(stage: StageConfig, model: ModelConfig, layout: Layout) -> None:
    key, length = "stage.sequence_length", stage.sequence_length
    if length > model.max_position_embeddings:
        fail(
            key,
            length,
            f"is longer than model.max_position_embeddings={model.max_position_embeddings}",
            "raise that (it costs nothing) or shorten the sequence",
        )
    if layout.cp > 1:
        # Two chunks a rank balance causal attention.
        multiple(key, length, "2 * context_parallel_size", 2 * layout.cp)
    if layout.sequence_parallel:
        multiple(
            key,
            length,
            "tensor_model_parallel_size * context_parallel_size",
            layout.tp * layout.cp,
        )
