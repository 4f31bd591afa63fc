"""One run from a recipe: the parts in the order they are built."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import StrataError
from recipes.schema import Recipe
from train.world import check_world, joined_world, launched, start_ranks

if TYPE_CHECKING:
    from model.backends import Backends
    from parallel.layout import Layout


def run(recipe: Recipe) -> int:
    """Train the recipe; the exit code says how it ended (see train.guards)."""
    from model.validate import validate_recipe

    # Read by OpenMP when torch is imported: threads that sleep between the many short
    # operations of a small model take longer to wake than to work (measured: 20 % of a step).
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    launch = launched()
    layout = validate_recipe(recipe, launch.world_size if launch else None)
    check_world(layout.world_size, launch)
    if launch is None and layout.world_size > 1:
        return start_ranks(layout.world_size, Path(recipe.run.dir) / "logs")

    from model.backends import install_backends

    with _logged(recipe):
        backends = install_backends(recipe.device)
        validate_recipe(recipe, layout.world_size, backends.device)
        with joined_world(recipe, backends, launch, layout.virtual_stages):
            return train(recipe, layout, backends)


def train(recipe: Recipe, layout: "Layout", backends: "Backends") -> int:
    """Build everything and train, on this rank of a world that is up."""
    import torch.distributed as dist

    from data.prepare import ensure_prepared
    from model.counts import flops_per_token
    from train import plots, rundir
    from train.batches import Batches
    from train.build import build_state
    from train.checkpoint import Checkpointer
    from train.metrics import Reporter
    from train.optimizer import train_steps
    from train.trainer import Trainer

    folder = Path(recipe.run.dir)
    first = dist.get_rank() == 0
    changes = on_first_rank(lambda: rundir.prepare(recipe, backends))
    if first:
        print(backends, *(f"changed: {c}" for c in changes), sep="\n", flush=True)
    if recipe.data.prepare_if_missing:
        on_first_rank(lambda: ensure_prepared(recipe.data))
    data = Batches(recipe, layout.dp)
    state, routers = build_state(recipe, layout)
    messages: list[str] = []
    checkpointer = Checkpointer(
        folder / "checkpoints", recipe.checkpoint, data.fingerprint, messages.append
    )
    resumed = checkpointer.load(state)
    reporter = Reporter(
        folder,
        recipe.logging,
        active=first,
        config=asdict(recipe),
        first_step=state.progress.step,
        last_step=train_steps(recipe.stage),
    )
    checkpointer.say = reporter.say
    for message in messages:
        reporter.say(message)
    where = f"resumed at step {state.progress.step}" if resumed else "started"
    reporter.say(f"{folder}: {where}; {layout}")
    flops = flops_per_token(recipe.model, recipe.stage.sequence_length)
    trainer = Trainer(recipe, state, routers, data, checkpointer, reporter, flops)
    try:
        return trainer.fit()
    finally:
        reporter.close()
        if first:
            plots.plot_run(folder)


def on_first_rank(action: Any) -> Any:
    """Run `action` on rank 0 and give its result, or its exception, to every rank."""
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # raised again on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def _logged(recipe: Recipe) -> Iterator[None]:
    """Warnings and logs of libraries go to logs/rank0.log instead of the terminal."""
    import logging
    import warnings

    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    folder = Path(recipe.run.dir) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(folder / f"rank{rank}.log")
    except OSError:  # rundir.prepare says so in words
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    try:
        yield
    except StrataError:
        raise
    except Exception:
        logging.getLogger("strata").exception("run failed")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
