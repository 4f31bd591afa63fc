"""Every layout trains the same model, and goes on from any other layout's checkpoint.

Three steps of the real trainer on real ranks: losses, gradient norms and the weights they lead to
are those of one rank, and so is the validation loss of a checkpoint wherever it is loaded.
`python -m parallel.parity` does the same over the command line and for longer.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from parallel.parity import FIRST, MATRIX, QUANTISED_FIRST, REFERENCE, Case, bounds
from recipes.compose import load_recipe
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out, shards, whole

TWO = [case for case in MATRIX if case.ranks == 2]
FOUR = [case for case in MATRIX if case.ranks == 4]
STEPS = 3
FURTHER = 2
"""Steps after the checkpoint: the second shows whether the moments came along."""


class Text:
    """The same random text for every layout, cut as the trainer's batches are."""

    has_validation = True

    def __init__(self, recipe: Any, dp: int) -> None:
        import torch

        self.stage, self.dp = recipe.stage, dp
        size = (STEPS + FURTHER + 1) * self.stage.global_batch_size, self.stage.sequence_length + 1
        generator = torch.Generator().manual_seed(7)
        self.samples = torch.randint(recipe.model.vocab_size, size, generator=generator)

    def train_from(self, step: int) -> Iterator[dict[str, Any]]:
        return self._from(step * self.stage.global_batch_size)

    def validation(self) -> Iterator[dict[str, Any]]:
        return self._from((STEPS + FURTHER) * self.stage.global_batch_size)

    def fingerprint(self, step: int) -> str:
        return str(step)

    def _from(self, first: int) -> Iterator[dict[str, Any]]:
        import torch
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        rank = parallel_state.get_data_parallel_rank()
        for sample in self.samples[first + rank :: self.dp]:
            tokens, labels = sample[None, :-1], sample[None, 1:]
            batch = {
                "tokens": tokens.contiguous(),
                "labels": labels.contiguous(),
                "loss_mask": torch.ones(tokens.shape),
                "position_ids": torch.arange(tokens.shape[1])[None],
            }
            group = parallel_state.get_context_parallel_group()
            yield get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def trainer(recipe: Any, layout: Any, folder: Path, **checkpoints: Any) -> Any:
    """A trainer whose run is in `folder`.

    Args:
        checkpoints: fields of recipe.checkpoint.
    """
    from recipes.schema import CheckpointConfig
    from train.build import build_state
    from train.checkpoint import Checkpointer
    from train.trainer import Trainer

    recipe.run.dir = str(folder)
    data, config = Text(recipe, layout.dp), CheckpointConfig(**checkpoints)
    checkpointer = Checkpointer(folder / "checkpoints", config, data.fingerprint, lambda _: None)
    state, routers = build_state(recipe, layout)
    return Trainer(recipe, state, routers, data, checkpointer, None, [1.0])  # type: ignore[arg-type]


def train(rank: int, world_size: int, layouts: list[Case], runs: Path) -> list[Any]:
    """For each layout: the measured steps, the weights after them, the validation loss and the
    losses of further steps."""
    from megatron.core.utils import unwrap_model

    found = []
    for case in layouts:
        folder = runs / case.name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with laid_out(case, world_size) as (recipe, layout):
            trained = trainer(recipe, layout, folder)
            steps = [trained._step() for _ in range(STEPS)]
            weights = [s for c in trained.state.chunks for s in shards(unwrap_model(c))]
            loss = trained.evaluate()
            trained.checkpointer.save(trained.state)
            trained.checkpointer.close()
            further = [trained._step().loss for _ in range(FURTHER)]
        found.append((steps, weights, [loss, *further]))
    return found


def evaluate(
    rank: int, world_size: int, layouts: list[Case], origins: list[list[str]], runs: Path
) -> list[list[Any]]:
    """For each layout: of the checkpoints that others wrote, the validation loss and the losses of
    further steps."""
    found = []
    for case, names in zip(layouts, origins, strict=True):
        with laid_out(case, world_size) as (recipe, layout):
            losses = []
            for name in names:
                loaded = trainer(recipe, layout, runs / name)
                assert loaded.checkpointer.load(loaded.state)
                assert loaded.state.progress.step == STEPS
                loss = loaded.evaluate()
                further = [loaded._step().loss for _ in range(FURTHER)]
                losses.append([loss, *further])
                loaded.checkpointer.close()
        found.append(losses)
    return found


@cache
def reference(runs: Path) -> Any:
    return run_distributed(train, 1, [REFERENCE], runs)[0][0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [(2, TWO), (4, FOUR[:1]), pytest.param(4, FOUR[1:], marks=pytest.mark.slow)],
    ids=["2 ranks", "4 ranks", "other 4 ranks"],
)
def test_layouts_train_the_same(world_size: int, layouts: list[Case], runs: Path) -> None:
    steps, weights, losses = reference(runs)
    ranks = run_distributed(train, world_size, layouts, runs)
    for i, case in enumerate(layouts):
        for rank in ranks:
            for step, wanted in zip(rank[i][0], steps, strict=True):
                where = f"{case.name}: {step}, not {wanted}"
                assert step.loss == pytest.approx(wanted.loss, rel=1e-5), where
                assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5), where
                assert step.mtp_losses == pytest.approx(wanted.mtp_losses, rel=1e-5), where
                balance = wanted.load_balance_loss
                assert step.load_balance_loss == pytest.approx(balance, rel=1e-4), where
                assert step.max_violation == pytest.approx(wanted.max_violation, abs=1e-6), where
                assert ("pipeline" in step.wire) == (case.pipeline_model > 1), where
                assert ("context" in step.wire) == (case.context > 1), where
            assert rank[i][2] == pytest.approx(losses, rel=1e-5), case.name
        ours, theirs = whole([rank[i][1] for rank in ranks]), whole([weights])
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            # Adam divides by the gradient's size, and so magnifies what rounding did to a small
            # one; the bias of a router moves by its rate or not at all.
            difference = float((weight - theirs[name]).abs().max())
            assert difference < 2e-4, f"{case.name}: {name} differs by {difference}"


