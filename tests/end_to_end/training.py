"""Runs `python -m train` as a user does, on a model and a data set that take seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = (
    "experiment=tiny",
    "model.hybrid_layer_pattern=ME*E/*E/*E",
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.num_moe_experts=8",
    "data.tokenizer.train_vocab_size=512",
    "stage.sequence_length=64",
    "stage.global_batch_size=4",
    "stage.micro_batch_size=2",
    "stage.eval_steps=2",
    "stage.eval_interval=null",
    "checkpoint.save_interval=null",
    "logging.progress=false",
    "logging.log_params_hash=true",
)
"""Every architectural part, two micro batches a step."""

STEPS = 12
"""Length of the run most tests compare with."""


def sources(folder: Path) -> str:
    """Override of data.sources: a little source code, no download."""
    entries = [
        f"{{output: {folder}/code/{split}, dataset: code, packages: [{package}], "
        f"max_megabytes: {size}}}"
        for split, package, size in (("train", "numpy", 0.4), ("validation", "mpmath", 0.1))
    ]
    return f"data.sources=[{', '.join(entries)}]"


@dataclass
class Command:
    """`python -m MODULE OVERRIDES` with the environment of a user's shell."""

    overrides: Sequence[str]
    data: Path
    module: str = "train"

    launcher: Sequence[str] = (sys.executable,)
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
        """Start it in the background."""
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"STRATA_DATA": str(self.data), "OMP_NUM_THREADS": "1", **self.environment}
        return subprocess.Popen(
            [*self.launcher, "-m", self.module, *self.overrides],
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(self, code: int = 0, timeout: float = 200) -> str:
        """Run it to the end, expect an exit code, return what it printed."""
        process = self.start()
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{output}"
        return output

    def refused(self, timeout: float = 200) -> str:
        """Run it, expect a user error, return its one line."""
        process = self.start(stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=timeout)
        assert process.returncode == 2, f"exit code {process.returncode}:\n{output}{errors}"
        assert "Traceback" not in output + errors
        assert errors.count("\n") == 1 and "Error: " in errors, errors
        return errors


def train(data: Path, run: Path, *overrides: str) -> Command:
    """The command that trains STEPS steps in `run`, unless an override says how long."""
    steps = () if any("train_steps" in o for o in overrides) else (f"stage.train_steps={STEPS}",)
    return Command([*SMALL, sources(data), f"run.dir={run}", *steps, *overrides], data)


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics a run has written so far, whole lines only."""
    path = run / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for_step(
    process: subprocess.Popen[str], run: Path, step: int, seconds: float = 120
) -> None:
    """Wait until a running command has reported a step."""
    deadline = time.monotonic() + seconds
    while not any(r["step"] >= step for r in records(run)):
        assert process.poll() is None, f"ended before step {step}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no step {step} in {seconds} s"
        time.sleep(0.02)


def end_with(process: subprocess.Popen[str], number: signal.Signals, code: int) -> str:
    """Send a signal, wait, expect an exit code, return what was printed."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{output}"
    return output


def essence(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be equal bit for bit between runs that are the same: all but time and memory."""
    speed = ("seconds", "wire_seconds", "tokens_per_second", "model_flops_per_second")
    measured = (*speed, "memory_gib")
    # Validated at other steps if the run was interrupted; training must not notice.
    left_out = (*measured, "validation_loss")
    return [{k: v for k, v in r.items() if k not in left_out} for r in records]


def tree(*folders: Path) -> dict[str, bytes | None]:
    """Every file below the folders with its content, every folder with None."""
    paths = [p for folder in folders for p in sorted(folder.rglob("*"))]
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}
