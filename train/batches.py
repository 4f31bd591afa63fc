"""The batches of a run: training in order from any sample, the same held-out ones each time."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.manifest import path_with
from recipes.errors import ConfigError, DataError
from recipes.schema import Recipe
from recipes.stages import Place, Shape, Span, pattern, readings, train_steps

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

_SUFFIXES = (".bin", ".idx")
_PROBES = 8
"""Samples hashed to tell whether the data order is still the one of the checkpoint."""


def check_data(recipe: Recipe) -> None:
    """Prepare the data if it is missing and the recipe says so; check that it fits.

    Raises:
        DataError: data missing, damaged or written with another tokenizer.
        ConfigError: the model has fewer embedding rows than the tokenizer has tokens.
    """
    from data.batches import read_tokenizer
    from data.prepare import ensure_prepared

    if recipe.data.prepare_if_missing:
        ensure_prepared(recipe.data)
    read_tokenizer(recipe.data, recipe.model.vocab_size)


def missing_data(recipe: Recipe) -> list[str]:
    """Paths of the stage's training blends with no finished data, if it does not prepare them."""
    from data.manifest import missing_reason

    if recipe.data.prepare_if_missing:
        return []
    blends = [recipe.data.train, recipe.data.validation, *(m.train for m in recipe.stage.mix)]
    paths = {entry.path for blend in blends for entry in blend}
    return sorted(path for path in paths if missing_reason(path) is not None)


