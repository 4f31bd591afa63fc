"""The unigram baseline against numbers worked out by hand."""

from math import log
from pathlib import Path

import pytest

from data.statistics import unigram_entropy
from data.tokenizer import train_bpe
from recipes.errors import DataError
from recipes.schema import TokenizerConfig
from tests.fixtures.corpus import config, json_source, make_texts, prepared


def test_hand_worked(tmp_path):
    cfg = prepared(tmp_path, train=["aab"], validation=["ab"])
    # Training tokens a a b end: with one added to each of 264 ids, P(a) = 3/268 and
    # P(b) = P(end) = 2/268. Held out: a b end.
    expected = -(log(3 / 268) + 2 * log(2 / 268)) / 3
    measured = unigram_entropy(cfg.train[0].path, cfg.validation[0].path)
    assert measured == pytest.approx(expected, rel=1e-12)


def test_pairs_that_cannot_be_compared(tmp_path):
    cfg = prepared(tmp_path, train=["aab"], validation=["ab"])
    with pytest.raises(DataError, match="nothing is no finished pair"):
        unigram_entropy(cfg.train[0].path, "nothing")
    from data.prepare import prepare

    train_bpe(make_texts(20), Path(tmp_path / "tokenizer"), 300)
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    other = config(json_source(tmp_path, "other", ["ab"]), tokenizer=tokenizer)
    prepare(other)
    with pytest.raises(DataError, match="different tokenizers"):
        unigram_entropy(cfg.train[0].path, other.train[0].path)
