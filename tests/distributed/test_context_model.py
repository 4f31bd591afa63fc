"""A whole hybrid model, multi-token prediction included, over context-parallel ranks and over
packed documents, in FP32: losses of every token and gradients of every parameter."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.harness import run_distributed

LENGTH = 48
DOCUMENTS = [0, 5, 6, 21, 24, 48]
EQUAL = [0, 16, 32, 48]
MODEL = (
    "experiment=tiny",
    "model.hybrid_layer_pattern=ME*E/*E/*E",
    "model.hidden_size=32",
    "model.vocab_size=64",
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.mamba_num_heads=8",
    "precision.params_dtype=fp32",
    "stage.micro_batch_size=1",
    f"stage.sequence_length={LENGTH}",
)
PACKED = "data.inter_document_masking=true"
STATE = "parallel.mamba_context=state"
SELECTIVE = (
    "parallel.recompute_granularity=selective",
    "parallel.recompute_modules=[core_attn,layernorm,moe]",
)
FULL = (
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
)
TENSOR = "parallel.tensor_model_parallel_size=2"
CHUNKS = "parallel.cross_entropy_loss_chunk=7"


def batch_of(documents: list[int]) -> dict[str, Tensor]:
    """What the data set gives for a pack; the last token of a document predicts nothing."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (1, LENGTH + 1), generator=generator)
    mask = torch.ones(1, LENGTH)
    mask[:, [end - 1 for end in documents[1:]]] = 0
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(LENGTH).unsqueeze(0),
    }


def build(overrides: tuple[str, ...]) -> Any:
    from model.hybrid import build_model, transformer_config
    from model.validate import validate_recipe
    from parallel.groups import initialize_groups
    from recipes.compose import load_recipe

    recipe = load_recipe([*MODEL, *overrides])
    validate_recipe(recipe, dist.get_world_size(), "host")
    initialize_groups(recipe.parallel, 1)
    return build_model(recipe, transformer_config(recipe.model, recipe.precision, recipe.parallel))


def step(
    model: Any, batch: dict[str, Tensor], documents: list[int] | None
) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Losses of this rank's tokens, of MTP, and gradients summed over ranks."""
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.core.utils import get_batch_on_this_cp_rank

    from train.batches import packed_documents

    ranks = parallel_state.get_context_parallel_group()
    if documents is not None:
        ends = torch.tensor([documents], dtype=torch.int32)
        batch = batch | {"cu_seqlens": ends, "max_seqlen": ends.diff().max().view(1)}
    batch = get_batch_on_this_cp_rank(
        dict(batch), is_hybrid_cp=False, cp_group=ranks, use_per_sequence_balancing=True
    )
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_documents(batch),
    )
    masked = losses * batch["loss_mask"]
    masked.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    mtp = MTPLossLoggingHelper.tracker["loss_values"].clone()
    for tensor in (mtp, *gradients.values()):
        dist.all_reduce(tensor, group=ranks)
    MTPLossLoggingHelper.tracker.clear()
    model.zero_grad()
    whole = torch.zeros(1, LENGTH)
    chunks = list(whole.chunk(2 * ranks.size(), 1))
    for chunk, own in zip(
        (chunks[ranks.rank()], chunks[-1 - ranks.rank()]), masked.detach().chunk(2, 1), strict=True
    ):
        chunk.copy_(own)
    dist.all_reduce(whole, group=ranks)
    return whole, (mtp / ranks.size()).tolist(), gradients


def whole_step(
    rank: int, ranks: int, overrides: tuple[str, ...], documents: list[int]
) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    cp = f"parallel.context_parallel_size={ranks // 2 if TENSOR in overrides else ranks}"
    packed = documents if PACKED in overrides else None
    return step(build((*overrides, cp)), batch_of(documents), packed)


