"""`python -m slurm.submit experiment=... cluster=...`: check a run, write its job, queue it.

Everything is checked here, on the login node, which needs neither a GPU nor torch. The job runs
the recipe as it is resolved now; recipes that change later do not reach it.
"""

import copy
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from parallel.layout import Layout
from recipes.compose import (
    MULTIRUN,
    load_recipe,
    points,
    quoted,
    run_cli,
    split_arguments,
    to_yaml,
)
from recipes.errors import ConfigError, DataError
from recipes.rules import fail
from recipes.schema import Recipe
from recipes.stages import spans
from slurm import client
from slurm.job import Job, Run, launched_ranks, shape
from slurm.render import job_script, report_script
from slurm.validate import validate_cluster


def main(recipe: Recipe) -> int:
    """Check, render and queue; with dry_run only print.

    Returns:
        0: queued, or printed.

    Raises:
        ConfigError: a recipe, layout or cluster that cannot run, or a run that is queued already.
        DataError: the data is not there.
    """
    validate_cluster(recipe.cluster)
    if recipe.compare.runs:
        fail(
            "compare.runs",
            recipe.compare.runs,
            "are finished and need no job",
            "use python -m train.compare, or compare.precisions or compare.models to train",
        )
    recipes, folder = _runs(recipe)
    layouts = [_check(r) for r in recipes.values()]
    for r in recipes.values():
        _check_folder(r.run.dir)
    number = 1 + max((int(p.name) for p in submissions(folder)), default=0)
    place = folder / "slurm" / str(number)
    runs = [
        Run(name, Path(r.run.dir).resolve(), place / name, spans(r)[-1].end)
        for name, r in recipes.items()
    ]
    nodes, per_node = _one_shape(recipes, layouts)
    job = Job(
        name=f"strata-{re.sub(r'[^\w.+-]+', '-', folder.name, flags=re.ASCII)}",
        folder=place,
        cluster=recipe.cluster,
        runs=runs,
        nodes=nodes,
        ranks_per_node=per_node,
        command=shlex.join(["python", "-m", "slurm.submit", *sys.argv[1:]]),
        working_folder=Path.cwd(),
        bad_nodes=bad_nodes(folder, *(run.folder for run in runs)),
    )
    planned = f"{nodes} nodes x {per_node} ranks; {layouts[0]}"
    if recipe.stages:
        planned = "\n".join(stages(recipe))
    if recipe.dry_run:
        print(planned, file=sys.stderr)
        _say_what_is_missing(recipes)
        print(job_script(job), end="")
        return 0
    waits = _check_ready(folder, recipes, recipe.cluster.dependency)
    _write(job, recipes, clean=not waits)
    number_of_job = _queue(job, "job.sh")
    print(f"job {number_of_job}: {place}/job.sh\n{planned}")
    if _compared(recipe):
        report = _queue_report(job, recipe, folder, number_of_job)
        print(f"job {report}: {place}/report.sh, after all {len(runs)} runs")
    print(f"python -m slurm.status run.dir={folder}")
    return 0


def bad_nodes(*folders: Path) -> list[str]:
    """Nodes an earlier job of these runs found bad."""
    files = [folder / "bad-nodes" for folder in folders]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return sorted({line.split()[0] for line in lines if line.strip()})


def _check_folder(run_dir: str) -> None:
    if re.search(r"[\\\x00-\x1f\x7f]", str(Path(run_dir).resolve())):
        fail(
            "run.dir",
            repr(run_dir),
            "has a backslash or a control character, which Slurm does not take in a path",
            "choose another folder",
        )


