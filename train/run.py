"""One run from a recipe: the parts in the order they are built."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.errors import StrataError, on_every_rank
from recipes.rules import fail
from recipes.schema import Recipe
from recipes.stages import Place, Span, pattern
from train import rundir
from train.guards import EXIT_COMPLETE, EXIT_STOPPED, StopRequest
from train.lock import RunLock
from train.world import check_world, joined_world, launched, spin_briefly, start_ranks

if TYPE_CHECKING:
    from model.backends import Backends
    from parallel.layout import Layout
    from train.batches import Batches
    from train.checkpoint import Checkpointer
    from train.state import TrainState
    from train.step import Routers


Job = Callable[[Recipe, "Layout", "Backends", MemoryHandler], int]
"""What a rank does in a world that is up; returns the exit code."""


def run(recipe: Recipe) -> int:
    """Train the recipe; the exit code says how it ended (see train.guards)."""
    from model.validate import validate_stages
    from train.stages import here, in_stage

    if launched() is None or recipe.stages:
        # Before ranks are started for a mistake.
        validate_stages(recipe)
    if launched() is None:
        rundir.check(recipe)
    if not recipe.stages:
        return in_world(recipe, partial(train, recipe, None))
    place = here(recipe)
    return in_stage(recipe, place, partial(train, recipe, place))


def in_world(recipe: Recipe, job: Job) -> int:
    """Validate the recipe, install the backends, join the ranks (or start them here) and do a job
    on each of them.

    Raises:
        ConfigError: the recipe is not valid, or does not fit the ranks that were launched.
    """
    from model.validate import validate_recipe

    spin_briefly()
    if recipe.dry_run:
        fail("dry_run", True, "is for python -m slurm.submit", "leave it out to train")
    launch = launched()
    with on_every_rank():
        layout = validate_recipe(recipe, launch.world_size if launch else None)
        check_world(layout.world_size, launch)
    if launch is None and layout.world_size > 1:
        return start_ranks(layout.world_size, Path(recipe.run.dir))

    from model.backends import install_backends
    from precision.apply import block_formats, set_environment

    set_environment(recipe.precision)
    with _library_messages() as messages:
        backends = install_backends(recipe.device, block_formats(recipe.precision))
        validate_recipe(recipe, layout.world_size, backends.device)
        with joined_world(recipe, backends, launch, layout.virtual_stages):
            return job(recipe, layout, backends, messages)


def train(
    whole: Recipe,
    place: Place | None,
    recipe: Recipe,
    layout: "Layout",
    backends: "Backends",
    messages: MemoryHandler,
) -> int:
    """Build everything and train one stage, on this rank of a world that is up.

    Args:
        whole: the recipe of the run.
        place: the stage among those of the run; None: it has no other.
        recipe: the validated recipe of the stage.
        layout: what validation made of recipe.parallel.
        backends: what runs on what.
        messages: holds the libraries' messages until the run directory is known to be ours.
    """
    import torch.distributed as dist

    from data.ranks import on_first_rank
    from train.batches import Batches, check_data, missing_data

    folder, rank, lock = Path(recipe.run.dir), dist.get_rank(), RunLock(Path(recipe.run.dir))
    changes = on_first_rank(lambda: rundir.check(whole))
    if rank == 0:
        print(backends, *(f"changed: {c}" for c in changes), sep="\n", flush=True)
    # Before anything is written: a mistake in the recipe leaves no directory behind.
    on_first_rank(lambda: check_data(recipe))
    if rank == 0 and place is not None:
        for span in place.spans[place.index + 1 :]:
            for path in missing_data(span.recipe):
                print(f"stages.{span.name} will need {path}, which is not there yet", flush=True)
    # Less than the other ranks wait for.
    patience = 0.8 * 60 * recipe.parallel.timeout_minutes
    try:
        with rundir.usable(folder):
            warning = on_first_rank(lambda: lock.take(patience))
        on_first_rank(lambda: rundir.prepare(whole, backends))
        if warning and rank == 0:
            print(warning, flush=True)
        with rundir.usable(folder):
            messages.setTarget(log_file(folder, rank))
            messages.flush()
        with StopRequest().listening() as stop:
            data = Batches(recipe, layout.dp, place)
            with rundir.usable(folder):
                return _train(recipe, place or Place([Span(recipe)]), layout, data, stop)
    finally:
        lock.release()


def _train(
    recipe: Recipe, place: Place, layout: "Layout", data: "Batches", stop: StopRequest
) -> int:
    import torch.distributed as dist

    from model.counts import flops_per_token
    from train import plots
    from train.metrics import Reporter
    from train.trainer import Trainer
    from train.watchdog import Watchdog, progress_limit

    folder, rank, world = Path(recipe.run.dir), dist.get_rank(), dist.get_world_size()
    said: list[str] = []
    state, routers, checkpointer, resumed = _begin(recipe, place, layout, data, said.append)
    reporter = Reporter(
        folder,
        recipe.logging,
        active=rank == 0,
        config=asdict(recipe),
        first_step=state.progress.step,
        last_step=place.span.end,
    )
    checkpointer.say = reporter.say
    where = f"resumed at step {state.progress.step}" if resumed else "started"
    if place.staged:
        of = f"{place.index + 1} of {len(place.spans)}"
        where += f", stage {place.span.name} ({of}: to step {place.span.end})"
    for message in (*said, f"{folder}: {where}; {layout}"):
        reporter.say(message)
    shapes = pattern(recipe.stage).shapes
    flops = [flops_per_token(recipe.model, shape.sequence_length) for shape in shapes]
    try:
        with Watchdog(progress_limit(recipe, world), folder / "logs", rank) as watchdog:
            trainer = Trainer(
                recipe,
                state,
                routers,
                data,
                checkpointer,
                reporter,
                flops,
                stop,
                place,
                watchdog.beat,
            )
            try:
                code = trainer.fit()
            except Exception:
                checkpointer.leave()
                raise
        if code == EXIT_COMPLETE and place.following is not None and stop.agreed():
            code = EXIT_STOPPED
    finally:
        reporter.close()
    if rank == 0:
        if code != EXIT_COMPLETE or place.following is None:
            rundir.mark_end(folder, code, state.progress.step)
        plots.plot_run(folder)
    return code


def _begin(
    recipe: Recipe,
    place: Place,
    layout: "Layout",
    data: "Batches",
    say: Callable[[str], None],
) -> "tuple[TrainState, Routers, Checkpointer, bool]":
    """Build the model and load what it goes on from; whether that is a checkpoint of this run."""
    import torch
    import torch.distributed as dist

    from parallel.host_memory import give_back_activations
    from train.build import build_state
    from train.checkpoint import Checkpointer
    from train.identity import write_identity
    from train.watchdog import Watchdog, start_limit
    from train.weights import load_weights

    folder = Path(recipe.run.dir)
    if not torch.cuda.is_available():
        shapes = pattern(recipe.stage).shapes
        tokens = max(s.sequence_length * s.micro_batch_size for s in shapes) // layout.cp
        give_back_activations(tokens, recipe.model.hidden_size)
    checkpointer = Checkpointer(
        folder / "checkpoints", recipe.checkpoint, data.fingerprint, say, place
    )
    with Watchdog(
        start_limit(recipe, dist.get_world_size()),
        folder / "logs",
        dist.get_rank(),
        "parallel.timeout_minutes",
        "building and loading",
    ):
        state, routers = build_state(recipe, layout)
        state.law_tokens = place.span.law_tokens
        resumed = checkpointer.load(state)
        if not resumed and recipe.checkpoint.load is not None:
            say(f"weights of {load_weights(Path(recipe.checkpoint.load), state)}")
        if not resumed:
            write_identity(recipe, data, state.chunks)
    return state, routers, checkpointer, resumed


@contextlib.contextmanager
def _library_messages() -> Iterator[MemoryHandler]:
    """Warnings and logs of libraries go to a handler instead of the terminal.

    It keeps them until it is given a target.
    """
    handler = MemoryHandler(10_000, flushLevel=logging.WARNING, flushOnClose=False)
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    # Says on the terminal that there is no CUDA, as the table of backends does.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.simplefilter("default")
    try:
        yield handler
    except StrataError:
        raise
    except Exception:
        logging.getLogger("strata").exception("run failed")
        raise
    finally:
        root.removeHandler(handler)
        if handler.target is not None:
            handler.target.close()
        handler.close()


def log_file(folder: Path, rank: int) -> logging.Handler:
    """Where the libraries' messages go: logs/rankN.log of the run directory."""
    file = logging.FileHandler(folder / "logs" / f"rank{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return file
