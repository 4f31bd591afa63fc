"""How much there is to learn: the cross-entropy of a model that only knows frequencies."""

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, load_manifest, missing_reason, path_with
from recipes.errors import DataError

_TOKENS_AT_ONCE = 1 << 22


def unigram_entropy(train_path: str, validation_path: str) -> float:
    """Cross-entropy of a unigram model on held-out tokens, nats per token.

    The model's probabilities are (count + 1) / (tokens + vocabulary) over the training pair.

    Args:
        train_path: prefix of the pair the model is fitted on.
        validation_path: prefix of the pair it is tested on.

    Raises:
        DataError: a pair is missing, was not written by data.prepare, or the two have
            different tokenizers.
    """
    manifests = []
    for path in (train_path, validation_path):
        manifest = None if missing_reason(path) else load_manifest(path_with(path, ".json"))
        if manifest is None:
            raise DataError(f"{path} is no finished pair with a manifest; run data.prepare")
        manifests.append(manifest)
    if manifests[0].tokenizer.sha256 != manifests[1].tokenizer.sha256:
        raise DataError(
            f"{train_path} and {validation_path} have different tokenizers, so one model cannot "
            "describe both; prepare them again with one"
        )
    train, held_out = (
        _counts(path, manifest)
        for path, manifest in zip((train_path, validation_path), manifests, strict=True)
    )
    log_probability = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(-(held_out * log_probability).sum() / held_out.sum())


def _counts(prefix: str, manifest: Manifest) -> NDArray[np.int64]:
    """Occurrences of each token [vocab_size]."""
    tokens = np.memmap(path_with(prefix, ".bin"), manifest.dtype, "r")
    vocab_size = manifest.tokenizer.vocab_size
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        counts += np.bincount(tokens[start : start + _TOKENS_AT_ONCE], minlength=vocab_size)
    return counts
