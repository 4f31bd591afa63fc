"""`python -m parallel.plan experiment=super_120b_a12b cluster.gpu=gb200`: what a layout needs.

Memory of each pipeline rank, bytes it sends, FLOPs, a predicted step time, the largest micro
batch that fits; with plan.search=true the layouts that fit, ranked. Plain Python: neither torch
nor megatron is imported. plan.md says what the numbers are worth.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, NamedTuple

from parallel.gpus import Gpu, gpu_named
from parallel.job import Job, Share, shares
from parallel.layout import Layout, validate_layout
from parallel.memory import Memory, memory
from parallel.recompute import depth_again, layers_of, times_again
from parallel.roofline import StepTime, step_time
from parallel.traffic import Traffic, traffic
from recipes.compose import run_cli
from recipes.errors import ConfigError
from recipes.rules import at_least, fail, listed
from recipes.schema import ParallelConfig, Recipe
from recipes.stages import mix_shares
from recipes.tables import table
from recipes.validate import lengths_apart, validate_run

QUANTISED = {"mxfp8": 2 * (1 + 1 / 32), "nvfp4": 2 * (1 / 2 + 1 / 16)}
"""Bytes of an element of a weight as Transformer Engine keeps it: by rows and by columns, a scale
for every 32 or 16 elements."""


class Product(NamedTuple):
    """A part of a layer's arithmetic."""

    module: str
    """Megatron's name inside the layer."""
    flops: float
    """Forward, of a token; backward takes twice as many."""
    forward: str
    backward: str
    """Formats: bf16, mxfp8, nvfp4, or other where it is no product with a weight."""
    quantised: float = 0.0
    """Bytes a rank keeps of its weight in a block format."""


@dataclass(frozen=True)
class Work:
    """The arithmetic of a model by place."""

    layers: tuple[tuple[Product, ...], ...]
    """Of each decoder layer."""
    mtp: tuple[tuple[Product, ...], ...]
    """Of each layer of a multi-token-prediction block, over all its depths."""
    joined: tuple[Product, ...]
    """Of eh_proj, over all depths."""
    head: float
    """Forward FLOPs of a token in the output head, once."""


@dataclass(frozen=True)
class Plan:
    """One layout and what it needs."""

    recipe: Recipe
    layout: Layout
    ranks: list[tuple[Share, Memory, list[Traffic], StepTime]]
    """Of each pipeline rank."""

    @property
    def needed(self) -> float:
        """Bytes of the rank that needs most."""
        return max(m.total for _, m, _, _ in self.ranks)

    @property
    def seconds(self) -> float:
        """Of a step: the slowest rank's."""
        return max(t.total for *_, t in self.ranks)

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        stage = self.recipe.stage
        tokens = stage.global_batch_size * stage.sequence_length
        return tokens / self.seconds / self.layout.world_size


def main(recipe: Recipe) -> int:
    """Print the plan; a recipe that is not valid raises ConfigError before it."""
    from model.pattern import parse_pattern

    at_least("plan.ranks", recipe.plan.ranks, 1, "the fewest the layout needs")
    at_least("plan.show", recipe.plan.show, 1)
    gpu = gpu_named(recipe.cluster.gpu)
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    from model.validate import validate_model, validate_recipe

    if recipe.plan.search:
        validate_run(recipe)
        validate_model(recipe.model)
        print(_search(recipe, pattern, work_of(recipe), gpu))
        return 0
    ranks = validate_recipe(recipe, recipe.plan.ranks, "cuda").world_size
    plans = []
    for own in lengths_apart(recipe).values():
        work = work_of(own)
        layout = validate_recipe(own, ranks, "cuda")
        plans.append(make_plan(own, layout, pattern, work, gpu))
        print(describe(plans[-1], pattern, work, gpu), end="\n\n")
    if recipe.stage.mix:
        print(_mixed(mix_shares(recipe.stage), plans))
    return 0


