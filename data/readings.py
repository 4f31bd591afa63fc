"""What a stage reads, when it is not the only one: no text twice.

A *stream* is a path read in samples of one length. Its samples have one order for the whole run:
Megatron's, for `run.seed` and as many samples as all stages together take of it. A stage goes on in
each of its streams where the stages before it stopped, whatever their blends and weights were.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import (
    _get_size_per_split_per_dataset,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize

from recipes.errors import DataError
from recipes.schema import BlendEntry
from recipes.stages import Reading

Stream = tuple[str, int, tuple[Fraction, Fraction]]
"""Path, sequence length and part of the documents."""

_ALL = (Fraction(0), Fraction(1))


class LaterSamples(GPTDataset):
    """A stream without its first samples, which an earlier stage has read."""

    start = 0

    def __len__(self) -> int:
        return super().__len__() - self.start

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        return super().__getitem__(idx if idx is None else idx + self.start)


def alone(readings: Sequence[Reading], index: int) -> bool:
    """Whether no other part of the run reads in the streams of one reading, and it reads all of
    their text: then it is what a run of one stage reads."""
    own = _streams(readings[index])
    others = {s for i, r in enumerate(readings) if i != index for s in _streams(r)}
    return not readings[index].documents and not others & set(own)


def used_before(readings: Sequence[Reading], index: int) -> list[int]:
    """Samples of each stream of a reading that the readings before it take."""
    found = dict.fromkeys(_streams(readings[index]), 0)
    for earlier in readings[:index]:
        streams = _streams(earlier)
        if found.keys() & set(streams):
            for stream, count in zip(streams, _counts(earlier), strict=True):
                if stream in found:
                    found[stream] += count
    return [found[stream] for stream in _streams(readings[index])]


def build_reading(
    readings: Sequence[Reading], index: int, starts: Sequence[int], config: GPTDatasetConfig
) -> GPTDataset | BlendedDataset:
    """The data set of one reading; sample 0 is the first that no earlier one has read.

    Args:
        readings: all of the run, in order.
        index: of the one to build.
        starts: what `used_before` says of it.
        config: with its blend, sequence length and cache folder.

    Raises:
        DataError: a path has too few documents to be divided between the lengths of a stage.
    """
    reading = readings[index]
    parts: list[GPTDataset] = []
    for stream, start in zip(_streams(reading), starts, strict=True):
        size = sum(_wanted(r)[stream] for r in readings if stream in _streams(r))
        path, _, part = stream
        text = GPTDataset.build_low_level_dataset(path, config)
        documents = _documents(path, np.asarray(text.sequence_lengths), part, config.random_seed)
        dataset = LaterSamples(text, path, documents, size, Split.train, config)
        dataset.start = start
        parts.append(dataset)
    if len(parts) == 1:
        return parts[0]
    return BlendedDataset(parts, _weights(reading.blend), _size(reading), config)


def _streams(reading: Reading) -> list[Stream]:
    return [
        (e.path, reading.sequence_length, reading.documents.get(e.path, _ALL))
        for e in reading.blend
    ]


def _weights(blend: Sequence[BlendEntry]) -> list[float]:
    return list(normalize([float(e.weight) for e in blend]))


def _wanted(reading: Reading) -> dict[Stream, int]:
    """Samples Megatron has ready of each stream: some more than the blend will take."""
    if len(reading.blend) == 1:
        return {_streams(reading)[0]: reading.samples}
    surplus = GPTDatasetConfig.mid_level_dataset_surplus
    sizes = _get_size_per_split_per_dataset(_weights(reading.blend), [reading.samples], surplus)
    return dict(zip(_streams(reading), (size[0] for size in sizes), strict=True))


def _size(reading: Reading) -> int:
    sizes = _get_size_per_split_per_dataset(_weights(reading.blend), [reading.samples])
    return int(sum(size[0] for size in sizes))


def _counts(reading: Reading) -> list[int]:
    """Samples the reading really takes of each of its streams: Megatron's blending, counted."""
    if len(reading.blend) == 1:
        return [reading.samples]
    from megatron.core.datasets import helpers

    which, places = np.zeros(reading.samples, np.int16), np.zeros(reading.samples, np.int64)
    weights = _weights(reading.blend)
    helpers.build_blending_indices(which, places, weights, len(weights), reading.samples, False)
    return [int(n) for n in np.bincount(which, minlength=len(weights))]


def _documents(
    path: str, lengths: np.ndarray, part: tuple[Fraction, Fraction], seed: int
) -> np.ndarray:
    """Numbers of the documents in one part of a path's text, in the path's order."""
    if part == _ALL:
        return np.arange(len(lengths), dtype=np.int32)
    order = np.random.RandomState(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    middles = ends - lengths[order] / 2
    total = int(ends[-1])
    chosen = (middles >= float(part[0]) * total) & (middles < float(part[1]) * total)
    if not chosen.any():
        raise DataError(
            f"data.train path={path} has {len(lengths)} documents, too few to be divided between "
            "the lengths of the stage; give stage.mix[].train a path of its own"
        )
    return np.sort(order[chosen]).astype(np.int32)
