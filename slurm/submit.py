"""`python -m slurm.submit experiment=... cluster=...`: check a run, write its job, queue it.

Everything is checked here, on the login node, which needs neither a GPU nor torch. The job runs
the recipe as it is resolved now; recipes that change later do not reach it.
"""

import copy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from parallel.layout import Layout
from recipes.compose import load_recipe, run_cli, to_yaml
from recipes.errors import ConfigError, DataError
from recipes.rules import fail
from recipes.schema import Recipe
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
            "use python -m train.compare, or compare.precisions to train",
        )
    recipes = _arms(recipe) if recipe.compare.precisions else {"run": recipe}
    folder = Path(_comparison_folder(recipe) if len(recipes) > 1 else recipe.run.dir).resolve()
    layouts = [_check(r) for r in recipes.values()]
    number = 1 + max((int(p.name) for p in folder.glob("slurm/[0-9]*")), default=0)
    place = folder / "slurm" / str(number)
    runs = [Run(name, Path(r.run.dir).resolve(), place / name) for name, r in recipes.items()]
    nodes, per_node = shape(recipe.cluster, layouts[0])
    job = Job(
        name=f"strata-{folder.name}",
        folder=place,
        cluster=recipe.cluster,
        runs=runs,
        nodes=nodes,
        ranks_per_node=per_node,
        command=shlex.join(["python", "-m", "slurm.submit", *sys.argv[1:]]),
        working_folder=Path.cwd(),
        bad_nodes=bad_nodes(folder),
    )
    planned = f"{nodes} nodes x {per_node} ranks; {layouts[0]}"
    if recipe.dry_run:
        print(planned, file=sys.stderr)
        _say_what_is_missing(recipes)
        print(job_script(job), end="")
        return 0
    _check_ready(folder, recipes, recipe.cluster.dependency)
    _write(job, recipes)
    number_of_job = _queue(job, "job.sh")
    print(f"job {number_of_job}: {place}/job.sh\n{planned}")
    if len(runs) > 1:
        report = _queue_report(job, recipe, folder, number_of_job)
        print(f"job {report}: {place}/report.sh, after all {len(runs)} runs")
    where = runs[0].folder if len(runs) == 1 else f"{folder}/arms/..."
    print(f"python -m slurm.status run.dir={where}")
    return 0


def bad_nodes(folder: Path) -> list[str]:
    """Nodes an earlier job of this run found bad."""
    path = folder / "bad-nodes"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted({line.split("\t")[0] for line in lines if line})


def _arms(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each run of a comparison."""
    from train.compare import plan

    arms = plan(recipe, _without_dry_run(), Path(_comparison_folder(recipe)))
    found = {}
    for arm in arms:
        arguments = list(arm.arguments)
        config_dir = None
        if arguments[:1] == ["--config-dir"]:
            config_dir, arguments = arguments[1], arguments[2:]
        found[arm.name] = load_recipe(arguments, config_dir)
    return found


def _without_dry_run() -> list[str]:
    return [a for a in sys.argv[1:] if not a.startswith("dry_run=")]


def _comparison_folder(recipe: Recipe) -> str:
    """As train.compare chooses it."""
    given = any(a.startswith("run.dir=") for a in sys.argv[1:])
    return recipe.run.dir if given else f"runs/compare-{recipe.model.name}"


def _check(recipe: Recipe) -> Layout:
    """All that `python -m train` would check before it builds anything."""
    from model.validate import validate_recipe
    from train import rundir

    device = recipe.device
    if device == "auto":
        device = "cuda" if recipe.cluster.gpus_per_node else "host"
    layout = validate_recipe(recipe, launched_ranks(recipe.cluster), device)
    rundir.check(recipe)
    return layout


def _missing_data(recipe: Recipe) -> str | None:
    if recipe.data.prepare_if_missing:
        return None
    entries = [*recipe.data.train, *recipe.data.validation]
    files = [Path(f"{e.path}{end}").expanduser() for e in entries for end in (".bin", ".idx")]
    missing = [str(f) for f in files if not f.exists()]
    if not missing:
        return None
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{missing[0]}{more} of data={recipe.data.name} are not there; prepare them first"


def _say_what_is_missing(recipes: dict[str, Recipe]) -> None:
    """A dry run may be made where the data is not."""
    missing = _missing_data(next(iter(recipes.values())))
    if missing:
        print(f"would be refused now: {missing}", file=sys.stderr)
    if not client.available():
        print("would be refused now: there is no sbatch on this machine", file=sys.stderr)


def _check_ready(folder: Path, recipes: dict[str, Recipe], dependency: str | None) -> None:
    from train.optimizer import train_steps

    if not client.available():
        raise ConfigError(
            "there is no sbatch on this machine; submit where Slurm is, or use dry_run=true"
        )
    for recipe in recipes.values():
        if missing := _missing_data(recipe):
            raise DataError(missing)
    if len(recipes) == 1:
        complete = Path(next(iter(recipes.values())).run.dir) / "complete"
        steps = train_steps(next(iter(recipes.values())).stage)
        if complete.exists() and int(complete.read_text()) >= steps:
            raise ConfigError(
                f"run.dir={folder} is complete at step {complete.read_text().strip()}; give a "
                "larger stage.train_steps to extend it"
            )
    for job in submitted(folder):
        if client.queued(job) and dependency is None:
            raise ConfigError(
                f"job {job} of run.dir={folder} is not over; scancel {job}, or queue this one "
                f"after it with cluster.dependency=afterany:{job}"
            )


def submitted(folder: Path) -> list[str]:
    """Numbers of the jobs submitted for a run directory, oldest first."""
    files = sorted(folder.glob("slurm/[0-9]*/job-id"), key=lambda p: int(p.parent.name))
    return [file.read_text().strip() for file in files]


def _write(job: Job, recipes: dict[str, Recipe]) -> None:
    """Everything the job reads, and a clean slate for the chain."""
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
            for name in ("strikes", "stopped", "complete", "slurm/begun"):
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
        for folder in {job.folder, *(_submission(job, run) for run in job.runs)}:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job-id").write_text(number + "\n")
    return number


def _submission(job: Job, run: Run) -> Path:
    """Where a run of an array remembers its job."""
    return run.folder / "slurm" / job.folder.name


def _queue_report(job: Job, recipe: Recipe, folder: Path, array: str) -> str:
    runs = ",".join(str(run.folder) for run in job.runs)
    arguments = [f"compare.runs=[{runs}]", f"compare.budget={recipe.compare.budget}"]
    last = replace(job, name=f"{job.name}-report", runs=job.runs[:1])
    (job.folder / "report.sh").write_text(report_script(last, [*arguments, f"run.dir={folder}"]))
    # Not afterok: a run that a guard stopped is judged too, and the report names one that failed.
    return _queue(job, "report.sh", f"--dependency=afterany:{array}")


if __name__ == "__main__":
    run_cli(main, "slurm.submit")