def alone(
    rank: int, ranks: int, overrides: tuple[str, ...], documents: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron's own model on each document alone: losses one after the other, gradients added."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    model = build(overrides)
    batch = batch_of(documents)
    losses = []
    for start, end in zip(documents, documents[1:], strict=False):
        part = {name: t[:, start:end].contiguous() for name, t in batch.items()}
        out = model(
            part["tokens"],
            part["position_ids"],
            None,
            labels=part["labels"],
            loss_mask=part["loss_mask"],
        )
        losses.append(out * part["loss_mask"])
        losses[-1].sum().backward()
    MTPLossLoggingHelper.tracker.clear()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat([t.detach() for t in losses], 1), gradients


def assert_same(found: Any, wanted: Any) -> None:
    """Losses equal; gradients of each parameter equal as vectors: sums in another order."""
    *losses, gradients = found
    *wanted_losses, wanted_gradients = wanted
    torch.testing.assert_close(losses, wanted_losses, rtol=2e-5, atol=2e-6)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()
        assert error < 2e-5, f"{name}: {error}"


@pytest.fixture(scope="module")
def whole() -> Any:
    """One rank, Megatron's own model."""
    return run_distributed(whole_step, 1, (), [0, LENGTH])[0]


@pytest.fixture(scope="module")
def packed() -> Any:
    """One rank, packed documents."""
    return run_distributed(whole_step, 1, (PACKED,), DOCUMENTS)[0]


@pytest.mark.parametrize("overrides", [(), (STATE, "parallel.cp_comm_type=all_gather", CHUNKS)])
def test_two_ranks_equal_one(whole: Any, overrides: tuple[str, ...]) -> None:
    for found in run_distributed(whole_step, 2, overrides, [0, LENGTH]):
        assert_same(found, whole)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((PACKED, "parallel.cp_comm_type=a2a"), marks=pytest.mark.slow),
        (PACKED, STATE, *SELECTIVE),
    ],
)
def test_packed_documents_over_two_ranks(packed: Any, overrides: tuple[str, ...]) -> None:
    for found in run_distributed(whole_step, 2, overrides, DOCUMENTS):
        assert_same(found, packed)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(PACKED, *FULL), (PACKED, STATE, *FULL)])
def test_layers_are_recomputed_over_two_ranks(packed: Any, overrides: tuple[str, ...]) -> None:
    for found in run_distributed(whole_step, 2, overrides, DOCUMENTS):
        assert_same(found, packed)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(PACKED,), (PACKED, STATE, CHUNKS)])
def test_packed_documents_over_four_ranks(packed: Any, overrides: tuple[str, ...]) -> None:
    for found in run_distributed(whole_step, 4, overrides, DOCUMENTS):
        assert_same(found, packed)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(PACKED,), (PACKED, STATE, CHUNKS, *SELECTIVE)])
def test_with_tensor_and_sequence_parallelism(packed: Any, overrides: tuple[str, ...]) -> None:
    """Every loss, and the gradients of a rank's rows of the first and of the last matrix, which
    all others lie between."""
    losses, mtp, gradients = packed
    split = ("embedding.word_embeddings.weight", "output_layer.weight")
    for rank, found in enumerate(run_distributed(whole_step, 4, (TENSOR, *overrides), DOCUMENTS)):
        rows = {name: gradients[name].chunk(2)[rank % 2] for name in split}
        assert_same((*found[:2], {name: found[2][name] for name in split}), (losses, mtp, rows))


def test_chunks_of_the_loss_equal_the_whole(whole: Any) -> None:
    assert_same(run_distributed(whole_step, 1, (CHUNKS,), [0, LENGTH])[0], whole)


def test_packed_documents_equal_each_alone() -> None:
    """Documents of one length: a depth of MTP is weighted by counts of tokens, and so is a mean
    of means then. The load-balancing loss belongs to the sequence and is off."""
    off = ("model.moe_aux_loss_coeff=0",)
    losses, _, gradients = run_distributed(whole_step, 1, (PACKED, *off), EQUAL)[0]
    assert_same((losses, gradients), run_distributed(alone, 1, off, EQUAL)[0])


def test_packed_losses_equal_each_alone_whatever_the_lengths(packed: Any) -> None:
    losses, _ = run_distributed(alone, 1, (), DOCUMENTS)[0]
    torch.testing.assert_close(packed[0], losses, rtol=2e-5, atol=2e-6)
