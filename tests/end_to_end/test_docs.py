"""Every command in the documentation works as it is written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.training import SMALL, sources

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("*/*.md"))]

ELSEWHERE = {
    "make demo": "tests/end_to_end/test_demo.py",
    "make test": "this is it",
    "python -m train.compare experiment=tiny compare.precisions=[bf16,nvfp4] compare.seeds=2 "
    "stage.train_steps=20": "tests/end_to_end/test_compare.py",
    "make cluster": "tests/cluster/test_docs.py",
    "make cluster-stop": "tests/cluster/test_docs.py",
    "python -m slurm.status run.dir=runs/two": "tests/cluster/test_docs.py",
    "python -m model.convert to_hf runs/mine exported": "tests/end_to_end/test_convert.py",
    "python -m model.convert to_hf runs/mine exported convert.quantize=nvfp4": (
        "tests/end_to_end/test_convert.py"
    ),
    "python -m train.calibrate runs/mine calibration.json --batches 32": (
        "tests/end_to_end/test_convert.py"
    ),
    "python -m model.convert to_hf runs/mine exported convert.quantize=nvfp4 "
    "convert.calibration=calibration.json": "tests/end_to_end/test_convert.py",
    "python -m model.convert from_hf exported imported": "tests/end_to_end/test_convert.py",
    "python -m train --config-dir imported/recipes experiment=tiny model=exported "
    "checkpoint.load=imported run.dir=runs/on": "tests/end_to_end/test_convert.py",
    "python -m model.merge runs/mine merged": "tests/end_to_end/test_convert.py",
    'python -m train.generate runs/mine --prompt "def f(" --prompt "import" --tokens 40': (
        "tests/end_to_end/test_convert.py"
    ),
    'python -m train.generate exported --prompt "def f(" --speculate 2': (
        "tests/end_to_end/test_convert.py"
    ),
    'python -m train experiment=tiny run.dir=runs/staged "stages.first.stage.train_steps=6" '
    '"stages.second={optimizer.lr_decay_style: constant, stage.train_steps: 4}"': (
        "tests/end_to_end/test_stages.py"
    ),
    "pip install -e '.[gpu]'": "needs a GPU; the names are checked in tests/unit/test_project.py",
}
"""Commands that are not run here, and why."""

LONG = ("python -m train ", "python -m train.compare ", "python -m data.prepare ")


def elsewhere(command: str) -> bool:
    """Whether another test runs it."""
    on_a_cluster = "runs/two" in command and "cluster=lab" in command
    return command in ELSEWHERE or "sensitivity" in command or on_a_cluster


def commands() -> list[Any]:
    """Those of a subsystem's page that work for a while are slow: it has tests of its own."""
    found: dict[str, Any] = {}
    for page in dict.fromkeys(PAGES):
        for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(shlex.split(line, comments=True, posix=False))
                if command.startswith(("python ", "make ", "pip ")) and not elsewhere(command):
                    long = page != PAGES[0] and command.startswith(LONG)
                    marks = [pytest.mark.slow] if long else []
                    found.setdefault(command, pytest.param(command, marks=marks))
    return list(found.values())


@pytest.mark.parametrize("command", commands())
def test_command(command: str, data: Path, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], f"{command}: say in ELSEWHERE where it is tested"
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "a.jsonl").write_text('{"text": "one document"}\n' * 3)
    (tmp_path / "my_recipes" / "experiment").mkdir(parents=True)
    (tmp_path / "my_recipes" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - tiny\n"
    )
    # The same commands on a model, a corpus and a number of steps that take seconds.
    small: list[str] = []
    if words[2] in ("train", "train.compare", "parallel.payload") and not {
        "--cfg",
        "--keys",
        "--help",
    } & set(words):
        chosen = {w.split("=")[0] for w in words}
        small = [o for o in SMALL if o.split("=")[0] not in chosen] + [sources(data)]
        steps = 8 if words[2] == "train.compare" else 2
        words = [re.sub(r"^stage.train_steps=.*", f"stage.train_steps={steps}", w) for w in words]
        words = [re.sub(r"^(stage.micro_batch_size)=([3-9]|\d\d+)$", r"\1=2", w) for w in words]
    elif words[2] == "data.prepare":
        small = [] if any(w.startswith("data.sources") for w in words) else [sources(tmp_path)]
    environment = os.environ | {"STRATA_DATA": str(data), "OMP_NUM_THREADS": "1"}
    if words[2] == "data.prepare":
        environment["STRATA_DATA"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *words[1:], *small],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout
