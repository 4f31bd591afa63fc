"""`python -m slurm.status run.dir=...`: how a run is doing, from its directory and the queue."""

import contextlib
import datetime
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.compose import run_cli
from recipes.errors import ConfigError
from recipes.schema import Recipe
from recipes.stages import saved_length
from recipes.tables import table
from slurm import client
from slurm.submit import submitted

_RECENT = 20
"""Steps whose median speed tells how long the rest takes."""


def main(recipe: Recipe) -> int:
    """Print the status of the run, or of the runs of an array, in recipe.run.dir.

    Raises:
        ConfigError: nothing was submitted or trained there.
    """
    folder = Path(recipe.run.dir).resolve()
    if arms := sorted(path for path in folder.glob("arms/*") if path.is_dir()):
        print(overview(arms))
        return 0
    jobs = submitted(folder)
    if not jobs and not (folder / "config.json").exists():
        raise ConfigError(f"run.dir={folder} holds no run; give that of slurm.submit or of train")
    for name, text in status(folder, jobs, _queue(jobs)):
        print(f"{name:<11}{text}")
    events = _lines(folder / "slurm" / "chain.jsonl")
    if events:
        print(f"\n{history(events)}")
    return 0


def overview(arms: list[Path]) -> str:
    """A table of the runs of a comparison or a sweep, a line each."""
    rows: list[tuple[str, ...]] = [("run", "step", "loss", "speed", "state")]
    for arm in arms:
        jobs = submitted(arm)
        said = dict(status(arm, jobs, _queue(jobs)))
        rows.append((arm.name, *(said.get(name, "") for name in rows[0][1:])))
    return table(rows, left=(0, 4))


def _queue(jobs: list[str]) -> list[dict[str, str]] | str:
    """What squeue says about the newest job, or why it says nothing."""
    try:
        return client.queued(jobs[-1]) if jobs else []
    except ConfigError as error:
        return str(error)


def status(
    folder: Path, jobs: list[str], queue: list[dict[str, str]] | str
) -> Iterator[tuple[str, str]]:
    """Name and text of each line.

    Args:
        jobs: numbers of the submitted jobs, the newest last.
        queue: what squeue says about the newest (slurm.client.queued), or why it does not.
    """
    yield "run", str(folder)
    yield "state", _state(folder, jobs, queue)
    records = _lines(folder / "metrics.jsonl")
    steps, tokens = _length(folder) or (None, 0)
    if records:
        last = records[-1]
        of = f" of {steps} ({last['step'] / steps:.0%})" if steps else ""
        stage = f", stage {last['stage']}" if "stage" in last else ""
        yield "step", f"{last['step']}{of}{stage}"
        yield "loss", f"{last['loss']:.4f}" if last["loss"] is not None else "not finite"
        yield "speed", f"{last['tokens_per_second']:,.0f} tokens/s"
        if steps and last["step"] < steps:
            # By tokens: steps of other lengths and stages take longer or shorter.
            speed = statistics.median(r["tokens_per_second"] for r in records[-_RECENT:])
            yield "left", f"{duration((tokens - last['tokens']) / speed)} of training"
    else:
        yield "step", f"none of {steps} yet" if steps else "none yet"
    latest = _text(folder / "checkpoints" / "latest")
    yield "checkpoint", latest or "none yet"
    strikes = _text(folder / "strikes")
    yield (
        "strikes",
        f"{strikes if strikes.isdecimal() else 0} failures in a row without a new checkpoint",
    )
    bad = [line.replace("\t", ": ") for line in _text(folder / "bad-nodes").splitlines()]
    if bad:
        yield "bad nodes", "; ".join(bad)


def history(events: list[dict[str, Any]]) -> str:
    """A table of what happened to the chain."""
    rows = [("when", "job", "nodes", "checkpoint", "what")]
    for e in events:
        rows.append((e["time"], e["job"], e["nodes"], e["latest"], f"{e['event']}: {e['reason']}"))
    return table(rows, left=(0, 1, 2, 3, 4))


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min` or `40 s`."""
    whole = datetime.timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    if whole.days:
        return f"{whole.days} d {hours} h"
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _state(folder: Path, jobs: list[str], queue: list[dict[str, str]] | str) -> str:
    if queue and not isinstance(queue, str):
        mine = queue[0]
        where = f" on {mine['nodes']}" if mine["nodes"] else ""
        if mine["state"] == "RUNNING":
            return f"running: job {mine['task']}{where}, {mine['left']} of the time limit left"
        why = "" if mine["reason"] == "None" else f" ({mine['reason']})"
        return f"{mine['state'].lower()}: job {mine['task']}{where}{why}"
    if complete := _text(folder / "complete"):
        return f"complete at step {complete}"
    if stopped := _text(folder / "stopped"):
        return f"stopped: {stopped}"
    if waiting := _text(folder / "waiting"):
        return f"waiting: {waiting}"
    events = _lines(folder / "slurm" / "chain.jsonl")
    if not jobs:
        return "not submitted to Slurm from this directory"
    if not client.available("squeue"):
        return f"unknown: job {jobs[-1]} cannot be asked for, there is no squeue on this machine"
    if queue:
        return f"unknown: {queue}"
    own = [e for e in events if jobs[-1] in (e["task"], e["job"])]
    if own and own[-1]["event"] == "end":
        return f"ended: {own[-1]['reason']}"
    if state := client.accounted(jobs[-1]):
        return f"ended: job {jobs[-1]} is {state} by sacct; its script did not say why"
    return f"ended: job {jobs[-1]} is not in the queue and its script did not say why"


def _length(folder: Path) -> tuple[int, int] | None:
    """Steps and tokens of the whole run; None: it has not begun."""
    config = folder / "config.json"
    return saved_length(json.loads(config.read_text())) if config.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON lines; none if there is no file. What a crash of the machine
    has damaged is left out."""
    text = path.read_text(errors="replace") if path.exists() else ""
    found = []
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


if __name__ == "__main__":
    run_cli(main, "slurm.status")
