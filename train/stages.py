"""One stage after another: which one a run is in, and how it gets into the next.

Every stage begins in fresh processes, from the checkpoint at the end of the one before, exactly as
a run begins that was killed there: there is no other way from stage to stage.
"""

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recipes.errors import ConfigError
from recipes.schema import Recipe
from recipes.stages import Place, place_at, spans
from train import rundir
from train.guards import EXIT_COMPLETE, EXIT_STOPPED, write_atomically
from train.world import NEXT_RENDEZVOUS, Launch, given_ranks, launched

if TYPE_CHECKING:
    from collections.abc import Callable

_STAGE = "STRATA_STAGE"
"""Set for what follows a stage: the name of the next one. Another node may see `latest` late."""


def here(recipe: Recipe) -> Place:
    """The stage that a start of this run works on: that of the step after the newest checkpoint."""
    found = spans(recipe)
    names = [span.name for span in found]
    if os.environ.get(_STAGE) in names:
        return Place(found, names.index(os.environ[_STAGE]))
    return place_at(found, rundir.steps_done(Path(recipe.run.dir)))


def in_stage(recipe: Recipe, place: Place, job: "Callable[..., int]") -> int:
    """Train one stage and go on with the next, in the same ranks or in others started here.

    Returns:
        The exit code, if the run ends here: complete, stopped, or the next stage needs other ranks
        than the launcher gave, which file `waiting` of the run directory then says.

    Raises:
        ConfigError: the stage does not fit the launched ranks.
    """
    from model.validate import validate_recipe
    from train.run import in_world

    # As the user gave it: what a stage sets for its libraries is not for the next one.
    environment = dict(os.environ)
    launch = launched()
    following = place.following
    handed: list[str] = []

    def train_and_tell(*arguments: object) -> int:
        code = job(*arguments)
        if code == EXIT_COMPLETE and following is not None and launch is not None:
            handed.append(_meeting_point())
        return code

    try:
        code = in_world(place.span.recipe, train_and_tell)
    except ConfigError as error:
        raise ConfigError(f"stages.{place.span.name}: {error}") from error
    if code != EXIT_COMPLETE or following is None:
        return code
    if launch is None:
        _again(following, environment)
    if not given_ranks():  # the process that started them goes on
        return code
    try:
        layout = validate_recipe(following.span.recipe, launch.world_size)
        fits = layout.world_size == launch.world_size
        reason = f"needs {layout.world_size} ranks"
    except ConfigError as error:
        fits, reason = False, str(error)
    if fits:
        # torchrun's own store still holds the addresses of the stage that ended.
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        _again(following, environment | {NEXT_RENDEZVOUS: handed[0]})
    return _wait_for_others(recipe, place, launch, reason)


def _again(following: Place, environment: dict[str, str]) -> NoReturn:
    """Become the same command in a fresh process, for the next stage."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, environment | {_STAGE: following.span.name})


def _meeting_point() -> str:
    """Where the ranks of the next stage find each other. A collective."""
    import torch.distributed as dist

    found: list[str] = [""]
    if dist.get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        found = [f"tcp://{os.environ.get('MASTER_ADDR') or socket.gethostname()}:{port}"]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _wait_for_others(recipe: Recipe, place: Place, launch: Launch, reason: str) -> int:
    """Say what the next stage needs, and end."""
    following = place.following
    assert following is not None
    text = (
        f"stage {place.span.name} is done; stage {following.span.name} {reason}, and "
        f"{launch.world_size} were launched: start or submit the same command again"
    )
    if launch.rank == 0:
        print(text, flush=True)
        write_atomically(Path(recipe.run.dir) / rundir.WAITING, text + "\n")
    return EXIT_STOPPED
