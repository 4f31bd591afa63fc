"""The counter of collectives: every convention on real ranks, and LatentMoE's saving exactly."""

import zlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed

DISPATCH, COMBINE, ROUTING = "expert_dispatch", "expert_combine", "expert_routing"


def _every_collective(rank: int, world_size: int) -> dict[str, tuple[int, int, int]]:
    """Collective -> (bytes sent, bytes given, calls) of this rank."""
    from parallel import wire

    counter = wire.install()
    assert wire.install() is counter
    x = torch.zeros(8)  # 32 bytes
    shards = [torch.zeros(8) for _ in range(world_size)]
    found: dict[str, tuple[int, int, int]] = {}

    def note(name: str) -> None:
        counts = counter.take()
        assert all(k.purpose == "other" and k.group == "rest" for k in counts) or name == "p2p"
        assert not any(k.backward for k in counts)
        total = [sum(getattr(c, f) for c in counts.values()) for f in ("bytes", "operand_bytes")]
        assert all(c.seconds > 0 for c in counts.values())
        found[name] = (total[0], total[1], sum(c.calls for c in counts.values()))

    counter.take()
    dist.all_reduce(x)
    note("all_reduce")
    dist.all_gather(shards, x)
    note("all_gather")
    dist.all_gather_into_tensor(torch.zeros(8 * world_size), x)
    note("all_gather_into_tensor")
    dist.reduce_scatter_tensor(torch.zeros(2), x)
    note("reduce_scatter_tensor")
    dist.all_to_all_single(torch.zeros(8), x)
    note("all_to_all_single")
    # Rank r sends r rows to every rank, itself included, and gets s rows from rank s.
    rows = torch.zeros(rank * world_size, 2)
    received = torch.zeros(sum(range(world_size)), 2)
    dist.all_to_all_single(received, rows, list(range(world_size)), [rank] * world_size)
    note("uneven all_to_all_single")
    dist.broadcast(x, src=1)
    note("broadcast")
    dist.reduce(x, dst=1)
    note("reduce")
    handle = dist.all_reduce(x, async_op=True)
    assert handle is not None
    handle.wait()
    assert handle.is_completed()
    note("async all_reduce")
    to, source = (rank + 1) % world_size, (rank - 1) % world_size
    received = torch.zeros(8)
    operations = [dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, received, source)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    note("p2p")
    with dist.distributed_c10d._coalescing_manager():
        dist.all_reduce(x)
        dist.all_reduce(x)
    note("coalesced")
    objects: list[Any] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    assert counter.take(), "built of counted collectives"
    alone: Any = [dist.new_group([r]) for r in range(world_size)][rank]
    counter.take()
    dist.all_reduce(x, group=alone)
    note("one rank")
    return found


