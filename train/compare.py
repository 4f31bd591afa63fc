"""`python -m train.compare`: runs that differ only in precision or model, and a verdict about them.

compare.precisions or compare.models trains the arms, each by `python -m train` in a process of its
own; compare.runs takes finished runs. comparison.md says what the report means.
"""

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from model.validate import validate_recipe
from precision.apply import block_formats
from precision.backend import is_installed
from precision.policy import is_quantized
from recipes.compose import choices, load_recipe, quoted, run_cli, split_arguments
from recipes.errors import ConfigError, StrataError
from recipes.rules import one_of
from recipes.schema import Recipe
from recipes.stages import train_steps
from train import rundir
from train.comparison import compare
from train.comparison_plots import plot_comparison
from train.finished import read_run
from train.guards import (
    EXIT_COMPLETE,
    EXIT_NON_FINITE,
    EXIT_PRECISION,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StopRequest,
)
from train.metrics import MetricsFile
from train.report import headline, write_report
from train.world import end_with_parent, launched

EXIT_FAILED = 1
"""An arm did not pass."""

DECIDED_HERE = ("run.dir", "run.seed")
"""Overrides that every arm has a value of its own for, besides what is compared."""


WATCHED = 4
"""Steps of an arm that precision telemetry sees, unless logging.precision_interval says how often.
It sees the emulated Transformer Engine alone."""


@dataclass(frozen=True)
class Arm:
    """One run to train."""

    name: str
    folder: Path
    arguments: list[str]
    """Of `python -m train`."""
    steps: int

    @property
    def finished(self) -> bool:
        """Whether its last step is done and saved."""
        latest = self.folder / "checkpoints" / "latest"
        records = MetricsFile(self.folder / "metrics.jsonl").read()
        return (
            bool(records)
            and records[-1]["step"] == self.steps
            and latest.exists()
            and latest.read_text().strip() == f"iter_{self.steps:07d}"
        )


def main(recipe: Recipe) -> int:
    """Train what is to be compared, compare it, write the report.

    Returns:
        0: every arm passes; 1: one does not; 3: stopped by a signal; the same command goes on.

    Raises:
        ConfigError: nothing to compare, or runs that cannot be compared.
    """
    validate_recipe(recipe)
    arguments = sys.argv[1:]
    given = {argument.split("=")[0] for argument in arguments}
    folders = [Path(name) for name in recipe.compare.runs]
    if folders:
        unused = sorted(k for k in given if k != "run.dir" and not k.startswith("compare."))
        if unused:
            print(f"compare.runs: nothing is trained, so these do nothing: {', '.join(unused)}")
        default = "-".join(["compare", *(folder.resolve().name for folder in folders)])
    else:
        default = f"compare-{recipe.model.name}"
    folder = Path(recipe.run.dir) if "run.dir" in given else Path("runs") / default
    if not folders:
        watched = "logging.precision_interval" not in given and not is_installed()
        arms = plan(recipe, arguments, folder, watched)
        code = train_arms(arms)
        if code != EXIT_COMPLETE:
            return code
        folders = [arm.folder for arm in arms]
    comparison = compare([read_run(path) for path in folders], recipe.compare.budget)
    with rundir.usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_report(comparison, folder, plot_comparison(comparison, folder / "plots"))
    for compared in comparison.arms:
        print(headline(compared, comparison.budget))
        for text in (*compared.verdict.failures, *compared.verdict.notes):
            print(f"  {text}")
    print(f"report: {folder}/report.md")
    return EXIT_COMPLETE if comparison.passed else EXIT_FAILED


