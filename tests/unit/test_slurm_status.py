"""What slurm.status says of run directories in every state, and the health check of a node."""

import argparse
import functools
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recipes.compose import load_recipe
from recipes.errors import ConfigError
from recipes.schema import Recipe, RunConfig
from slurm import client, health, submit
from slurm.status import duration, history, main, status

tiny = functools.cache(lambda: load_recipe(["experiment=tiny"]))
RUNNING = {"task": "7", "state": "RUNNING", "nodes": "n[1-2]", "left": "1:02", "reason": "None"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run at step 30 of 40, restarted once, where Slurm keeps no accounts."""
    monkeypatch.setattr(client, "available", lambda program="sbatch": program != "sacct")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "slurm").mkdir()
    stage = {"train_steps": None, "train_tokens": 4e4, "global_batch_size": 10}
    config = {"stage": stage | {"sequence_length": 100}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints/latest").write_text("iter_0000020\n")
    records = [
        {"step": i, "loss": 5 - i / 100, "tokens_per_second": 1234.5, "tokens": 1000 * i}
        for i in range(1, 31)
    ]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 31, "lo')  # being written
    event(tmp_path, "start", "start 1, strikes 0")
    return tmp_path


def event(folder: Path, name: str, reason: str, task: str = "7") -> None:
    entry = {"time": "2026-01-02 03:04:05", "job": "7", "task": task, "restart": 0}
    entry |= {"nodes": "n[1-2]", "latest": "none", "event": name, "reason": reason}
    with (folder / "slurm/chain.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def lines(folder: Path, queue: list[dict[str, str]]) -> dict[str, str]:
    return dict(status(folder, ["7"], queue))


def test_running(folder: Path) -> None:
    said = lines(folder, [RUNNING])
    assert said["state"] == "running: job 7 on n[1-2], 1:02 of the time limit left"
    assert said["step"] == "30 of 40 (75%)"
    assert said["loss"] == "4.7000"
    assert said["speed"] == "1,234 tokens/s"
    assert said["left"] == "8 s of training"  # 10,000 tokens
    assert said["checkpoint"] == "iter_0000020"
    assert said["strikes"].startswith("0 ")
    assert "bad nodes" not in said


def test_an_array_is_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm = folder / "all" / "arms" / "lr-0.1"
    arm.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(folder / name, arm)
    (arm / "complete").write_text("30\n")
    (folder / "all" / "arms" / "lr-0.2").mkdir()
    assert main(load_recipe(["experiment=tiny", f"run.dir={folder}/all"])) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "run step loss speed state".split(),
        "lr-0.1 30 of 40 (75%) 4.7000 1,234 tokens/s complete at step 30".split(),
        "lr-0.2 none yet not submitted to Slurm from this directory".split(),
    ]


def test_pending_says_why(folder: Path) -> None:
    pending = RUNNING | {"state": "PENDING", "nodes": "", "reason": "Resources"}
    assert lines(folder, [pending])["state"] == "pending: job 7 (Resources)"


@pytest.mark.parametrize(
    ("file", "text", "state"),
    [
        ("complete", "40\n", "complete at step 40"),
        ("stopped", "loss of step 31 was not finite\n", "stopped: loss of step 31"),
    ],
)
def test_ended_for_good(folder: Path, file: str, text: str, state: str) -> None:
    (folder / file).write_text(text)
    assert lines(folder, [])["state"].startswith(state)


def test_ended_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(folder, [])["state"].endswith("its script did not say why")
    event(folder, "end", "gave up after 3 failures")
    (folder / "strikes").write_text("3\n")
    (folder / "bad-nodes").write_text("n1\ttoo hot\nn2\tno disk\n")
    said = lines(folder, [])
    assert said["state"] == "ended: gave up after 3 failures"
    assert said["strikes"].startswith("3 ")
    assert said["bad nodes"] == "n1: too hot; n2: no disk"
    monkeypatch.setattr(client, "available", lambda program="sbatch": False)
    assert "no squeue on this machine" in lines(folder, [])["state"]


def test_time_left_knows_the_lengths_that_come(folder: Path) -> None:
    """The second stage has ten times the tokens a step."""
    config = asdict(tiny())
    config["stage"] |= {"global_batch_size": 10, "sequence_length": 100}
    short = {"stage.train_tokens": None, "stage.train_steps": 30}
    config["stages"] = {"a": short, "b": short | {"stage.sequence_length": 1000}}
    (folder / "config.json").write_text(json.dumps(config))
    said = lines(folder, [RUNNING])
    assert said["step"] == "30 of 60 (50%)"
    assert said["left"] == "4 min 3 s of training"  # 300,000 tokens at 1234.5 a second


def test_damaged_files_do_not_hide_the_rest(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"ss\n\xff\0\0\n[1]\n")
    (folder / "strikes").write_text("\0")
    with (folder / "slurm/chain.jsonl").open("a") as file:
        file.write('{"time": "2026-\n')
    said = lines(folder, [RUNNING])
    assert said["step"].startswith("30 of 40") and said["strikes"].startswith("0 ")


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Commands of Slurm that say this."""
    monkeypatch.undo()
    (folder / "bin").mkdir()
    for name, text in commands.items():
        tool = folder / "bin" / name
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    (folder / "slurm/1").mkdir()
    (folder / "slurm/1/job-id").write_text("7\n")
    (folder / "slurm/1.old").mkdir()  # what a user has put beside it


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(Recipe(run=RunConfig(dir=str(folder)))) == 0
    lines = capsys.readouterr().out.splitlines()
    return next(line.removeprefix("state").strip() for line in lines if line.startswith("state"))


def test_a_silent_controller_is_no_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    down = "echo 'Unable to contact slurm controller' >&2; exit 1"
    slurm(folder, monkeypatch, squeue=down, sbatch="")
    assert said(folder, capsys).startswith("unknown: squeue cannot say whether job 7 is over: Una")
    recipe = replace(tiny(), run=RunConfig(dir=str(folder)))
    with pytest.raises(ConfigError, match="cannot say whether job 7 is over"):
        submit._check_ready(folder, {"run": recipe}, None)
    monkeypatch.setattr(client, "_PATIENCE", 0.1)
    (folder / "bin/squeue").write_text("#!/bin/sh\nexec sleep 9\n")
    assert said(folder, capsys) == (
        "unknown: squeue has not answered for 0.1 seconds; try again later"
    )


def test_accounting_says_what_the_script_could_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    event(folder, "end", "cancelled", task="6")  # an earlier job, which says nothing of this one
    slurm(folder, monkeypatch, squeue=gone, sacct="echo 'CANCELLED by 1000'")
    (folder / "slurm/1/job-id").write_text("8\n")
    assert said(folder, capsys).startswith("ended: job 8 is CANCELLED by 1000 by sacct")


def test_only_the_job_it_waits_for_may_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(folder, monkeypatch, squeue="echo '7|RUNNING|n1|1:00|None'", sbatch="")
    recipe = replace(tiny(), run=RunConfig(dir=str(folder)))
    for dependency in ("afterany:7", "afterok:5:7", "singleton"):
        assert submit._check_ready(folder, {"run": recipe}, dependency)
    for other in (None, "afterok:77", "afterany:5"):
        with pytest.raises(ConfigError, match="job 7 of run.dir=.* is not over"):
            submit._check_ready(folder, {"run": recipe}, other)


def test_history(folder: Path) -> None:
    event(folder, "requeue", "time limit")
    events = [json.loads(x) for x in (folder / "slurm/chain.jsonl").read_text().splitlines()]
    assert history(events).splitlines()[-1].endswith("requeue: time limit")


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    pending = RUNNING | {"state": "PENDING", "nodes": "", "reason": "Priority"}
    said = lines(tmp_path, [pending])
    assert (said["step"], said["checkpoint"]) == ("none yet", "none yet")


def test_durations() -> None:
    wanted = {40: "40 s", 61: "1 min 1 s", 7500: "2 h 5 min", 273_600: "3 d 4 h"}
    assert {s: duration(s) for s in wanted} == wanted


def limits(folder: Path, behind: float = 0, **changes: Any) -> argparse.Namespace:
    values = {
        "disk": [folder],
        "gpus": 0,
        "time": time.time() - behind,
        "timeout_seconds": 120,
        "min_free_disk_gb": 0,
        "min_free_memory_gb": 0,
        "max_clock_skew_seconds": 10,
        "max_gpu_temperature": 85,
        "max_gpu_memory_used_mb": 2000,
    }
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"min_free_disk_gb": 1e9}, ["less than 1e+09"]),
        ({"disk": ["/no/such/folder"]}, ["No such file"]),
        ({"min_free_memory_gb": 1e9}, ["memory free"]),
        ({"behind": 3600}, ["clock differs by 36"]),
        ({"behind": -60}, ["clock differs by -60"]),
        ({"behind": 100}, []),  # a container that was imported first
        ({"gpus": 8}, ["nvidia-smi"]),
    ],
)
def test_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(health.problems(limits(tmp_path, **changes)))
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found, strict=True))


def test_health_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four things nvidia-smi can say against a GPU, and what is fine."""
    rows = ["0, 60, 12, 0, Not Active", "1, 91, 12, [N/A], Not Active", "2, 60, 40000, 0, Active"]
    rows += ["3, 60, 12, 5, Not Active", "4, [Unknown Error], 12, [N/A], Not Active"]
    rows += ["5, 60, [GPU requires reset], 0, Not Active", "No devices were found"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = list(health.problems(limits(tmp_path, gpus=8)))
    assert found == [
        "7 GPUs instead of 8",
        "GPU 1 has 91 C, more than 85",
        "GPU 2 has 40000 MiB in use by somebody else",
        "GPU 2 runs below its clock (hardware slowdown)",
        "GPU 3 has 5 uncorrected memory errors",
        "nvidia-smi says of GPU 4: [Unknown Error]",
        "nvidia-smi says of GPU 5: [GPU requires reset]",
        "nvidia-smi says of GPU No devices were found: No devices were found",
    ]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert list(health.problems(limits(tmp_path, gpus=8))) == ["nvidia-smi: exit code 9"]
