"""What a job script does at every end, run by bash against a Slurm that only takes notes."""

import functools
import json
import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from recipes.compose import load_recipe
from recipes.schema import ContainerConfig, HealthConfig
from slurm.job import Job, Run
from slurm.render import job_script, report_script

TOOLS = {
    "scontrol": """echo "$*" >>"$NOTES/scontrol"
case "$1 $2" in
"show hostnames") echo n1 ;;
"show job") echo "JobId=7 JobState=$STATE Reason=$REASON Restarts=$STARTS" ;;
esac
""",
    "srun": """printf '%s\\0' "$@" >"$NOTES/srun"
eval "${RANKS:-exit 1}"
""",
    "sleep": "",
}


@dataclass
class Machine:
    """A folder with a run, and commands of Slurm that write down what they are asked."""

    folder: Path
    job: Job
    code: int = 0

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.job.runs[0].folder

    def start(self, **environment: str) -> str:
        """Run the script once; how the chain says it ended."""
        path = f"{self.folder}/bin:/usr/bin:/bin"
        slurm = {"STATE": "RUNNING", "REASON": "None", "STARTS": "0"}
        own = slurm | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "NOTES": str(self.folder)}
        done = subprocess.run(
            ["bash", "-c", job_script(self.job)],
            env={"PATH": path, **own, "RUN": str(self.run), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.code = done.returncode
        chain = self.run / "slurm" / "chain.jsonl"
        if not chain.exists():
            return done.stdout
        last = json.loads(chain.read_text().splitlines()[-1])
        return f"{last['event']}: {last['reason']}"

    def asked(self, command: str) -> list[str]:
        """What scontrol was told of one kind."""
        lines = (self.folder / "scontrol").read_text().splitlines()
        return [line for line in lines if line.startswith(command)]


lab = functools.cache(lambda: load_recipe(["experiment=tiny", "cluster=lab"]).cluster)


def machine(folder: Path, run: str = "run", runs: int = 1, **changes: Any) -> Machine:
    """Without a health check, and with changes of the cluster."""
    (folder / "bin").mkdir()
    for name, text in TOOLS.items():
        tool = folder / "bin" / name
        tool.write_text(f"#!/bin/bash\n{text}")
        tool.chmod(0o755)
    where = folder / run
    made = [Run(f"r{i}", where, where / "slurm" / "1" / f"r{i}", 30) for i in range(runs)]
    for one in made:
        one.recipe.mkdir(parents=True)
    cluster = replace(lab(), **{"health": HealthConfig(enabled=False)} | changes)
    place = where / "slurm" / "1"
    return Machine(folder, Job("strata", place, cluster, made, 1, 2, "submit", folder, "python"))


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return machine(tmp_path)


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """The last task has the number of the whole array: by it Slurm would requeue all."""
    array = machine(tmp_path, runs=2)
    said = array.start(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert said.startswith("requeue: the ranks ended with exit code 1")
    assert array.asked("requeue") == ["requeue 7_1"]
    assert array.asked("update") == ["update JobId=7_1 StartTime=now"]
    assert set(array.asked("show job")) == {"show job 7_1 -o"}


@pytest.mark.parametrize(
    ("begun", "count", "after"), [("none", "2 x", 1), ("", "1", 2), ("iter_1", "2", 0)]
)
def test_damaged_counts_do_not_end_or_prolong_a_chain(
    here: Machine, begun: str, count: str, after: int
) -> None:
    (here.run / "strikes").write_text(count)
    ranks = f"printf '{begun}' >\"$RUN/slurm/begun\"; exit 1"
    assert here.start(RANKS=ranks).startswith("requeue: the ranks ended")
    assert (here.run / "strikes").read_text() == f"{after}\n"


@pytest.mark.parametrize("name", ["strikes", "slurm/begun"])
def test_what_cannot_be_counted_ends(here: Machine, name: str) -> None:
    (here.run / name).mkdir()  # as little a file as one on a full disk
    assert "cannot be written" in here.start() and here.code == 1


def test_reasons_of_any_text_are_json(here: Machine) -> None:
    text = 'loss of "a\\b"\n\tis läuft {x}'
    ranks = f'printf %s {shlex.quote(text)} >"$RUN/stopped"'
    assert here.start(RANKS=ranks) == 'end: stopped: loss of "a\\b"  is läuft {x}'
    assert here.code == 4


@pytest.mark.parametrize(
    ("slurm", "said", "requeues"),
    [
        ({"STATE": "COMPLETING"}, "end: cancelled", 0),  # scancel, while the ranks were ending
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, "requeue: the ranks ended", 1),
        ({"STATE": "COMPLETING", "STARTS": "1"}, "requeue: preempted, or", 0),
        ({}, "requeue: the ranks ended", 1),
    ],
)
def test_slurm_has_decided_before_the_script(
    here: Machine, slurm: dict[str, str], said: str, requeues: int
) -> None:
    assert here.start(**slurm).startswith(said)
    assert len(here.asked("requeue")) == requeues


def test_a_controller_that_is_away_for_a_while(here: Machine) -> None:
    tool = here.folder / "bin" / "scontrol"
    away = '[ "$1" = requeue ] && [ "$(grep -c ^requeue "$NOTES/scontrol")" -lt 3 ] && exit 1'
    tool.write_text(tool.read_text() + away + "\nexit 0\n")
    assert here.start().startswith("requeue: ") and here.code == 0
    assert len(here.asked("requeue")) == 3 and len(here.asked("update")) == 1


def test_a_longer_run_goes_on_after_a_shorter_one(here: Machine) -> None:
    """An extension that was queued behind the run it extends."""
    (here.run / "complete").write_text("20\n")
    ranks = 'echo 30 >"$RUN/complete"'
    assert here.start(RANKS=ranks) == "end: complete at step 30"
    assert (here.folder / "srun").exists()


def test_nodes_are_left_out_and_taken_back(tmp_path: Path) -> None:
    run = machine(tmp_path, sbatch=["--exclude=a[1,2]", "--constraint=ib"])
    bad = run.run / "bad-nodes"
    bad.write_text("n3\ttoo hot\nn2 by hand\n\nn3\tagain\n")
    script = job_script(replace(run.job, bad_nodes=["n2", "n3"]))
    assert "#SBATCH --exclude='a[1,2],n2,n3'\n" in script and script.count("--exclude") == 1
    assert "#SBATCH --constraint=ib\n" in script
    run.start()
    bad.write_text("")
    run.start()
    assert [x.split("StartTime=now ")[1] for x in run.asked("update")] == [
        "ExcNodeList=a[1,2],n2,n3",
        "ExcNodeList=a[1,2]",
    ]


def test_a_run_directory_that_was_moved(here: Machine) -> None:
    here.run.rename(here.folder / "elsewhere")
    assert "was moved or deleted" in here.start()
    assert here.code == 2 and not here.run.exists()


ODD = "my run's läuft 5%t $HOME `id` a=b,[c]{d}\"e"


def test_odd_names_arrive_as_they_are(tmp_path: Path) -> None:
    """In the options of sbatch, in those of srun, and in the recipe that is found."""
    odd = machine(tmp_path, ODD, account="my team")
    recipe = odd.job.runs[0].recipe
    (recipe / "experiment").mkdir()
    (recipe / "experiment" / "submitted.yaml").write_text("# @package _global_\nrun: {seed: 77}\n")
    text = job_script(replace(odd.job, command="submit x='a\nrm -rf /tmp/no\n#SBATCH --wait'"))
    head = [line for line in text.split("set -u")[0].splitlines() if line]
    assert all(line.startswith("#") for line in head) and "#SBATCH --wait" not in head
    given = [shlex.split(line)[1] for line in head if line.startswith("#SBATCH") and "=" in line]
    options = dict(option.split("=", 1) for option in given)
    assert options["--account"] == "my team"
    assert options["--output"].replace("%%", "%") == f"{odd.run}/slurm/1/job-%j.log"
    odd.start()
    arguments = (tmp_path / "srun").read_text().split("\0")
    assert f"--output={str(odd.run).replace('%', '%%')}/logs/rank%t.log" in arguments
    found = arguments[arguments.index("--config-dir") + 1]
    assert found == str(recipe)
    assert load_recipe(["experiment=submitted"], found).run.seed == 77


def test_a_report_is_no_rank(tmp_path: Path) -> None:
    """It runs beside the container, whose Python is not there."""
    image = ContainerConfig(runtime="pyxis", image="/i.sqsh")
    made = machine(tmp_path, container=image, python="/in/side").job
    assert "\nexec python -m train.compare 'a b'\n" in report_script(made, ["a b"])


def test_the_resilient_launcher_is_that_of_the_python(tmp_path: Path) -> None:
    made = machine(tmp_path, launcher="ft", gpus_per_numa_node=2).job
    script = job_script(made)
    assert '"$python" -m nvidia_resiliency_ext.fault_tolerance.launcher' in script
    assert "NVRX_GPUS_PER_NUMA=2;" in script
