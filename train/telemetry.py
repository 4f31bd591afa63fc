"""Precision telemetry: every n steps, what quantisation does to each operand of each module."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precision.apply import linear_modules
from precision.policy import block_format
from precision.telemetry import Tally, layout_of, tally
from recipes.errors import ConfigError
from recipes.schema import Recipe
from train.metrics import MetricsFile

Key = tuple[str, str, str]
"""Module, tensor, format."""


class Telemetry:
    """Watches the quantised modules of this rank during single steps.

    Lines of precision.jsonl: step, tokens, module, tensor, format, and the shares of
    `precision.telemetry.Tally`; for tensor `wgrad`, the weight gradient of the micro batches, the
    share `zeros` of its elements that are exactly zero.

    Args:
        recipe: `logging.precision_interval` says how often; null: never.
        chunks: this rank's model chunks.
        first_step: steps done; later lines of an earlier try are dropped.

    Raises:
        ConfigError: the modules are the real Transformer Engine's, which cannot be watched so.
    """

    def __init__(self, recipe: Recipe, chunks: Sequence[Any], first_step: int) -> None:
        self.interval = recipe.logging.precision_interval
        self.file = MetricsFile(Path(recipe.run.dir) / "precision.jsonl")
        self._square_weights = not recipe.precision.disable_2d_quantization
        self._modules: dict[str, Any] = dict(linear_modules(chunks)) if self.interval else {}
        if any(not hasattr(m, "observer") for m in self._modules.values()):
            raise ConfigError(
                f"logging.precision_interval={self.interval} needs the emulated Transformer "
                "Engine; with the real one use its own debug feature LogNvfp4TensorStats, or "
                "set logging.precision_interval=null"
            )
        self.rewind(first_step)

    def rewind(self, step: int) -> None:
        """Forget what was seen after a step."""
        if dist.get_rank() == 0:
            self.file.truncate_after(step)

    @contextmanager
    def watching(self, step: int, tokens: int) -> Iterator[None]:
        """Watch what runs inside if the step, counted from 1, is due. Collective then."""
        if not self.interval or step % self.interval:
            yield
            return
        seen: dict[Key, Tally] = defaultdict(Tally)
        zeros: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        hooks = []
        for name, module in self._modules.items():
            module.observer = partial(self._observe, seen, name)
            for weight in module.parameters(recurse=False):
                if weight.dim() == 2:
                    hooks.append(weight.register_hook(partial(_count_zeros, zeros[name])))
        try:
            yield
        finally:
            for module in self._modules.values():
                module.observer = None
            for hook in hooks:
                hook.remove()
        self._write(step, tokens, seen, zeros)

    def _observe(
        self,
        seen: dict[Key, Tally],
        name: str,
        module: Any,
        role: str,
        source: Tensor,
        quantized: Tensor,
    ) -> None:
        form = block_format(module.quantized_with)
        layout = layout_of(form, role, self._square_weights and form == "nvfp4")
        seen[name, role, form] += tally(source, quantized, layout)

    def _write(
        self, step: int, tokens: int, seen: dict[Key, Tally], zeros: dict[str, list[int]]
    ) -> None:
        """Add up what the ranks saw, and append it."""
        everyone: list[Any] = [None] * dist.get_world_size()
        formats = {name: str(module.quantized_with) for name, module in self._modules.items()}
        dist.all_gather_object(everyone, (dict(seen), dict(zeros), formats))
        if dist.get_rank() != 0:
            return
        tallies: dict[Key, Tally] = defaultdict(Tally)
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for rank_seen, rank_zeros, rank_formats in everyone:
            formats |= rank_formats
            for key, value in rank_seen.items():
                tallies[key] += value
            for name, (zero, elements) in rank_zeros.items():
                counts[name][0] += zero
                counts[name][1] += elements
        when = {"step": step, "tokens": tokens}
        for (name, tensor, form), value in sorted(tallies.items()):
            where = {"module": name, "tensor": tensor, "format": form}
            self.file.append(when | where | value.shares())
        for name, (zero, elements) in sorted(counts.items()):
            if elements:
                where = {"module": name, "tensor": "wgrad", "format": formats[name]}
                self.file.append(when | where | {"zeros": zero / elements})


def _count_zeros(count: list[int], grad: Tensor) -> None:
    count[0] += grad.numel() - int(torch.count_nonzero(grad))
    count[1] += grad.numel()