def _runs(recipe: Recipe) -> tuple[dict[str, Recipe], Path]:
    """Name -> recipe of every run of the job, and the folder of them all."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("dry_run=")]
    if not set(MULTIRUN) & set(arguments):
        if _compared(recipe):
            folder = Path(_comparison_folder(recipe)).resolve()
            return _arms(recipe, arguments, folder), folder
        return {"run": recipe}, Path(recipe.run.dir).resolve()
    if compared := _compared(recipe):
        fail(*compared, "is an array by itself", "leave out -m")
    folder = Path(recipe.run.dir).resolve()
    overrides, config_dir = split_arguments([a for a in arguments if a not in MULTIRUN])
    found = points(overrides)
    if list(found) == [""]:
        raise ConfigError("--multirun and no key with several values; write KEY=A,B")
    if any(o.startswith("run.dir=") and "," in o for o in overrides):
        raise ConfigError(
            "run.dir is one folder for the whole sweep; leave several values to others"
        )
    return {
        name: load_recipe([*point, f"run.dir={quoted(f'{folder}/arms/{name}')}"], config_dir)
        for name, point in found.items()
    }, folder


def _compared(recipe: Recipe) -> tuple[str, list[str]] | None:
    """Key and value of the arms that train.compare would train; None: a single run."""
    for key in ("precisions", "models"):
        if values := getattr(recipe.compare, key):
            return f"compare.{key}", values
    return None


def _arms(recipe: Recipe, arguments: list[str], folder: Path) -> dict[str, Recipe]:
    """A recipe for each run of a comparison."""
    from train.compare import plan

    found = {}
    for arm in plan(recipe, arguments, folder):
        overrides, config_dir = split_arguments(arm.arguments)
        found[arm.name] = load_recipe(overrides, config_dir)
    return found


def _one_shape(recipes: dict[str, Recipe], layouts: list[Layout]) -> tuple[int, int]:
    """Nodes, and ranks of a node, which all runs of an array have in common."""
    cluster = next(iter(recipes.values())).cluster
    shapes = {name: shape(cluster, x) for name, x in zip(recipes, layouts, strict=True)}
    first, *others = shapes.items()
    for name, (nodes, ranks) in others:
        if (nodes, ranks) != first[1]:
            raise ConfigError(
                f"run {first[0]} takes {first[1][0]} nodes x {first[1][1]} ranks and run {name} "
                f"{nodes} x {ranks}; the runs of an array have one size: submit them by size"
            )
    return first[1]


def _comparison_folder(recipe: Recipe) -> str:
    """As train.compare chooses it."""
    given = any(a.startswith("run.dir=") for a in sys.argv[1:])
    return recipe.run.dir if given else f"runs/compare-{recipe.model.name}"


def _check(recipe: Recipe) -> Layout:
    """All that `python -m train` would check before it builds anything."""
    from model.validate import validate_recipe, validate_stages
    from train import rundir
    from train.stages import here

    device = recipe.device
    if device == "auto":
        device = "cuda" if recipe.cluster.gpus_per_node else "host"
    validate_stages(recipe, device)
    now = here(recipe).span.recipe
    layout = validate_recipe(now, launched_ranks(recipe.cluster), device)
    rundir.check(recipe)
    return layout


def stages(recipe: Recipe) -> Iterator[str]:
    """A line for each stage of a recipe: its nodes, and where the job ends for want of others."""
    from model.validate import validate_stages
    from train.stages import here

    now = here(recipe).index
    if recipe.cluster.nodes is not None:  # whatever fits them
        names = ", ".join(recipe.stages)
        yield f"{recipe.cluster.nodes} nodes for the stages {names}"
        return
    wanted = [(span, shape(recipe.cluster, layout)) for span, layout in validate_stages(recipe)]
    fits = True
    for i, (span, (nodes, per_node)) in enumerate(wanted):
        fits = fits and (i <= now or (nodes, per_node) == wanted[now][1])
        state = "done" if i < now else "in this job" if fits else "submit again for it"
        yield f"stage {span.name}: {nodes} nodes x {per_node} ranks, {span.steps} steps: {state}"


def _missing_data(recipe: Recipe) -> str | None:
    if recipe.data.prepare_if_missing:
        return None
    mixed = [entry for length in recipe.stage.mix for entry in length.train]
    entries = [*recipe.data.train, *recipe.data.validation, *mixed]
    files = [Path(f"{e.path}{end}").expanduser() for e in entries for end in (".bin", ".idx")]
    missing = [str(f) for f in files if not f.exists()]
    if not missing:
        return None
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{missing[0]}{more} of data={recipe.data.name} are not there; prepare them first"


def _now(recipe: Recipe) -> Recipe:
    """The recipe of the stage the job begins with."""
    from train.stages import here

    return here(recipe).span.recipe


def _say_what_is_missing(recipes: dict[str, Recipe]) -> None:
    """A dry run may be made where the data is not."""
    missing = _missing_data(_now(next(iter(recipes.values()))))
    if missing:
        print(f"would be refused now: {missing}", file=sys.stderr)
    if not client.available():
        print("would be refused now: there is no sbatch on this machine", file=sys.stderr)


def _check_ready(folder: Path, recipes: dict[str, Recipe], dependency: str | None) -> bool:
    """Whether the job waits for an earlier one of this run."""
    if not client.available():
        raise ConfigError(
            "there is no sbatch on this machine; submit where Slurm is, or use dry_run=true"
        )
    for recipe in recipes.values():
        if missing := _missing_data(_now(recipe)):
            raise DataError(missing)
    if len(recipes) == 1:
        complete = Path(next(iter(recipes.values())).run.dir) / "complete"
        steps = spans(next(iter(recipes.values())))[-1].end
        done = complete.read_text().strip() if complete.exists() else ""
        if done.isdecimal() and int(done) >= steps:
            raise ConfigError(
                f"run.dir={folder} is complete at step {done}; give a "
                "larger stage.train_steps to extend it"
            )
    jobs = submitted(folder)
    for recipe in recipes.values():  # a run of an array may have been submitted alone
        jobs += [j for j in submitted(Path(recipe.run.dir)) if j.split("_")[0] not in jobs]
    waiting = [job for job in jobs if client.queued(job)]
    named = set(re.findall(r"\d+|singleton", dependency or ""))
    for job in waiting:
        if not {job.split("_")[0], "singleton"} & named:
            raise ConfigError(
                f"job {job} of run.dir={folder} is not over; scancel {job}, or queue this one "
                f"after it with cluster.dependency=afterany:{job}"
            )
    return bool(waiting)


def submissions(folder: Path) -> list[Path]:
    """Folders of the submissions of a run, oldest first."""
    found = [path for path in folder.glob("slurm/[0-9]*") if re.fullmatch("[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name))


def submitted(folder: Path) -> list[str]:
    """Numbers of the jobs submitted for a run directory, oldest first."""
    files = [path / "job-id" for path in submissions(folder)]
    return [text for file in files if file.exists() and (text := file.read_text().strip())]


def _write(job: Job, recipes: dict[str, Recipe], clean: bool) -> None:
    """Everything the job reads; with `clean`, a clean slate for the chain: no other job has it."""
    from train.rundir import usable

    with usable(job.folder):
        job.folder.mkdir(parents=True)
        for run in job.runs:
            resolved = copy.deepcopy(recipes[run.name])
            resolved.run.dir = str(run.folder)
            resolved.logging.progress = False  # a bar makes one endless line of a log
            (run.recipe / "experiment").mkdir(parents=True)
            (run.recipe / "experiment" / "submitted.yaml").write_text(
                "# @package _global_\n# Every key of the run, as it was resolved.\n"
                + to_yaml(resolved)
            )
            run.folder.mkdir(parents=True, exist_ok=True)
            # What ended the chain before is the user's to judge, and he has.
            for name in ("strikes", "stopped", "complete", "waiting", "slurm/begun") * clean:
                (run.folder / name).unlink(missing_ok=True)
        (job.folder / "job.sh").write_text(job_script(job))


def _queue(job: Job, script: str, *options: str) -> str:
    try:
        number = client.submit(job.folder / script, *options)
    except ConfigError:
        if script == "job.sh":
            shutil.rmtree(job.folder)
        raise
    if script == "job.sh":
        (job.folder / "job-id").write_text(number + "\n")
        for index, run in enumerate(job.runs if len(job.runs) > 1 else []):
            own = run.folder / "slurm" / job.folder.name  # what a run of an array remembers
            own.mkdir(parents=True, exist_ok=True)
            (own / "job-id").write_text(f"{number}_{index}\n")
    return number


def _queue_report(job: Job, recipe: Recipe, folder: Path, array: str) -> str:
    runs = ",".join(quoted(str(run.folder)) for run in job.runs)
    arguments = [
        f"compare.runs=[{runs}]",
        f"compare.budget={recipe.compare.budget}",
        f"run.dir={quoted(str(folder))}",
    ]
    last = replace(job, name=f"{job.name}-report", runs=job.runs[:1])
    (job.folder / "report.sh").write_text(report_script(last, arguments))
    # Not afterok: a run that a guard stopped is judged too, and the report names one that failed.
    try:
        return _queue(job, "report.sh", f"--dependency=afterany:{array}")
    except ConfigError as error:
        command = shlex.join(["python", "-m", "train.compare", *arguments])
        raise ConfigError(
            f"the runs are queued as job {array}, but not their report: {error}; or run, when "
            f"they have ended: {command}"
        ) from error


if __name__ == "__main__":
    run_cli(main, "slurm.submit", sweeps=True, all_stages=True)