def work_of(recipe: Recipe) -> Work:
    """The arithmetic of the recipe's model, in the formats its precision policy starts with."""
    from model.counts import layer_flops
    from model.gemms import policy_of
    from model.pattern import parse_pattern
    from precision.policy import block_format

    model, pattern = recipe.model, parse_pattern(recipe.model.hybrid_layer_pattern)
    decisions = policy_of(recipe).start
    experts = (model.num_moe_experts or 1) // recipe.parallel.expert_model_parallel_size

    def products(prefix: str) -> Iterator[Product]:
        for gemm, name in ((d.gemm, d.format) for d in decisions if d.gemm.name.startswith(prefix)):
            copies = experts if gemm.module.startswith("mlp.experts") else 1
            yield Product(
                gemm.module,
                gemm.flops,
                "bf16" if name.endswith("_backward") else name,
                block_format(name),
                copies * gemm.rows * gemm.columns * QUANTISED.get(block_format(name), 0.0),
            )

    def layer(symbol: str, prefix: str, times: int) -> tuple[Product, ...]:
        known = tuple(products(prefix))
        rest = (
            Product(module, times * flops, "other", "other")
            for module, flops in layer_flops(model, symbol, recipe.stage.sequence_length).items()
            if not any(product.module.startswith(module) for product in known)
        )
        return (*known, *rest)

    blocks = min(1, pattern.mtp_depths) if model.mtp_use_repeated_layer else pattern.mtp_depths
    mtp = [
        layer(symbol, f"mtp.layers.{k}.mtp_model_layer.layers.{j}.", pattern.mtp_depths // blocks)
        for k in range(blocks)
        for j, symbol in enumerate(pattern.mtp)
    ]
    return Work(
        layers=tuple(layer(s, f"decoder.layers.{i}.", 1) for i, s in enumerate(pattern.main)),
        mtp=tuple(mtp),
        joined=tuple(x for k in range(blocks) for x in products(f"mtp.layers.{k}.eh_proj")),
        head=2.0 * model.hidden_size * model.vocab_size,
    )


def make_plan(recipe: Recipe, layout: Layout, pattern: Any, work: Work, gpu: Gpu) -> Plan:
    """What a valid layout needs on a GPU.

    Args:
        pattern: the parsed `model.hybrid_layer_pattern` (model.pattern.Pattern).
    """
    job = Job(recipe.model, recipe.parallel, recipe.precision, recipe.stage, layout, on_gpu=True)
    ranks = []
    for share in shares(pattern.stages, pattern.mtp, pattern.mtp_depths, layout.pp):
        sent = traffic(job, share, gpu.domain)
        seconds = step_time(job, share, gpu, flops(job, share, work, pattern), sent)
        quantised = sum(x.quantised for x, _ in _products(job, share, work, pattern))
        ranks.append((share, memory(job, share, quantised), sent, seconds))
    return Plan(recipe, layout, ranks)


def _products(job: Job, share: Share, work: Work, pattern: Any) -> Iterator[tuple[Product, int]]:
    """The products of a share's layers, and how often each is computed again."""
    parallel = job.parallel
    cut = [layer for piece in share.pieces for layer in layers_of(parallel, piece)]
    own = [work.layers[i] for i in _indices(share, pattern, job.layout.pp)]
    placed = list(zip(cut, own, strict=True))
    if share.mtp:
        block = layers_of(parallel, share.mtp, mtp=True)
        placed += zip(block * (len(work.mtp) // len(block)), work.mtp, strict=True)
        yield from ((product, depth_again(parallel)) for product in work.joined)
    for layer, products in placed:
        yield from ((x, times_again(parallel, layer, x.module)) for x in products)


def flops(job: Job, share: Share, work: Work, pattern: Any) -> dict[str, float]:
    """FLOPs a token of a share by format, what is computed again included."""
    total: defaultdict[str, float] = defaultdict(float)
    for product, again in _products(job, share, work, pattern):
        total[product.forward] += product.flops * (1 + again)
        total[product.backward] += product.flops * 2
    heads = share.last + share.mtp_depths
    total["bf16"] += work.head * heads * (4 if job.parallel.cross_entropy_loss_chunk else 3)
    return total


def _indices(share: Share, pattern: Any, pp: int) -> Iterator[int]:
    """Global numbers of a share's layers."""
    cut = shares(pattern.stages, "", 0, pp)
    pieces = sorted(
        (v * pp + other.rank, piece) for other in cut for v, piece in enumerate(other.pieces)
    )
    start = 0
    for position, piece in pieces:
        if position % pp == share.rank:
            yield from range(start, start + len(piece))
        start += len(piece)


def describe(plan: Plan, pattern: Any, work: Work, gpu: Gpu) -> str:
    """The whole plan as text."""
    from model.counts import flops_per_token, published_flops_per_token

    recipe, layout = plan.recipe, plan.layout
    model, stage = recipe.model, recipe.stage
    true = flops_per_token(model, stage.sequence_length)
    published = published_flops_per_token(model, stage.sequence_length)
    model_flops = plan.tokens_per_second * true
    fits = "fits" if plan.needed <= gpu.memory else "DOES NOT FIT"
    largest = _largest_micro_batch(plan, pattern, work, gpu)
    facts = [
        ("GPU", f"{recipe.cluster.gpu}, {gpu.memory / 1e9:.0f} GB: {fits}"),
        ("layout", str(layout)),
        ("largest micro batch that fits", str(largest or "none")),
        ("GFLOP per token, of the model", f"{true / 1e9:,.1f}"),
        ("GFLOP per token, as throughput tables count", f"{published / 1e9:,.1f}"),
        ("predicted seconds per step", f"{plan.seconds:,.2f}"),
        ("predicted tokens/s per GPU", f"{plan.tokens_per_second:,.0f}"),
        ("predicted TFLOP/s per GPU, of the model", f"{model_flops / 1e12:,.0f}"),
    ]
    width = max(len(name) for name, _ in facts)
    lines = "\n".join(f"{name.ljust(width)}  {text}" for name, text in facts)
    return "\n\n".join(
        [
            f"{model.name}, sequences of {stage.sequence_length}, micro batch "
            f"{stage.micro_batch_size}, {stage.global_batch_size} sequences a step",
            lines,
            _memory_table(plan),
            _traffic_table(plan),
            _time_table(plan),
        ]
    )


def _mixed(shares: Sequence[Fraction], plans: Sequence[Plan]) -> str:
    """What the steps of all lengths come to."""
    seconds = sum(float(share) * plan.seconds for share, plan in zip(shares, plans, strict=True))
    tokens = sum(
        float(share) * plan.tokens_per_second * plan.seconds
        for share, plan in zip(shares, plans, strict=True)
    )
    mix = " + ".join(
        f"{float(share):.4g} of {plan.recipe.stage.sequence_length}"
        for share, plan in zip(shares, plans, strict=True)
    )
    return f"steps of {mix}: {seconds:,.2f} s on average, {tokens / seconds:,.0f} tokens/s per GPU"


def _memory_table(plan: Plan) -> str:
    names = [field.name for field in fields(Memory)]
    rows: list[tuple[str, ...]] = [("GB a rank", *names, "total")]
    for share, needs, _, _ in plan.ranks:
        values = [getattr(needs, name) for name in names] + [needs.total]
        rows.append((f"pipeline rank {share.rank}", *(f"{v / 1e9:,.2f}" for v in values)))
    return table(rows, left=(0,))


def _traffic_table(plan: Plan) -> str:
    purposes = list(dict.fromkeys(x.purpose for _, _, sent, _ in plan.ranks for x in sent))
    rows: list[tuple[str, ...]] = [("GB a rank sends in a step", *purposes)]
    for share, _, sent, _ in plan.ranks:
        of = {p: sum(x.bytes for x in sent if x.purpose == p) for p in purposes}
        rows.append((f"pipeline rank {share.rank}", *(f"{of[p] / 1e9:,.3f}" for p in purposes)))
    return table(rows, left=(0,))


def _time_table(plan: Plan) -> str:
    names = ("compute", "memory", "communication", "bubble")
    rows: list[tuple[str, ...]] = [("seconds of a step", *names, "total")]
    for share, _, _, seconds in plan.ranks:
        values = [getattr(seconds, name) for name in names] + [seconds.total]
        rows.append((f"pipeline rank {share.rank}", *(f"{v:,.3f}" for v in values)))
    return table(rows, left=(0,))


def _largest_micro_batch(plan: Plan, pattern: Any, work: Work, gpu: Gpu) -> int:
    """Of those that divide the batch; 0: none fits."""
    recipe, layout = plan.recipe, plan.layout
    sequences = recipe.stage.global_batch_size // layout.dp
    # Documents are packed one sequence a micro batch.
    most = 1 if recipe.data.inter_document_masking else min(sequences, 64)
    found = 0
    for size in (s for s in range(1, most + 1) if sequences % s == 0):
        if layout.virtual_stages > 1 and sequences // size % layout.pp:
            continue  # the interleaved schedule has no such number of micro batches
        larger = replace(recipe, stage=replace(recipe.stage, micro_batch_size=size))
        steps = replace(layout, num_microbatches=sequences // size)
        if make_plan(larger, steps, pattern, work, gpu).needed > gpu.memory:
            break
        found = size
    return found


RECOMPUTED: tuple[tuple[str | None, list[str] | None], ...] = (
    (None, None),
    ("selective", ["moe_act", "layernorm"]),
    ("selective", ["moe", "layernorm"]),
)
"""What the search tries to recompute."""


def _candidates(recipe: Recipe, ranks: int, num_layers: int) -> Iterator[ParallelConfig]:
    """Layouts worth trying; most are not valid. Experts are not split further."""
    model = recipe.model
    powers = [1 << i for i in range(10)]
    long = recipe.stage.sequence_length >= 32_768
    for tp in (1, 2, 4, 8):
        for pp in (p for p in range(1, 17) if num_layers % p == 0):
            for cp in powers[:7] if long else (1,):
                for ep in (e for e in powers if (model.num_moe_experts or 1) % e == 0):
                    if ranks % (tp * pp * cp) or ranks % (ep * pp):
                        continue
                    for granularity, modules in RECOMPUTED:
                        yield replace(
                            recipe.parallel,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            context_parallel_size=cp,
                            expert_model_parallel_size=ep,
                            expert_tensor_parallel_size=1,
                            data_parallel_size=None,
                            sequence_parallel=None,
                            recompute_granularity=granularity,
                            recompute_modules=modules,
                            recompute_method=None,
                            recompute_num_layers=None,
                        )


def _some_divide(recipe: Recipe, ranks: int, num_layers: int) -> bool:
    """Whether some layout gives every data-parallel rank the same number of sequences."""
    for parallel in _candidates(recipe, ranks, num_layers):
        model_ranks = (
            parallel.tensor_model_parallel_size
            * parallel.pipeline_model_parallel_size
            * parallel.context_parallel_size
        )
        if recipe.stage.global_batch_size % (ranks // model_ranks) == 0:
            return True
    return False


def search(recipe: Recipe, ranks: int, pattern: Any, work: Work, gpu: Gpu) -> list[Plan]:
    """Every layout of so many GPUs that is valid and fits, best first. Stages are cut evenly."""
    whole = replace(pattern, stages=(pattern.main,))
    uncut = recipe.model.hybrid_layer_pattern.replace("|", "")
    recipe = replace(recipe, model=replace(recipe.model, hybrid_layer_pattern=uncut))
    found = []
    for parallel in _candidates(recipe, ranks, len(pattern.main)):
        for size in (1, 2, 4):
            stage = replace(recipe.stage, micro_batch_size=size)
            try:
                layout = validate_layout(
                    parallel,
                    recipe.model,
                    stage,
                    ranks,
                    symbols=pattern.main + pattern.mtp,
                    num_layers=len(pattern.main),
                    num_stages=1,
                    mtp_depths=pattern.mtp_depths,
                )
            except ConfigError:
                continue
            tried = replace(recipe, parallel=parallel, stage=stage)
            plan = make_plan(tried, layout, whole, work, gpu)
            if plan.needed <= gpu.memory and _valid(tried, ranks):
                found.append(plan)
    return sorted(found, key=lambda plan: -plan.tokens_per_second)


def _valid(recipe: Recipe, ranks: int) -> bool:
    """Whether a run would start. Slower than the rules of the layout alone."""
    from model.validate import validate_recipe

    try:
        validate_recipe(recipe, ranks, "cuda")
    except ConfigError:
        return False
    return True


def _search(recipe: Recipe, pattern: Any, work: Work, gpu: Gpu) -> str:
    ranks = recipe.plan.ranks
    if ranks is None:
        raise ConfigError("plan.search=true needs plan.ranks: the number of GPUs to lay out")
    found = search(recipe, ranks, pattern, work, gpu)
    batch = recipe.stage.global_batch_size
    if not found and not _some_divide(recipe, ranks, len(pattern.main)):
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        near = [max(n for n in divisors if n < ranks)]
        near += [n for n in divisors if n > ranks][:1]
        fail(
            "plan.ranks",
            ranks,
            f"cannot be laid out: no number of data-parallel ranks divides "
            f"stage.global_batch_size={batch}",
            f"use {listed(near)}, or another batch",
        )
    if not found:
        raise ConfigError(
            f"plan.ranks={ranks}: no layout of {recipe.model.name} is valid and fits "
            f"{recipe.cluster.gpu}; use more GPUs, a larger one or shorter sequences"
        )
    rows: list[tuple[str, ...]] = [
        ("tokens/s per GPU", "GB", "tp", "pp", "cp", "ep", "dp", "micro batch", "recomputed")
    ]
    for plan in found[: recipe.plan.show]:
        layout = plan.layout
        rows.append(
            (
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.needed / 1e9:.1f}",
                *(str(getattr(layout, n)) for n in ("tp", "pp", "cp", "ep", "dp")),
                str(plan.recipe.stage.micro_batch_size),
                ", ".join(_names(plan.recipe.parallel)) or "-",
            )
        )
    title = (
        f"{recipe.model.name} on {ranks} {recipe.cluster.gpu}, sequences of "
        f"{recipe.stage.sequence_length}: {len(found)} layouts fit"
    )
    return title + "\n" + table(rows, left=(8,))


def _names(parallel: ParallelConfig) -> Sequence[str]:
    return parallel.recompute_modules or ()


if __name__ == "__main__":
    run_cli(main, "parallel.plan")
