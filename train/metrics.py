"""What a run writes while it runs: one JSON line a step, a progress bar, trackers."""

import json
import os
import secrets
from pathlib import Path
from typing import Any, cast

from data.files import sync
from recipes.errors import DataError
from recipes.schema import LoggingConfig
from train.guards import write_atomically


class MetricsFile:
    """Append-only JSON lines, one a step; cut back to a step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step and a half-written last line.

        The kept lines are copied to a new file that replaces the old one, so that a kill in
        between loses nothing.

        Raises:
            DataError: a line is no record.
        """
        if not self.path.exists():
            return
        lines = enumerate(self._lines(), start=1)
        kept = [line for n, line in lines if self._parse(n, line)["step"] <= step]
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Numbers that are not finite become null: JSON has none."""
        with self.path.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def sync(self) -> None:
        """Return only after every line is on the disk."""
        if self.path.exists():
            sync(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Every record written so far.

        Raises:
            DataError: a line is no record.
        """
        if not self.path.exists():
            return []
        return [self._parse(n, line) for n, line in enumerate(self._lines(), start=1)]

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}, line {number} is no record of a step, so the file is damaged; "
                "remove the line, or put the file back as it was"
            ) from error
        return record

    def _lines(self) -> list[str]:
        return [x for x in self.path.read_text().split("\n")[:-1] if x]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Numbers of a record under flat names (`mtp_loss/1`), for trackers."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key == "expert_load":  # a table, not a curve
            continue
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": v for name, v in flatten(value).items()}
        elif isinstance(value, list):
            flat |= {f"{key}/{i + 1}": v for i, v in enumerate(value) if v is not None}
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            flat[key] = value
    return flat


class Reporter:
    """Sends each record to the metrics file, the progress bar, TensorBoard and wandb.

    Only rank 0 reports; everywhere else every method does nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        logging: LoggingConfig,
        active: bool,
        config: dict[str, Any],
        first_step: int,
        last_step: int,
    ) -> None:
        self.active = active
        self.file = MetricsFile(run_dir / "metrics.jsonl")
        self._bar: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not active:
            return
        self.file.truncate_after(first_step)
        if logging.progress:
            from tqdm import tqdm

            self._bar = tqdm(
                total=last_step,
                initial=first_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
            )
        if logging.tensorboard:
            self._tensorboard = _tensorboard(run_dir, first_step)
        if logging.wandb != "disabled":
            self._wandb = _wandb(run_dir, logging, config)

    def step(self, record: dict[str, Any]) -> None:
        """Report one training step."""
        if not self.active:
            return
        self.file.append(record)
        if self._bar is not None:
            shown = {"loss": record["loss"], "tok/s": record["tokens_per_second"]}
            if "validation_loss" in record:
                shown["val"] = record["validation_loss"]
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            self._bar.update()
        flat = flatten(record)
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(flat, step=record["step"])

    def sync(self) -> None:
        """Put every record on the disk: before a checkpoint that makes them final."""
        if not self.active:
            return
        self.file.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def rewind(self, step: int) -> None:
        """Forget every record after `step`, which will be trained again.

        wandb cannot forget: it keeps the first value of each step.
        """
        if not self.active:
            return
        self.file.truncate_after(step)
        if self._bar is not None:
            self._bar.reset(total=self._bar.total)
            self._bar.update(step)
        if self._tensorboard is not None:
            folder = Path(self._tensorboard.log_dir).parent
            self._tensorboard.close()
            self._tensorboard = _tensorboard(folder, step)

    def say(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._bar, self._tensorboard):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(run_dir: Path, step: int) -> Any:
    """A writer that hides events after `step`: TensorBoard purges from purge_step on."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _wandb(run_dir: Path, logging: LoggingConfig, config: dict[str, Any]) -> Any:
    import wandb

    # The same run directory continues the same wandb run, wherever it is moved; another
    # directory of the same name is another run.
    kept = run_dir / "wandb" / "id.txt"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        write_atomically(kept, secrets.token_hex(8) + "\n")
    return wandb.init(
        project=logging.wandb_project,
        name=run_dir.resolve().name,
        id=kept.read_text().strip(),
        resume="allow",
        dir=str(run_dir),
        mode=cast(Any, logging.wandb),  # checked with the recipe
        config=config,
    )
