"""Submits real jobs of a tiny training, as a user does, and watches them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recipes.compose import quoted
from tests.cluster.lab import Lab
from tests.end_to_end.training import SMALL, Command, essence, records, sources

STEPS = 30
SHAPE = (
    "parallel.data_parallel_size=4",
    "stage.micro_batch_size=1",
    "stage.global_batch_size=8",
    f"stage.train_steps={STEPS}",
    "checkpoint.save_interval=5",
)
"""Two nodes of two ranks in the lab, two micro batches a step."""


def trained(run: Path) -> list[dict[str, Any]]:
    """What must be equal bit for bit between runs that are the same, however often they started:
    the first step of a start also sends what sets the groups up."""
    return [{k: v for k, v in r.items() if k != "wire"} for r in essence(records(run))]


@dataclass
class Submission:
    """A run directory and the jobs that train in it."""

    lab: Lab
    data: Path
    run: Path

    def command(self, *overrides: str, module: str = "slurm.submit") -> Command:
        """The command line of a user."""
        here = [*SMALL, sources(self.data), "cluster=lab", self._folder, *SHAPE]
        return Command([*here, *overrides], self.data, module, environment=self.lab.environment())

    @property
    def _folder(self) -> str:
        return f"run.dir={quoted(str(self.run))}"

    def submit(self, *overrides: str) -> str:
        """Queue it; the number of the job."""
        output = self.command(*overrides).run()
        job = next(line for line in output.splitlines() if line.startswith("job "))
        return job.split()[1].rstrip(":")

    def status(self) -> str:
        """What slurm.status prints."""
        return Command(
            [self._folder],
            self.data,
            "slurm.status",
            environment=self.lab.environment(),
        ).run()

    def events(self) -> list[dict[str, Any]]:
        """The chain's history."""
        path = self.run / "slurm" / "chain.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def reasons(self, event: str) -> list[str]:
        """Why things of one kind happened: requeue, end, lost."""
        return [e["reason"] for e in self.events() if e["event"] == event]

    def wait_for_step(self, step: int, starts: int = 1) -> None:
        """Until start number `starts` has reported a step."""

        def there() -> bool:
            begun = len(self.reasons("start")) >= starts
            return begun and any(r["step"] >= step for r in records(self.run))

        self.until(there, f"start {starts} and step {step}")

    def wait_for_end(self, seconds: float = 400) -> str:
        """Until the chain has ended for good; the reason."""
        self.until(lambda: bool(self.reasons("end")), "the end of the chain", seconds)
        return self.reasons("end")[-1]

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
        """Poll; on a time-out say what the job has said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}:\n{self.log()}")
            time.sleep(0.1)

    def log(self) -> str:
        """All a job has said."""
        files = [*self.run.glob("slurm/*/job-*.log"), *self.run.glob("logs/*.log")]
        tails = [f"--- {f}\n{f.read_text()[-2000:]}" for f in sorted(files)]
        return "\n".join([*tails, self.lab.call("squeue"), self.lab.call("sinfo", "-N")])

    def warn(self, job: str) -> None:
        """What Slurm does when the limit is near: `--signal=B:USR1@...`."""
        self.lab.call("scancel", "--signal=USR1", "--batch", job)

    def ranks(self, job: str) -> dict[int, psutil.Process]:
        """The processes that train."""
        found = {}
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if env.get("SLURM_JOB_ID") == job and "experiment=submitted" in process.cmdline():
                    found[int(env["SLURM_PROCID"])] = process
            except (psutil.Error, KeyError):
                continue
        return found
