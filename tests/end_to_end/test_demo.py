"""`make demo` as a newcomer runs it, but for the set-up."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_learns_more_than_token_frequencies(tmp_path: Path) -> None:
    overrides = ["experiment=tiny", "stage.train_steps=160", "run.dir=runs/demo"]
    overrides += ["logging.progress=false"]
    done = subprocess.run(
        [sys.executable, "-m", "train.demo", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    unigram = float(re.search(r"unigram model.* (\d+\.\d+) ", done.stdout)[1])  # type: ignore[index]
    held_out = float(re.search(r"held-out text at step 160 +(\d+\.\d+)", done.stdout)[1])  # type: ignore[index]
    assert held_out < unigram - 1.0
    assert "the same command goes on from there" in done.stdout
    assert (tmp_path / "runs/demo/plots/curves.png").stat().st_size > 0
    report = json.loads((tmp_path / "runs/demo-compared/report.json").read_text())
    assert report["passed"], done.stdout
    assert list((tmp_path / "runs/demo-compared/plots").glob("*.png"))