def test_what_a_rank_sends_by_collective() -> None:
    for rank, found in enumerate(run_distributed(_every_collective, 4)):
        root = rank == 1
        assert found == {
            "all_reduce": (2 * 3 * 32 // 4, 32, 1),
            "all_gather": (3 * 32, 32, 1),
            "all_gather_into_tensor": (3 * 32, 32, 1),
            "reduce_scatter_tensor": (3 * 8, 32, 1),
            "all_to_all_single": (3 * 8, 32, 1),
            "uneven all_to_all_single": (3 * rank * 8, 4 * rank * 8, 1),
            "broadcast": (3 * 32 if root else 0, 32, 1),
            "reduce": (0 if root else 32, 32, 1),
            "async all_reduce": (48, 32, 1),
            "p2p": (32, 32, 1),
            "coalesced": (96, 64, 2),
            "one rank": (0, 0, 0),
        }


def _moe(
    rank: int, world_size: int, parallel: list[str], models: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """What all ranks send in one forward and backward pass of one MoE layer under each model.
    Weights and tokens depend on their name alone, so equal routers see equal inputs."""
    from megatron.core import parallel_state

    from model.hybrid import build_model, transformer_config
    from parallel import wire
    from parallel.groups import initialize_groups
    from recipes.compose import load_recipe

    counter = wire.install()
    sent = {}
    for name, overrides in models.items():
        common = ["experiment=tiny", "model.hybrid_layer_pattern=E", "run.dir=unused"]
        recipe = load_recipe([*common, "model.vocab_size=64", *parallel, *overrides])
        initialize_groups(recipe.parallel, seed=1)
        config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
        model = build_model(recipe, config).bfloat16()
        for key, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        generator = torch.Generator().manual_seed(
            rank // recipe.parallel.tensor_model_parallel_size
        )
        tokens = torch.randint(64, (2, 16), generator=generator)
        counter.take()
        model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens).sum().backward()
        sent[name], _ = wire.summary(counter.take())
        parallel_state.destroy_model_parallel()
    return sent


@pytest.mark.parametrize("ranks", [2, 4])
def test_latent_moe_on_the_wire(ranks: int) -> None:
    """d = 128, l = 32. At equal top-k dispatch and combine shrink to exactly l / d, forward and
    backward, and what routing sends stays. With d / l times the experts and the top-k, as
    LatentMoE spends its saving, K' l = K d."""
    shapes = {"full": ("null", 16, 4), "latent": (32, 16, 4), "more experts": (32, 64, 16)}
    models = {
        name: [
            f"model.moe_latent_size={latent}",
            f"model.num_moe_experts={experts}",
            f"model.moe_router_topk={topk}",
        ]
        for name, (latent, experts, topk) in shapes.items()
    }
    parallel = [f"parallel.expert_model_parallel_size={ranks}"]
    sent = run_distributed(_moe, ranks, parallel, models)[0]
    for purpose in (DISPATCH, COMBINE):
        full, latent, more = (sent[name][purpose] for name in shapes)
        for amount in ("bytes", "backward_bytes", "operand_bytes"):
            assert latent[amount] * 128 == full[amount] * 32, (purpose, amount)
        assert 0 < full["backward_bytes"] * 2 == full["bytes"]
        assert full["groups"] == {"ep": {name: full[name] for name in ("bytes", "calls")}}
        # 32 tokens of every rank, top-4, d = 128, BF16, forward and backward.
        assert full["operand_bytes"] == ranks * 32 * 4 * 128 * 2 * 2
        assert more["operand_bytes"] == ranks * 32 * 16 * 32 * 2 * 2 == full["operand_bytes"]
        # Each router keeps its own share of that on the rank.
        assert more["bytes"] == pytest.approx(full["bytes"], rel=0.2)
    assert sent["latent"][ROUTING] == sent["full"][ROUTING]


def test_purposes_of_other_layouts() -> None:
    """Tensor parallelism, experts that are split too, the other dispatcher, recomputation."""
    split = ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
    models = {
        "alltoall": [],
        "recomputed": [
            "parallel.recompute_granularity=selective",
            "parallel.recompute_modules=[moe]",
        ],
        "allgather": [
            "parallel.moe_token_dispatcher_type=allgather",
            "parallel.expert_tensor_parallel_size=2",
        ],
    }
    sent = run_distributed(_moe, 4, split, models)[0]
    for name in models:
        # other: the load-balancing loss counts tokens over the tensor-parallel ranks.
        assert set(sent[name]) == {DISPATCH, COMBINE, ROUTING, "tensor", "other"}
        assert sent[name]["other"]["groups"].keys() == {"tp_cp"}
    # A recomputed MoE layer dispatches and combines once more, in the backward pass.
    for purpose in (DISPATCH, COMBINE):
        plain, again = sent["alltoall"][purpose], sent["recomputed"][purpose]
        assert set(plain["groups"]) == {"ep"}
        forward = plain["bytes"] - plain["backward_bytes"]
        assert again["bytes"] - again["backward_bytes"] == forward
        assert again["backward_bytes"] == plain["backward_bytes"] + forward
    # The 16 tokens of each rank, l = 64, go to the 3 others in BF16; what comes back is reduced
    # in FP32, and so is the gradient of either.
    gathered, expert = 4 * 3 * 16 * 64, sent["allgather"]
    assert set(expert[DISPATCH]["groups"]) == {"tp_ep"}
    assert expert[DISPATCH]["bytes"] == gathered * (2 + 2)
    assert expert[COMBINE]["bytes"] == gathered * (4 + 4)