def test_checkpoints_move_between_layouts(runs: Path) -> None:
    """Each 2-rank layout loads the checkpoint of the one before it in the list."""
    _train_missing(2, TWO, runs)
    names = [case.name for case in TWO]
    _check_moves(2, TWO, [[name] for name in names[-1:] + names[:-1]], runs)


@pytest.mark.timeout(1800)  # a hundred and more checkpoints are loaded
@pytest.mark.slow
def test_checkpoints_move_between_all_layouts(runs: Path) -> None:
    _train_missing(2, TWO, runs)
    _train_missing(4, FOUR, runs)
    names = [case.name for case in (REFERENCE, *TWO, *FOUR)]
    for world_size, layouts in ((1, [REFERENCE]), (2, TWO), (4, FOUR)):
        _check_moves(world_size, layouts, [names] * len(layouts), runs)


def _train_missing(world_size: int, layouts: list[Case], runs: Path) -> None:
    """Write the checkpoints that no test before has written."""
    missing = [c for c in layouts if not (runs / c.name / "checkpoints" / "latest").exists()]
    if missing:
        run_distributed(train, world_size, missing, runs)


def _check_moves(
    world_size: int, layouts: list[Case], origins: list[list[str]], runs: Path
) -> None:
    """The losses from a checkpoint on are those of one rank, whoever wrote it."""
    _, _, wanted = reference(runs)
    for rank in run_distributed(evaluate, world_size, layouts, origins, runs, timeout=600):
        for case, names, losses in zip(layouts, origins, rank, strict=True):
            for name, moved in zip(names, losses, strict=True):
                assert moved == pytest.approx(wanted, rel=1e-5), f"{name} on {case.name}"


def in_small_buckets(rank: int, world_size: int, layouts: list[Case], runs: Path) -> list[Any]:
    """The losses of each layout's steps, the head's weight in a bucket of its own, as in models
    of full size."""
    from megatron.core import distributed

    whole_buckets = distributed.DistributedDataParallelConfig
    distributed.DistributedDataParallelConfig = partial(whole_buckets, bucket_size=20_000)
    return [[step.loss for step in found[0]] for found in train(rank, world_size, layouts, runs)]


def test_a_chunked_head_waits_for_its_weight(runs: Path) -> None:
    """Parameters are gathered while the layers before compute."""
    overlap = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    chunks = ("parallel.cross_entropy_loss_chunk=16",)
    names = {"chunked": chunks, "overlapped": (*overlap, *chunks)}
    layouts = [Case(name, data=2, overrides=words) for name, words in names.items()]
    chunked, overlapped = run_distributed(in_small_buckets, 2, layouts, runs)[0]
    assert overlapped == pytest.approx(chunked, rel=1e-6)


def first_steps(
    rank: int, world_size: int, layouts: list[Case], precision: str, runs: Path
) -> list[Any]:
    """The first step of each layout."""
    import os

    from precision.apply import environment

    found = []
    for case in layouts:
        folder = runs / precision / case.name
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= environment(load_recipe([f"precision={precision}"]).precision)
        with laid_out(case, world_size, f"precision={precision}") as (recipe, layout):
            found.append(trainer(recipe, layout, folder)._step())
    return found


@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_rtn"])
def test_nvfp4_is_one_ranks_where_operands_are(precision: str, runs: Path) -> None:
    """Whole layers and whole micro batches elsewhere: the same losses, and the same gradients if
    they are rounded to nearest. With stochastic rounding the ranks' draws are not one rank's."""
    (one,) = run_distributed(first_steps, 1, [REFERENCE], precision, runs / "one")[0]
    same = [case for case in TWO if case.name in ("dp2", "pp2 vp2")]
    drawn = precision == "nvfp4"
    norms = []
    for steps in run_distributed(first_steps, 2, same, precision, runs / "two"):
        for case, step in zip(same, steps, strict=True):
            allowed = bounds(case, load_recipe([f"precision={precision}"]).precision)
            assert allowed.losses == FIRST
            assert allowed.grad_norm == (QUANTISED_FIRST if drawn else FIRST)
            assert step.loss == pytest.approx(one.loss, rel=allowed.losses), case.name
            assert step.mtp_losses == pytest.approx(one.mtp_losses, rel=allowed.losses), case.name
            assert step.grad_norm == pytest.approx(one.grad_norm, rel=allowed.grad_norm), case.name
            norms.append(abs(step.grad_norm / one.grad_norm - 1))
    assert (max(norms) > FIRST) == drawn
