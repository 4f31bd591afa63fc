"""From .bin/.idx files to micro-batches.

Megatron's datasets own the order (blend, epochs, shuffle): training sample k of a run is
the same for every layout. A BatchSource cuts consecutive samples into steps, ranks and
micro-batches; its whole state is the number of samples consumed.

Shapes: b micro-batch, l sequence length.
"""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from data.files import locked, os_errors_as_data_errors, sha256_json
from data.manifest import (
    Manifest,
    check_pair,
    fingerprint,
    load_manifest,
    missing_reason,
    path_with,
)
from data.ranks import on_first_rank
from data.tokenizer import build_tokenizer, tokenizer_sha256
from recipes.errors import ConfigError, DataError
from recipes.schema import BlendEntry, DataConfig
from recipes.stages import Reading

type Dataset = GPTDataset | BlendedDataset
type Batch = dict[str, torch.Tensor]

# Held-out samples are the same for every run.seed, so that runs can be compared.
_VALIDATION_SEED = 1234
_SHARED = "all ranks must see this folder"
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_DOCUMENT_KEYS = ("cu_seqlens", "max_seqlen")
"""Only with inter_document_masking."""


@dataclass(frozen=True)
class DataTokenizer:
    """What Megatron's datasets ask of a tokenizer, without loading one.

    `pad` is an id no data has: nothing we write is padding, and a tokenizer's real pad id
    would make Megatron mask that token wherever it occurs.
    """

    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, str]
    """Names the tokenizer and the data, so that Megatron never reuses an index of old data."""
    pad: int = -1


def read_tokenizer(cfg: DataConfig, model_vocab_size: int | None = None) -> DataTokenizer:
    """Check that data, tokenizer and model agree; return what the datasets need.

    Reads manifests; loads the tokenizer itself only for pairs that have none.

    Args:
        cfg: the recipe's data.
        model_vocab_size: rows of the embedding, if they are to be checked.

    Raises:
        DataError: missing pair, or one written with another tokenizer.
        ConfigError: fewer embedding rows than tokens, or no training blend.
    """
    if not cfg.train:
        raise ConfigError("data.train is empty; name at least one .bin/.idx prefix")
    sha256 = tokenizer_sha256(cfg.tokenizer)
    identifiers = OrderedDict(tokenizer=sha256)
    found: tuple[int, int] | None = None
    for split, blend in (("train", cfg.train), ("validation", cfg.validation)):
        for i, entry in enumerate(blend):
            key = f"data.{split}[{i}].path={entry.path}"
            manifest = _checked_manifest(key, entry)
            identifiers[entry.path] = fingerprint(entry.path, manifest)
            if manifest is None:
                continue
            written = manifest.tokenizer
            if written.sha256 != sha256:
                raise DataError(
                    f"{key} was written with the {written.library} tokenizer {written.path} "
                    f"({written.vocab_size} tokens), not the files now at "
                    f"data.tokenizer.path={cfg.tokenizer.path}; point data.tokenizer at that "
                    "tokenizer, or run python -m data.prepare again"
                )
            found = (written.vocab_size, written.eod)
    if found is None:
        tokenizer = build_tokenizer(cfg.tokenizer)
        found = (int(tokenizer.vocab_size), int(tokenizer.eod))
    vocab_size, eod = found
    if model_vocab_size is not None and model_vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model_vocab_size} is below the {vocab_size} tokens of "
            f"data.tokenizer.path={cfg.tokenizer.path}; set it to {vocab_size} or more"
        )
    return DataTokenizer(vocab_size, eod, identifiers)