def plan(recipe: Recipe, arguments: list[str], folder: Path, watched: bool = False) -> list[Arm]:
    """The arms, each checked before the first one is trained; the baseline's come first.

    Args:
        watched: those that quantise have their precision telemetry, a few times.

    Raises:
        ConfigError: nothing to compare, a launcher, or an arm that cannot be trained.
    """
    settings = recipe.compare
    key, group, names = (
        ("compare.models", "model", settings.models)
        if settings.models
        else ("compare.precisions", "precision", settings.precisions)
    )
    if not names:
        raise ConfigError(
            "compare.precisions=[] leaves nothing to compare; give compare.precisions=[bf16,nvfp4] "
            "or compare.models=[...] to train, or compare.runs=[DIR,DIR] for finished runs"
        )
    if launched() is not None:
        raise ConfigError(
            "train.compare starts its runs by itself and cannot be started by torchrun or srun; "
            "train each arm with them and give compare.runs=[DIR,DIR]"
        )
    if any(argument.startswith(f"{group}=") for argument in arguments):
        raise ConfigError(f"{group} and {key}={names} both say what to train; leave {group} out")
    overrides, config_dir = split_arguments(arguments)
    common = [
        o
        for o in overrides
        if o.split("=")[0] not in (*DECIDED_HERE, group)
        and not o.startswith(("compare.", "compare="))
    ]
    place = ["--config-dir", str(config_dir)] if config_dir else []
    arms = []
    for choice in names:
        one_of(key, choice, choices(group, config_dir))
        for seed in range(recipe.run.seed, recipe.run.seed + settings.seeds):
            name = f"{choice}-{seed}"
            where = folder / "arms" / name
            own = [f"{group}={choice}", f"run.seed={seed}", f"run.dir={quoted(str(where))}"]
            planned = load_recipe([*common, *own], config_dir)
            if planned.stages:
                raise ConfigError(
                    f"a recipe with stages ({', '.join(planned.stages)}) cannot be compared; "
                    "compare one of them with run.stage=NAME"
                )
            validate_recipe(planned)
            rundir.check(planned)
            steps = train_steps(planned.stage)
            if watched and any(map(is_quantized, block_formats(planned.precision))):
                own.append(f"logging.precision_interval={max(1, steps // WATCHED)}")
            arms.append(Arm(name, where, [*place, *common, *own], steps))
    return arms


def train_arms(arms: list[Arm]) -> int:
    """Train the arms that are not finished, one after another.

    Stop signals are passed on; a second Ctrl-C ends everything at once.

    Returns:
        0: every arm is finished, or ended because a loss was not finite, which the verdict then
        says; 1: an arm did not compute in its formats; 3: stopped by a signal; 2: an arm had a user
        error. What was wrong, the arm has printed.

    Raises:
        StrataError: an arm failed otherwise.
    """
    with StopRequest().listening() as stop:
        for number, arm in enumerate(arms, start=1):
            of = f"arm {number} of {len(arms)}: {arm.name}"
            if arm.finished:
                print(f"{of}: finished before, {arm.steps} steps", flush=True)
                continue
            print(f"{of}: python -m train {shlex.join(arm.arguments)}", flush=True)
            code = _train(arm, stop)
            if stop.signal is not None or code == EXIT_STOPPED:
                print(f"stopped in arm {arm.name}; the same command goes on", flush=True)
                return EXIT_STOPPED
            if code == EXIT_USER_ERROR:
                return code
            if code == EXIT_PRECISION:
                print(f"{arm.name}: FAIL: it did not compute in the formats of its policy")
                return EXIT_FAILED
            if code not in (EXIT_COMPLETE, EXIT_NON_FINITE):
                raise StrataError(
                    f"arm {arm.name} ended with exit code {code}; see {arm.folder}/logs"
                )
    return EXIT_COMPLETE


def _train(arm: Arm, stop: StopRequest) -> int:
    """Run one arm to its end; its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arm.arguments],
        # Ctrl-C reaches it once, through us, not also from the terminal.
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    passed_on: int | None = None
    try:
        while True:
            if stop.signal != passed_on and stop.signal is not None:
                passed_on = stop.signal
                process.send_signal(passed_on)
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # its second: it ends at once
        process.wait()
        raise


if __name__ == "__main__":
    run_cli(main, "train.compare")
