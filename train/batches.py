"""The batches of a run: training in order from any sample, the same held-out ones each time."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from recipes.errors import ConfigError
from recipes.schema import Recipe
from train.optimizer import train_steps

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

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


class Batches:
    """Training and validation micro-batches of this data-parallel rank; of their tokens those
    of this context-parallel rank, as Megatron cuts them (two chunks of the sequence each).

    Args:
        recipe: the validated recipe.
        dp: data-parallel ranks.

    Raises:
        DataError: data missing, damaged or written with another tokenizer.
        ConfigError: the model has fewer embedding rows than the tokenizer has tokens.
    """

    def __init__(self, recipe: Recipe, dp: int) -> None:
        from megatron.core import parallel_state

        from data.batches import build_datasets

        stage = recipe.stage
        self._steps = train_steps(stage)
        self._sizes = (stage.global_batch_size, stage.micro_batch_size)
        self._rank = (parallel_state.get_data_parallel_rank(), dp)
        self._train, self._validation = build_datasets(
            recipe.data,
            stage.sequence_length,
            recipe.run.seed,
            train_samples=self._steps * stage.global_batch_size,
            validation_samples=stage.eval_steps * stage.global_batch_size,
            model_vocab_size=recipe.model.vocab_size,
        )

    @property
    def has_validation(self) -> bool:
        """Whether there is a held-out blend."""
        return self._validation is not None

    @property
    def num_train_samples(self) -> int:
        """Samples of the whole run."""
        return self._steps * self._sizes[0]

    def train_from(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of the steps that follow `consumed_samples`, on the model's device."""
        return self._iterate(self._train, consumed_samples)

    def validation(self) -> Iterator[dict[str, torch.Tensor]]:
        """The held-out micro-batches, from the first one."""
        return self._iterate(self._validation, 0)

    def documents(self, samples: range) -> list[list[object]]:
        """[data prefix, document numbers] of each training sample."""
        from data.batches import document_ids

        return [[path, ids] for path, ids in document_ids(self._train, samples)]

    def fingerprint(self, consumed_samples: int) -> str:
        """Hash of a few samples among those consumed: changes if the order or text did.

        Raises:
            ConfigError: the run is configured to be shorter than it already is.
        """
        if consumed_samples > len(self._train):
            raise ConfigError(
                f"stage.train_steps={self._steps} is less than the "
                f"{consumed_samples // self._sizes[0]} steps the checkpoint has done; raise it"
            )
        count = min(_PROBES, consumed_samples)
        probed = [i * consumed_samples // count for i in range(count)]
        tokens = hashlib.sha256()
        for sample in probed:
            tokens.update(self._train[sample]["tokens"].numpy().tobytes())
        return tokens.hexdigest()

    def _iterate(self, dataset: Any, consumed: int) -> Iterator[dict[str, torch.Tensor]]:
        from megatron.core import parallel_state
        from megatron.core.utils import (
            flatten_batch_for_packed_sequences,
            get_batch_on_this_cp_rank,
        )

        from data.batches import BatchSource

        device = torch.cuda.current_device()
        ranks = parallel_state.get_context_parallel_group()
        for batch in BatchSource(dataset, *self._sizes, *self._rank, consumed):
            batch = flatten_batch_for_packed_sequences(batch)  # of one row: cuts the filling
            part = get_batch_on_this_cp_rank(
                batch, is_hybrid_cp=False, cp_group=ranks, use_per_sequence_balancing=True
            )
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in part.items()}


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