class Batches:
    """Training and validation micro-batches of this data-parallel rank; of their tokens those
    of this context-parallel rank, as Megatron cuts them (two chunks of the sequence each).

    Args:
        recipe: the validated recipe, of one stage.
        dp: data-parallel ranks.
        place: the stage among those of its run; None: the run has no other.

    Raises:
        DataError: data missing, damaged or written with another tokenizer.
        ConfigError: the model has fewer embedding rows than the tokenizer has tokens.
    """

    def __init__(self, recipe: Recipe, dp: int, place: Place | None = None) -> None:
        from megatron.core import parallel_state

        from data.batches import build_datasets, build_validation

        stage = recipe.stage
        self._recipe = recipe
        self._place = place or Place([Span(recipe)])
        self._steps = train_steps(stage)
        self._pattern = pattern(stage)
        self._rank = (parallel_state.get_data_parallel_rank(), dp)
        validation = (stage.eval_steps * stage.global_batch_size, recipe.model.vocab_size)
        self._validation: Any
        if self._place.staged or stage.mix:
            self._train = self._of_stage(self._place)
            self._validation = build_validation(
                recipe.data, stage.sequence_length, recipe.run.seed, *validation
            )
        else:
            train, self._validation = build_datasets(
                recipe.data,
                stage.sequence_length,
                recipe.run.seed,
                self._steps * stage.global_batch_size,
                *validation,
            )
            self._train = [train]
        self._file_sizes = _file_sizes(recipe)

    @property
    def has_validation(self) -> bool:
        """Whether there is a held-out blend."""
        return self._validation is not None

    @property
    def last_step(self) -> int:
        """Steps of the run when the stage is done."""
        return self._place.span.first_step + self._steps

    def damage(self) -> DataError | None:
        """What has become of the data's files since the run began: gone or cut, if anything.

        They are mapped into memory: to read where one was cut off would kill this rank.
        """
        for path, size in self._file_sizes.items():
            try:
                now = path.stat().st_size
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                if now == size:
                    continue
                reason = f"has {now} bytes, not the {size} it had when the run began"
            return DataError(
                f"{path}: {reason}; put the file back, and the same command goes on from the "
                "last checkpoint"
            )
        return None

    def train_from(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of the steps that follow so many steps of the run, on the model's
        device."""
        done = step - self._place.span.first_step
        counts = zip(self._pattern.counts(done), self._pattern.shapes, self._train, strict=True)
        sources = [
            self._iterate(dataset, shape, count * shape.global_batch_size)
            for count, shape, dataset in counts
        ]
        for later in itertools.count(done):
            which = self._pattern.at(later)
            shape = self._pattern.shapes[which]
            share = shape.micro_batch_size * self._rank[1]
            yield from itertools.islice(sources[which], shape.global_batch_size // share)

    def validation(self) -> Iterator[dict[str, torch.Tensor]]:
        """The held-out micro-batches, from the first one."""
        return self._iterate(self._validation, self._recipe.stage, 0)

    def documents(self, step: int) -> list[list[object]]:
        """[data prefix, document numbers] of each training sample of a step, counted from 1."""
        from data.batches import document_ids

        done = step - 1 - self._place.span.first_step
        which = self._pattern.at(done)
        first = self.first_sample(step)
        samples = range(first, first + self._pattern.shapes[which].global_batch_size)
        return [[path, ids] for path, ids in document_ids(self._train[which], samples)]

    def first_sample(self, step: int) -> int:
        """Number of the first sample of a step, counted from 1, among those of its length."""
        done = step - 1 - self._place.span.first_step
        which = self._pattern.at(done)
        return self._pattern.counts(done)[which] * self._pattern.shapes[which].global_batch_size

    def fingerprint(self, step: int) -> str:
        """Hash of a few samples among those the stage has read after so many steps of the run:
        changes if the order or text did. At the end of a stage it is that of the stage.

        Raises:
            ConfigError: the run is configured to be shorter than it already is.
        """
        place = self._place.of_last_step(step) if self._place.staged else self._place
        done = step - place.span.first_step
        own = place.index == self._place.index
        datasets = self._train if own else self._of_stage(place)
        lengths = pattern(place.span.recipe.stage)
        tokens = hashlib.sha256()
        counts = zip(lengths.counts(done), lengths.shapes, datasets, strict=True)
        for steps, shape, dataset in counts:
            consumed = steps * shape.global_batch_size
            if consumed > len(dataset):
                raise ConfigError(
                    f"stage.train_steps={self._steps} is less than the {done} steps the "
                    "checkpoint has done; raise it"
                )
            probes = min(_PROBES, consumed)
            for sample in (i * consumed // probes for i in range(probes)):
                tokens.update(dataset[sample]["tokens"].numpy().tobytes())
        return tokens.hexdigest()

    def _of_stage(self, place: Place) -> list[Any]:
        """The training set of each length of a stage."""
        from data.batches import build_readings

        parts = [readings(span.recipe) for span in place.spans]
        first = sum(len(part) for part in parts[: place.index])
        recipe = place.span.recipe
        return list(
            build_readings(
                recipe.data,
                recipe.run.seed,
                [reading for part in parts for reading in part],
                range(first, first + len(parts[place.index])),
                recipe.model.vocab_size,
            )
        )

    def _iterate(
        self, dataset: Any, shape: Shape, consumed: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        from megatron.core import parallel_state
        from megatron.core.utils import (
            flatten_batch_for_packed_sequences,
            get_batch_on_this_cp_rank,
        )

        from data.batches import BatchSource

        device = torch.cuda.current_device()
        ranks = parallel_state.get_context_parallel_group()
        sizes = (shape.global_batch_size, shape.micro_batch_size)
        for batch in BatchSource(dataset, *sizes, *self._rank, consumed):
            batch = flatten_batch_for_packed_sequences(batch)  # of one row: cuts the filling
            part = get_batch_on_this_cp_rank(
                batch, is_hybrid_cp=False, cp_group=ranks, use_per_sequence_balancing=True
            )
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in part.items()}


def _file_sizes(recipe: Recipe) -> dict[Path, int]:
    blends = (recipe.data.train, recipe.data.validation, *(m.train for m in recipe.stage.mix))
    paths = {path_with(entry.path, s) for blend in blends for entry in blend for s in _SUFFIXES}
    return {path: path.stat().st_size for path in paths}


def packed_documents(batch: dict[str, torch.Tensor]) -> "PackedSeqParams | None":
    """Where the documents of a micro batch end, in the form Megatron's layers read; None if
    documents see each other."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if "cu_seqlens" not in batch:
        return None
    ends = batch["cu_seqlens"][0]
    longest = int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=int(ends[-1]),
    )
