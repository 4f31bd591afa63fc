"""Batches: the same samples for any layout and after any restart, cut from the right documents."""

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data.batches import BatchSource, Dataset, build_datasets, document_ids, read_tokenizer
from data.prepare import prepare
from recipes.errors import ConfigError, DataError
from recipes.schema import BlendEntry, DataConfig, TokenizerConfig
from tests.fixtures.corpus import make_texts, prepared, write_jsonl

LENGTH = 32


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("pairs")
    return prepared(
        folder, train=make_texts(80), other=make_texts(80, seed=1), validation=make_texts(20, 2)
    )


@pytest.fixture(scope="module")
def train(cfg: DataConfig) -> Dataset:
    return build_datasets(cfg, LENGTH, 7, 120, 0)[0]


class Numbers(torch.utils.data.Dataset):
    """Sample k is the number k, as far as anyone can tell from the batch."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        assert 0 <= k < self.size
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.tensor([k]))


def read_steps(source: BatchSource, steps: int) -> list[list[int]]:
    """Sample numbers of each of the next steps, as this rank sees them."""
    return [
        [int(k) for _ in range(source.num_microbatches) for k in next(source)["tokens"][:, 0]]
        for _ in range(steps)
    ]


@settings(max_examples=60, deadline=None)
@given(
    micro=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 4]),
    multiple=st.integers(1, 4),
    start=st.integers(0, 50),
    steps=st.integers(1, 5),
    data=st.data(),
)
def test_any_layout_and_any_restart_reads_the_same_samples(
    micro, ranks, multiple, start, steps, data
):
    batch = micro * ranks * multiple
    dataset = Numbers(start + steps * batch)
    stop = data.draw(st.integers(0, steps), label="steps before the restart")
    seen: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        layout = {"data_parallel_rank": rank, "data_parallel_size": ranks}
        before = BatchSource(dataset, batch, micro, consumed_samples=start, **layout)
        parts = read_steps(before, stop)
        assert before.consumed_samples == start + stop * batch
        after = BatchSource(
            dataset, batch, micro, consumed_samples=before.consumed_samples, **layout
        )
        parts += read_steps(after, steps - stop)
        for step, part in enumerate(parts):
            seen[step] += part
        with pytest.raises(DataError, match="indexed for"):
            next(after)
    expected = range(start, start + steps * batch)
    assert [k for step in seen for k in step] == list(expected)
    assert list(before.step_samples(start)) == seen[0]


def test_a_step_half_read_starts_again():
    source = BatchSource(Numbers(100), 8, 2)
    next(source)
    assert source.consumed_samples == 0  # what a checkpoint would hold
    assert list(source.step_samples()) == list(range(8))
    source.seek(0)
    assert read_steps(source, 1) == [list(range(8))]
    source.seek(40)  # skip ahead
    assert read_steps(source, 1) == [list(range(40, 48))]


def test_sizes_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"global_batch_size=6 .* 2 \* 2; use a multiple of 4"):
        BatchSource(Numbers(10), 6, 2, data_parallel_size=2)


def test_real_batches_do_not_depend_on_the_layout(cfg, train):
    whole = next(BatchSource(train, 8, 8, consumed_samples=16))
    again = build_datasets(cfg, LENGTH, 7, 120, 0)[0]
    for ranks in (1, 2, 4):
        for micro in (1, 2):
            parts = [
                batch
                for rank in range(ranks)
                for source in [BatchSource(again, 8, micro, rank, ranks, consumed_samples=16)]
                for batch in islice(source, source.num_microbatches)
            ]
            for key, expected in whole.items():
                assert torch.equal(torch.cat([p[key] for p in parts]), expected)


def test_batch_has_the_promised_form(train):
    batch = next(BatchSource(train, 4, 4))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "tokens": (torch.int64, (4, LENGTH)),
        "labels": (torch.int64, (4, LENGTH)),
        "loss_mask": (torch.float32, (4, LENGTH)),
        "position_ids": (torch.int64, (4, LENGTH)),
    }
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert torch.equal(batch["position_ids"], torch.arange(LENGTH).repeat(4, 1))
    assert batch["loss_mask"].all()  # no token of ours is padding


def test_documents_of_a_batch_end_at_their_end_token(cfg, train):
    masked = dataclasses.replace(cfg, inter_document_masking=True)
    eod = read_tokenizer(cfg).eod
    batch = next(BatchSource(build_datasets(masked, LENGTH, 7, 120, 0)[0], 64, 64))
    assert torch.equal(batch["tokens"], next(BatchSource(train, 64, 64))["tokens"])
    several = 0
    for tokens, mask, ends in zip(
        *(batch[key] for key in ("tokens", "loss_mask", "cu_seqlens")), strict=True
    ):
        inside = set(ends.tolist()) - {0, LENGTH}
        assert {i + 1 for i in range(LENGTH - 1) if tokens[i] == eod} == inside
        # The end token would predict the first token of another document.
        assert torch.equal(mask == 0, tokens == eod)
        several += len(inside) > 0
    assert several > 3  # the interesting case occurs


def test_seed_decides_the_training_order_only(cfg):
    def first(seed: int) -> list[torch.Tensor]:
        return [
            next(BatchSource(d, 16, 16))["tokens"]
            for d in build_datasets(cfg, LENGTH, seed, 64, 16)
        ]

    one, same, other = first(1), first(1), first(2)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_document_ids_name_the_documents_of_the_sample(cfg, train):
    """The sample and its last label must stand in the named documents, none named in vain."""
    pairs = {e.path: IndexedDataset(e.path) for e in cfg.train}
    several = 0
    for k, (path, documents) in enumerate(document_ids(train, range(120))):
        sample = train[k]
        ids = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        texts = [pairs[path][d].tolist() for d in documents]
        joined = [i for text in texts for i in text]
        starts = [s for s in range(len(joined)) if joined[s : s + len(ids)] == ids]
        assert any(
            s < len(texts[0]) and s + len(ids) > len(joined) - len(texts[-1]) for s in starts
        )
        several += len(documents) > 1
    assert several > 10  # the interesting case occurs


def test_blend_weights_are_honoured(cfg):
    train_path, other_path = (e.path for e in cfg.train)
    blend = [BlendEntry(train_path, 3.0), BlendEntry(other_path, 1.0)]
    dataset, _ = build_datasets(dataclasses.replace(cfg, train=blend), LENGTH, 7, 100, 0)
    for first in (0, 50):  # also within the run, not only over the whole of it
        counts = Counter(path for path, _ in document_ids(dataset, range(first, first + 50)))
        assert abs(counts[train_path] - 37.5) <= 1.5
        assert abs(counts[other_path] - 12.5) <= 1.5
    bad = [BlendEntry(train_path, 0.0)]
    with pytest.raises(ConfigError, match=r"data.train\[0\].weight=0.0 must be positive"):
        build_datasets(dataclasses.replace(cfg, train=bad), LENGTH, 7, 100, 0)


def test_more_samples_than_data_gives_more_epochs(cfg):
    single = dataclasses.replace(cfg, train=cfg.train[:1], validation=[])
    pair = IndexedDataset(cfg.train[0].path)  # its arrays are valid only while it lives
    wanted = 3 * int(pair.sequence_lengths.sum()) // LENGTH
    dataset, validation = build_datasets(single, LENGTH, 7, wanted, 8)
    assert validation is None
    assert len(dataset) >= wanted
    used = Counter(d for _, ds in document_ids(dataset, range(len(dataset))) for d in ds)
    assert set(used) == set(range(80))


def test_data_that_changed_is_indexed_again(tmp_path):
    cfg = prepared(tmp_path, train=make_texts(40))
    before = build_datasets(cfg, LENGTH, 7, 20, 0)[0]
    assert before.document_index.max() == 39
    write_jsonl(tmp_path / "train.jsonl", make_texts(20))
    prepare(cfg)
    after = build_datasets(cfg, LENGTH, 7, 20, 0)[0]
    assert after.document_index.max() == 19


def test_index_left_half_written_is_rebuilt(tmp_path):
    cfg = dataclasses.replace(prepared(tmp_path, train=make_texts(40)), cache=str(tmp_path / "c"))
    expected = build_datasets(cfg, LENGTH, 7, 20, 0)[0][3]["tokens"]
    (marker,) = (tmp_path / "c").glob("*/complete.json")
    for index in marker.parent.glob("*.npy"):
        index.write_bytes(index.read_bytes()[:100])
    marker.unlink()  # what is on the disk when a run is killed here
    assert torch.equal(build_datasets(cfg, LENGTH, 7, 20, 0)[0][3]["tokens"], expected)


def test_unwritable_cache(tmp_path):
    cfg = prepared(tmp_path, train=make_texts(5))
    (tmp_path / "file").write_text("")
    blocked = dataclasses.replace(cfg, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="data.cache=.*file/cache.*; set data.cache to a folder"):
        build_datasets(blocked, LENGTH, 7, 20, 0)


def test_tokenizer_model_and_data_must_agree(cfg, tmp_path):
    with pytest.raises(ConfigError, match="model.vocab_size=263 is below the 264 tokens"):
        read_tokenizer(cfg, 263)
    assert read_tokenizer(cfg, 264).eod == 256
    from data.tokenizer import train_bpe

    train_bpe(make_texts(20), tmp_path / "tokenizer", 300)
    other = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match=r"train\[0\].path=.*with the byte-level tokenizer.*point"):
        build_datasets(dataclasses.replace(cfg, tokenizer=other), LENGTH, 7, 20, 0)


def test_missing_pairs(cfg):
    with pytest.raises(ConfigError, match="data.train is empty"):
        build_datasets(dataclasses.replace(cfg, train=[]), LENGTH, 7, 20, 0)
    gone = [BlendEntry("no/where")]
    with pytest.raises(DataError, match=r"validation\[0\].path=no/where: no .bin/.idx there; run"):
        build_datasets(dataclasses.replace(cfg, validation=gone), LENGTH, 7, 20, 0)


def test_pairs_of_megatrons_own_tools_are_checked_by_size(tmp_path):
    cfg = prepared(tmp_path, train=make_texts(20))
    (tmp_path / "train.json").unlink()
    assert len(build_datasets(cfg, LENGTH, 7, 20, 0, 264)[0]) >= 20
    data, index = Path(cfg.train[0].path + ".bin"), Path(cfg.train[0].path + ".idx")
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="train.idx is cut off"):
        build_datasets(cfg, LENGTH, 7, 20, 0)
    index.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="train.idx is not a Megatron index"):
        build_datasets(cfg, LENGTH, 7, 20, 0)
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(DataError, match="train.bin has .* bytes, not what train.idx lists"):
        build_datasets(cfg, LENGTH, 7, 20, 0)
