"""The run directory: chosen by the user, the same one resumes the same run."""

import contextlib
import errno
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from model.backends import Backends
from recipes.compose import to_yaml
from recipes.errors import ConfigError
from recipes.schema import Recipe
from recipes.stages import spans
from train.guards import EXIT_COMPLETE, EXIT_NON_FINITE, write_atomically

COMPLETE = "complete"
"""File of a run whose last step is done and saved; it says the step."""
WAITING = "waiting"
"""File of a run whose next stage needs other ranks than it was given; it says which."""
STOPPED = "stopped"
"""File of a run that a guard stopped for good; it says why."""

_APART = (
    "cluster",
    "checkpoint",
    "logging",
    "guard",
    "compare",
    "plan",
    "sensitivity",
    "convert",
    "merge",
    "parity",
    "run.dir",
    "run.stage",
    "device",
    "traceback",
    "dry_run",
    "data.cache",
    "data.sources",
    "data.prepare_if_missing",
    "data.prepare_workers",
)
"""Keys and groups that say nothing about what is learned."""

MAY_CHANGE = (
    *_APART,
    "parallel",
    "stage.train_steps",
    "stage.train_tokens",
    "stage.micro_batch_size",
    "stage.eval_interval",
    "stage.eval_steps",
)
"""Keys and groups a resumed run may change: none alters what the next step computes, except
stage.train_*, which extends the run (and its schedule, if that has no length of its own)."""

NOT_LEARNING = (*_APART, "precision")
"""Keys and groups two runs may differ in and still be paired: precision is what is compared."""


def check(recipe: Recipe) -> list[str]:
    """Whether the directory is new or belongs to this recipe; changes nothing.

    Returns:
        One `key: old -> new` line for each allowed change since the last start.

    Raises:
        ConfigError: another run lives there; the keys that differ are named.
    """
    folder = Path(recipe.run.dir)
    with usable(folder):
        if not _trained(folder):
            return []
        config = folder / "config.json"
        if not config.exists():
            raise ConfigError(
                f"run.dir={folder} holds metrics of a run without its config.json; "
                "choose another run.dir"
            )
        # A key that is younger than the run had its default effect in it.
        old = flat(asdict(Recipe())) | flat(json.loads(config.read_text()))
    new = flat(asdict(recipe))
    different = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    lines = {k: f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(different)}
    free = _open_stages(recipe, old, steps_done(folder))
    fixed = [line for key, line in lines.items() if not _may_change(key, free)]
    if fixed:
        raise ConfigError(
            f"run.dir={folder} belongs to a run with another configuration "
            f"({'; '.join(fixed)}); choose another run.dir or undo these changes"
        )
    return list(lines.values())


def check_model(recipe: Recipe) -> None:
    """Whether the run of this directory trained the recipe's model; stages may cut it elsewhere.

    Raises:
        ConfigError: another model; the keys that differ are named.
    """
    folder = Path(recipe.run.dir)
    with usable(folder):
        trained = json.loads((folder / "config.json").read_text())["model"]
    new = asdict(recipe.model)
    old = asdict(Recipe().model) | trained
    for model in (old, new):
        model["hybrid_layer_pattern"] = model["hybrid_layer_pattern"].replace("|", "")
    lines = [f"model.{k}: {old.get(k)} -> {new[k]}" for k in new if new[k] != old.get(k)]
    if lines:
        raise ConfigError(
            f"run.dir={folder} holds another model ({'; '.join(lines)}); give the recipe it was "
            "trained with"
        )


def steps_done(folder: Path) -> int:
    """Steps up to the checkpoint that `latest` names, which may be a copy: `iter_0000040-keep`."""
    latest = folder / "checkpoints" / "latest"
    with usable(folder):
        name = latest.read_text() if latest.exists() else ""
    number = re.match(r"iter_(\d+)", name, re.ASCII)
    return int(number[1]) if number else 0


def prepare(recipe: Recipe, backends: Backends) -> None:
    """Create the directory and write what describes the run.

    Raises:
        ConfigError: the directory cannot be written.
    """
    folder = Path(recipe.run.dir)
    with usable(folder):
        for name in ("checkpoints", "plots", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in (COMPLETE, STOPPED, WAITING):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / "config.json", json.dumps(asdict(recipe), indent=1) + "\n")
        write_atomically(folder / "config.yaml", to_yaml(recipe))
        command = shlex.join([sys.executable, "-m", "train", *sys.argv[1:]])
        with (folder / "command.txt").open("a") as file:
            file.write(command + "\n")
        environment = {"backends": backends.as_dicts(), "python": sys.version}
        write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def mark_end(folder: Path, code: int, step: int) -> None:
    """Leave word of an end for good: exit codes are lost on the way through launchers."""
    if code == EXIT_COMPLETE:
        write_atomically(folder / COMPLETE, f"{step}\n")
    elif code == EXIT_NON_FINITE:
        reason = f"loss or gradient of step {step + 1} was not finite; see bad_steps.json"
        write_atomically(folder / STOPPED, f"{reason}\n")


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn what the file system says into one sentence.

    Raises:
        ConfigError: the directory cannot be read or written: full, read-only, ...
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(unusable(folder, error)) from error


def unusable(folder: Path, error: OSError) -> str:
    """Why a directory cannot be used, and what to do."""
    remedy = {
        errno.ENOSPC: "free some space and start again; the last checkpoint is intact",
        errno.EDQUOT: "free some of your quota and start again; the last checkpoint is intact",
    }.get(error.errno or 0, "choose a directory you can write to")
    return f"run.dir={folder}: {error.strerror or error}; {remedy}"


def _trained(folder: Path) -> bool:
    """Whether a run has left something in the directory that its recipe must fit.

    One that failed before its first step has not: its mistake may be mended.
    """
    metrics = folder / "metrics.jsonl"
    return (folder / "checkpoints" / "latest").exists() or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def _open_stages(recipe: Recipe, old: dict[str, Any], steps: int) -> set[str]:
    """Stages of this recipe, and of the run before, in which no step is done yet."""
    if not recipe.stages or not any(key.startswith("stages.") for key in old):
        return set()
    begun = {span.name for span in spans(recipe) if span.first_step < steps}
    names = {key.split(".")[1] for key in old if key.startswith("stages.")}
    return (names | recipe.stages.keys()) - begun


def _may_change(key: str, open_stages: set[str]) -> bool:
    if key.startswith("stages."):
        _, name, *rest = key.split(".")
        # A stage may set what others leave to the recipe, where it is None here.
        return name in open_stages or (bool(rest) and _may_change(".".join(rest), set()))
    explains = key.startswith("precision.") and key.endswith(".why")
    return explains or any(key == k or key.startswith(k + ".") for k in MAY_CHANGE)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested mappings and lists."""
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = {f.name: getattr(tree, f.name) for f in fields(tree)}
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    result: dict[str, Any] = {}
    for key, value in items:
        result |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result
