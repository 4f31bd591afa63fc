"""What `parallel.plan` predicts of memory and traffic beside what tensors and ranks do here.

    python -m tests.benchmarks.plan [LAYOUT]...

Each layout runs three optimizer steps on real gloo ranks with random tokens. Measured is
`allocated`, the most bytes of tensors that were alive at once in a step, as PyTorch's own
allocator events give them (the host's counterpart of torch.cuda.max_memory_allocated): the lower
of the second and the third step, because gloo's threads may let go of a tensor a moment late.
`resident` is the growth of the process's resident set over the whole: it holds libraries that are
loaded late and memory that is kept but not in use.

`sent` is what the counter of collectives (parallel/wire.md) saw in the last step, by purpose.

Prints one JSON object a rank.
"""

import ctypes
import gc
import json
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STEPS = 3
"""Optimizer steps; the first makes the optimizer's state."""

LAYOUTS = {
    "tiny": ["experiment=tiny"],
    "tiny, recomputed": [
        "experiment=tiny",
        "parallel.recompute_granularity=selective",
        "parallel.recompute_modules=[moe,layernorm]",
    ],
    "tiny, fp32": ["experiment=tiny", "precision=fp32"],
    "tiny, ep2": [
        "experiment=tiny",
        "stage.micro_batch_size=4",
        "parallel.expert_model_parallel_size=2",
    ],
    "tiny, ep2 all-gather": [
        "experiment=tiny",
        "stage.micro_batch_size=4",
        "parallel.expert_model_parallel_size=2",
        "parallel.moe_token_dispatcher_type=allgather",
    ],
    "tiny, tp2": ["experiment=tiny", "parallel.tensor_model_parallel_size=2"],
    "tiny, pp2": [
        "experiment=tiny",
        "stage.micro_batch_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "model.hybrid_layer_pattern=MEMEM|*EME/*E/*E",
    ],
    "tiny, pp2 in 4 pieces": [
        "experiment=tiny",
        "stage.micro_batch_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "model.hybrid_layer_pattern='ME|MEM|*E|ME/*E/*E'",
    ],
    "tiny, cp2": ["experiment=tiny", "parallel.context_parallel_size=2"],
    "tiny, cp2 gathered": [
        "experiment=tiny",
        "parallel.context_parallel_size=2",
        "parallel.cp_comm_type=all_gather",
    ],
    "tiny, cp2 by state": [
        "experiment=tiny",
        "parallel.context_parallel_size=2",
        "parallel.mamba_context=state",
    ],
    "tiny, 8k": [
        "experiment=tiny",
        "parallel=tiny_long",
        "stage.sequence_length=8192",
        "stage.micro_batch_size=1",
        "stage.global_batch_size=1",
    ],
    "tiny, loss in chunks": ["experiment=tiny", "parallel.cross_entropy_loss_chunk=128"],
    "tiny, all recomputed": [
        "experiment=tiny",
        "parallel.recompute_granularity=full",
        "parallel.recompute_method=uniform",
        "parallel.recompute_num_layers=1",
    ],
    "tiny, 4 layers recomputed": [
        "experiment=tiny",
        "parallel.recompute_granularity=full",
        "parallel.recompute_method=block",
        "parallel.recompute_num_layers=4",
    ],
    "tiny, ep2 all recomputed": [
        "experiment=tiny",
        "stage.micro_batch_size=4",
        "parallel.expert_model_parallel_size=2",
        "parallel.recompute_granularity=full",
        "parallel.recompute_method=uniform",
        "parallel.recompute_num_layers=1",
    ],
    "small": ["experiment=small", "stage.sequence_length=512", "stage.micro_batch_size=2"],
    "small, ep2": [
        "experiment=small",
        "stage.sequence_length=512",
        "stage.micro_batch_size=2",
        "parallel.expert_model_parallel_size=2",
    ],
    "small, dp2": [
        "experiment=small",
        "stage.sequence_length=512",
        "stage.micro_batch_size=2",
        "parallel.data_parallel_size=2",
    ],
}
"""Name -> overrides."""


def measure(rank: int, world_size: int, overrides: list[str]) -> dict[str, Any]:
    """Peak bytes of this rank (of live tensors, of the resident set), its parameters, and the
    bytes it sent in the last step by purpose."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    from model.validate import validate_recipe
    from parallel import wire
    from parallel.groups import initialize_groups
    from recipes.compose import load_recipe
    from train.build import build_state
    from train.step import forward_step

    recipe = load_recipe([*overrides, "run.dir=unused"])
    layout = validate_recipe(recipe, world_size)
    initialize_groups(recipe.parallel, 1, layout.virtual_stages)
    stage = recipe.stage
    shape = stage.micro_batch_size, stage.sequence_length
    tokens = torch.randint(recipe.model.vocab_size, shape)
    whole = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(shape[1]).expand(shape),
        "loss_mask": torch.ones(shape),
    }
    ranks = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=ranks)
    before, counter = _resident(), wire.install()
    _count_every_free()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        state, _ = build_state(recipe, layout)
        chunks = state.chunks
        for _ in range(STEPS):
            counter.take()
            gc.collect()  # what Megatron leaves in cycles would be freed at any time
            for chunk in chunks:
                chunk.zero_grad_buffer()
            state.optimizer.zero_grad()
            with torch.profiler.record_function("step"):
                get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=[_forever(batch) for _ in chunks],
                    model=chunks,
                    num_microbatches=layout.num_microbatches,
                    seq_length=shape[1],
                    micro_batch_size=shape[0],
                    forward_only=False,
                )
                state.optimizer.step()
    resident = _resident() - before
    sent: Counter[str] = Counter()
    for kind, count in counter.take().items():
        sent[kind.purpose] += count.bytes
    elements = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return {
        "allocated": min(_peaks(profile)[1:]),
        "resident": resident,
        "parameters": elements,
        "sent": sent,
    }


def predict(overrides: list[str]) -> list[dict[str, Any]]:
    """The same of each rank, as the planner sees it without a GPU."""
    from model.pattern import parse_pattern
    from model.validate import validate_recipe
    from parallel.job import Job, shares
    from parallel.memory import memory, parameters
    from parallel.traffic import traffic
    from recipes.compose import load_recipe

    recipe = load_recipe([*overrides, "run.dir=unused"])
    layout = validate_recipe(recipe)
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    job = Job(recipe.model, recipe.parallel, recipe.precision, recipe.stage, layout, on_gpu=False)
    found = []
    for share in shares(pattern.stages, pattern.mtp, pattern.mtp_depths, layout.pp):
        of_rank = {
            "allocated": memory(job, share).total,
            "parameters": sum(parameters(job, share)),
            "sent": _by_purpose(traffic(job, share)),
        }
        found += [of_rank] * (layout.world_size // layout.pp)
    return found


def _count_every_free() -> None:
    """Make PyTorch count live bytes over all threads: gloo's own threads free what they held, and
    a profiler sees only the thread it was started in."""
    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _peaks(profile: Any) -> list[int]:
    """The most bytes live at once in each step."""
    events, steps = list(profile.profiler.kineto_results.experimental_event_tree()), []
    allocations: list[tuple[int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "step":
            steps.append((event.start_time_ns, event.end_time_ns))
        elif event.name == "[memory]":
            allocations.append((event.start_time_ns, event.extra_fields.total_allocated))
    return [
        max(live for time, live in allocations if start <= time <= end)
        for start, end in sorted(steps)
    ]


def _by_purpose(sent: Any) -> dict[str, float]:
    found: Counter[str] = Counter()
    for x in sent:
        found[x.purpose] += x.bytes
    return dict(found)


def _forever(batch: Any) -> Any:
    while True:
        yield batch


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(names: list[str]) -> None:
    """Run the layouts and print what was predicted and measured."""
    from tests.distributed.harness import run_distributed

    for name in names or LAYOUTS:
        predicted = predict(LAYOUTS[name])
        found = run_distributed(measure, len(predicted), LAYOUTS[name], timeout=600)
        for rank, (here, there) in enumerate(zip(found, predicted, strict=True)):
            row: dict[str, Any] = {"layout": name, "rank": rank}
            row["predicted_mib"] = round(there["allocated"] / 2**20, 1)
            row["allocated_mib"] = round(here["allocated"] / 2**20, 1)
            row["resident_mib"] = round(here["resident"] / 2**20, 1)
            row["ratio"] = round(there["allocated"] / here["allocated"], 3)
            row["sent_predicted"] = {k: round(v) for k, v in there["sent"].items()}
            row["sent"] = dict(here["sent"])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