def build_datasets(
    cfg: DataConfig,
    sequence_length: int,
    seed: int,
    train_samples: int,
    validation_samples: int,
    model_vocab_size: int | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Megatron's datasets of the training and the validation blend.

    With torch.distributed every rank must call it; rank 0 writes the sample indices and the
    others read them, so `data.cache` must be visible to all. If rank 0 fails, all do.

    Args:
        cfg: the recipe's data.
        sequence_length: tokens l of a sample.
        seed: order of the training samples.
        train_samples: at least so many; more than there are gives more epochs. The order
            depends on the number of epochs this takes.
        validation_samples: likewise; 0: no validation.
        model_vocab_size: rows of the embedding, if they are to be checked.

    Returns:
        train, and validation or None if there is no blend or no sample asked for.

    Raises:
        ConfigError, DataError: see read_tokenizer; unwritable cache.
    """
    config = _train_config(cfg, sequence_length, seed, model_vocab_size)
    train = _build(cfg, config, 0, train_samples)
    return train, build_validation(cfg, sequence_length, seed, validation_samples, model_vocab_size)


def build_validation(
    cfg: DataConfig,
    sequence_length: int,
    seed: int,
    samples: int,
    model_vocab_size: int | None = None,
) -> Dataset | None:
    """The validation set alone, as build_datasets makes it."""
    if not cfg.validation or samples == 0:
        return None
    config = dataclasses.replace(
        _train_config(cfg, sequence_length, seed, model_vocab_size),
        random_seed=_VALIDATION_SEED,
        blend_per_split=[None, _blend("validation", cfg.validation), None],
    )
    return _build(cfg, config, 1, samples)


def build_readings(
    cfg: DataConfig,
    seed: int,
    readings: Sequence[Reading],
    chosen: Sequence[int],
    model_vocab_size: int | None = None,
) -> list[Dataset]:
    """Training sets of some of the readings of a run: what its steps of one stage and one length
    read (data/readings.py). Ranks and errors as in build_datasets.

    Args:
        cfg: the data of the stage; its `train` is not used.
        seed: order of the samples.
        readings: all of the run, in order.
        chosen: those to build.
        model_vocab_size: rows of the embedding, if they are to be checked.
    """
    from data.readings import alone, build_reading, used_before

    found: list[Dataset] = []
    for index in chosen:
        reading = readings[index]
        own = dataclasses.replace(cfg, train=list(reading.blend))
        config = _train_config(own, reading.sequence_length, seed, model_vocab_size)
        if alone(readings, index):
            found.append(_build(own, config, 0, reading.samples))
            continue
        folder = _index_folder(own, config, [repr(readings), index])
        config.path_to_cache = str(folder)

        def write(
            index: int = index, config: GPTDatasetConfig = config
        ) -> tuple[int, dict[str, Any]]:
            starts = used_before(readings, index)
            built = build_reading(readings, index, starts, config)
            return len(built), {"starts": starts}

        starts = _written(own, folder, write)["starts"]
        with os_errors_as_data_errors(f"data.cache={folder.parent}", _SHARED):
            found.append(build_reading(readings, index, starts, config))
    return found


def document_ids(dataset: Dataset, samples: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Which documents each sample was cut from.

    Args:
        dataset: what build_datasets returned.
        samples: sample numbers, for example `BatchSource.step_samples()`.

    Returns:
        For each sample the path of its pair and the numbers of its documents, in order.
    """
    return [_documents_of(dataset, sample) for sample in samples]


class BatchSource:
    """Endless-looking iterator of the micro-batches of one data-parallel rank.

    Step s with first sample c reads samples c .. c + global_batch_size - 1; rank r of n takes
    the r-th of n equal consecutive slices, in micro-batches. So the samples of a step do not
    depend on n or on the micro-batch size.
    """

    def __init__(
        self,
        dataset: Dataset,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        """Raises ConfigError if the sizes do not divide."""
        share = micro_batch_size * data_parallel_size
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % share:
            raise ConfigError(
                f"stage.global_batch_size={global_batch_size} is not a multiple of "
                f"stage.micro_batch_size * data parallel ranks = {micro_batch_size} * "
                f"{data_parallel_size}; use a multiple of {share}"
            )
        assert 0 <= data_parallel_rank < data_parallel_size
        self._dataset = dataset
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank_samples = global_batch_size // data_parallel_size
        self._rank_offset = data_parallel_rank * self._rank_samples
        self.seek(consumed_samples)

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in finished steps: the whole state."""
        return self._step_start

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of this rank in one step."""
        return self._rank_samples // self._micro_batch_size

    def seek(self, consumed_samples: int) -> None:
        """Go to the step that starts at this sample, any sample."""
        assert consumed_samples >= 0
        self._step_start, self._drawn = consumed_samples, 0

    def step_samples(self, consumed_samples: int | None = None) -> range:
        """Samples of all ranks in the step that starts at `consumed_samples` (None: now)."""
        start = self._step_start if consumed_samples is None else consumed_samples
        return range(start, start + self._global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Next micro-batch: tokens, labels, position_ids int64 [b, l], loss_mask float32 [b, l];
        with inter_document_masking also cu_seqlens int32 [b, l + 1], where documents end (from 0,
        filled up with l), and max_seqlen int32 [b], the longest.

        Raises:
            DataError: past the samples the dataset was built for.
        """
        first = self._step_start + self._rank_offset + self._drawn
        if self._step_start + self._global_batch_size > len(self._dataset):
            raise DataError(
                f"the data set was indexed for {len(self._dataset)} samples and sample "
                f"{self._step_start + self._global_batch_size - 1} is asked for; raise "
                "stage.train_steps or stage.train_tokens to what the run shall consume"
            )
        samples = [self._dataset[i] for i in range(first, first + self._micro_batch_size)]
        self._drawn += self._micro_batch_size
        if self._drawn == self._rank_samples:
            self.seek(self._step_start + self._global_batch_size)
        keys = [*_KEYS, *(key for key in _DOCUMENT_KEYS if key in samples[0])]
        return {key: torch.stack([s[key] for s in samples]) for key in keys}


def _checked_manifest(key: str, entry: BlendEntry) -> Manifest | None:
    reason = missing_reason(entry.path)
    if reason is not None:
        raise DataError(
            f"{key}: {reason}; run: python -m data.prepare with the same data= or experiment="
        )
    manifest = load_manifest(path_with(entry.path, ".json"))
    if manifest is None:  # with one, missing_reason compared the sizes
        check_pair(entry.path)
    return manifest


def _blend(split: str, entries: list[BlendEntry]) -> tuple[list[str], list[float]]:
    for i, entry in enumerate(entries):
        if not entry.weight > 0:
            raise ConfigError(
                f"data.{split}[{i}].weight={entry.weight} must be positive; take the entry out "
                "to leave it unused"
            )
    return [e.path for e in entries], [float(e.weight) for e in entries]


def _train_config(
    cfg: DataConfig, sequence_length: int, seed: int, model_vocab_size: int | None
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[_blend("train", cfg.train), None, None],
        tokenizer=read_tokenizer(cfg, model_vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        # The end of a document would predict the first token of another one.
        eod_mask_loss=cfg.inter_document_masking,
        inter_document_masking=cfg.inter_document_masking,
        create_attention_mask=False,  # its default builds an l x l mask
    )


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron's builder without its barriers, at which the other ranks would wait for ever
    when rank 0 fails."""

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: Any, sizes_per_dataset: list[list[int]]
    ) -> list[list[Any]]:
        parts = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*parts, strict=True)]

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        return cls(*args)


