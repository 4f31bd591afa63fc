"""The walk through of slurm/README.md, as it is written, from no cluster to none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import Submission
from tests.cluster.lab import FOLDER, Lab, running
from tests.end_to_end.training import SMALL, sources

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """The lines of the first block after the heading."""
    page = (ROOT / "slurm" / "README.md").read_text()
    block = re.search(r"## From zero to a two-node run.*?```sh\n(.*?)```", page, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def test_from_zero_to_a_two_node_run(data: Path, tmp_path: Path) -> None:
    assert not running(FOLDER), "a lab is running already; `make cluster-stop` ends it"
    environment = os.environ | {"STRATA_DATA": str(data), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    kept = ("experiment=", "stage.micro_batch_size=", "stage.global_batch_size=")
    small = [o for o in SMALL if not o.startswith(kept)]
    said: dict[str, str] = {}
    try:
        for line in commands():
            words = line.split()
            if words[0] == "export":
                environment |= dict([words[1].split("=", 1)])
                continue
            if words[0] == "make":  # in this environment, which is not installed anew
                venv = str(Path(sys.executable).parents[1])
                command = ["make", "-C", str(ROOT), f"VENV={venv}", "-o", f"{venv}/.installed"]
                command += words[1:]
            else:
                command = [sys.executable, *words[1:]]
                # The same on a model and a corpus that take seconds.
                command += [*small, sources(data)] if "slurm.submit" in words else []
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            said[line] = done.stdout
            if "slurm.submit" in words:
                submission = Submission(Lab(FOLDER), data, tmp_path / "runs" / "two")
                assert submission.wait_for_end() == "complete at step 20"
                assert submission.events()[-1]["nodes"] == "n[1-2]"
    finally:
        if running(FOLDER):
            Lab(FOLDER).stop()
    assert any("complete at step 20" in text for text in said.values())
    assert not running(FOLDER)
