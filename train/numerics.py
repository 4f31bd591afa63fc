"""Keeps a run in the formats of its precision policy, and writes down what it computed in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from precision.apply import applied_formats, apply_policy, check_applied
from precision.policy import Policy
from train.guards import write_atomically


class Numerics:
    """The formats of the model chunks of this rank, step by step.

    A policy may change formats at a number of consumed tokens; which ones hold is a function of
    that number alone, so a resumed or rolled-back run is right.

    Args:
        policy: formats of every module of the whole model.
        chunks: this rank's model chunks.
        run_dir: where precision.json is written.
    """

    def __init__(self, policy: Policy, chunks: Sequence[Any], run_dir: Path) -> None:
        self.policy = policy
        self.chunks = chunks
        self.path = run_dir / "precision.json"
        self._current: Any = None
        self._proved = False

    def before_step(self, consumed_tokens: int) -> None:
        """Put the formats of the step in place that starts with so many tokens consumed."""
        formats = self.policy.at(consumed_tokens)
        if formats is not self._current:
            apply_policy(self.chunks, self.policy, consumed_tokens)
            self._current, self._proved = formats, False

    def after_step(self, step: int, consumed_tokens: int) -> None:
        """After the first step in these formats: check that every module of every rank ran in
        its own, and write that down.

        Args:
            step: the step that ended, counted from 1.
            consumed_tokens: as before that step.

        Raises:
            PrecisionError: on every rank, naming modules that did not.
        """
        if self._proved:
            return
        own = applied_formats(self.chunks, self.policy, consumed_tokens)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        modules = {name: formats for rank in everyone for name, formats in rank.items()}
        if dist.get_rank() == 0:
            self._write(step, modules)
        check_applied(modules)
        self._proved = True

    def _write(self, step: int, modules: dict[str, tuple[str, str]]) -> None:
        """Replace what is said of this step and later ones, which a resumed run repeats."""
        entries = json.loads(self.path.read_text())["applied"] if self.path.exists() else []
        formats = {name: {"wanted": w, "ran": r} for name, (w, r) in sorted(modules.items())}
        kept = [entry for entry in entries if entry["from_step"] < step]
        if not kept or kept[-1]["modules"] != formats:
            kept.append({"from_step": step, "modules": formats})
        write_atomically(self.path, json.dumps({"applied": kept}, indent=1) + "\n")