def _build(cfg: DataConfig, config: GPTDatasetConfig, split: int, samples: int) -> Dataset:
    """Build one split with its indices in a cache folder of its own; rank 0 first, alone.

    Megatron takes any index file it finds for complete. So the folder of an index counts only
    with a marker, written last, and rank 0 holds a lock against other runs meanwhile.
    """
    folder = _index_folder(cfg, config, [split, samples])
    config.path_to_cache = str(folder)
    sizes = [0, 0, 0]
    sizes[split] = samples
    builder = _Builder(GPTDataset, sizes, lambda: True, config)
    _written(cfg, folder, lambda: (len(builder.build()[split]), {}))
    with os_errors_as_data_errors(f"data.cache={folder.parent}", _SHARED):
        return builder.build()[split]


def _index_folder(cfg: DataConfig, config: GPTDatasetConfig, what: list[Any]) -> Path:
    """The cache folder of one index."""
    key = sha256_json(
        [config.random_seed, config.sequence_length, *what, config.blend_per_split]
        + [list(config.tokenizer.unique_identifiers.items())]
    )[:16]
    parent = Path(cfg.cache) if cfg.cache else Path(cfg.train[0].path).parent / "cache"
    return parent / key


def _written(
    cfg: DataConfig, folder: Path, write: Callable[[], tuple[int, dict[str, Any]]]
) -> dict[str, Any]:
    """Let rank 0 write an index unless it is there; what its marker says.

    Args:
        write: writes the index; returns its samples, and more for the marker.
    """
    parent, marker = folder.parent, folder / "complete.json"
    remedy = "set data.cache to a folder this user can write, with space left"

    def write_indices() -> None:
        if marker.is_file():
            return
        with (
            os_errors_as_data_errors(f"data.cache={parent}", remedy),
            locked(parent / "lock"),
        ):
            if marker.is_file():  # somebody finished it while we waited
                return
            for stale in folder.glob("*"):
                stale.unlink()
            samples, more = write()
            folder.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps({"samples": samples, **more}) + "\n")

    on_first_rank(write_indices)
    with os_errors_as_data_errors(f"data.cache={parent}", _SHARED):
        return json.loads(marker.read_text())


def _documents_of(dataset: Dataset, sample: int) -> tuple[str, list[int]]:
    if isinstance(dataset, BlendedDataset):
        part = dataset.datasets[dataset.dataset_index[sample]]
        return _documents_of(part, int(dataset.dataset_sample_index[sample]))
    row = dataset.shuffle_index[sample + getattr(dataset, "start", 0)]
    first, last = dataset.sample_index[row][0], dataset.sample_index[row + 1][0]
    documents = np.asarray(dataset.document_index[first : last + 1])
    return dataset.dataset_path, documents.tolist()
