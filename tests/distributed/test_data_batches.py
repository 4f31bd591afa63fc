"""Data sets on several ranks: one builds the indices, all read the same samples."""

import hashlib
from pathlib import Path

from recipes.schema import DataConfig
from tests.distributed.harness import run_distributed
from tests.fixtures.corpus import make_texts, prepared


def read_slice(rank: int, world_size: int, cfg: DataConfig) -> list[str]:
    """Hashes of the samples this rank reads in two steps, one entry a step."""
    from data.batches import BatchSource, build_datasets

    train, validation = build_datasets(cfg, 32, 7, 64, 16)
    hashes = []
    for dataset in (train, validation):
        source = BatchSource(dataset, 8, 2, rank, world_size)
        digests = [hashlib.sha256(next(source)["tokens"].numpy()).hexdigest() for _ in range(2)]
        hashes.append("".join(digests))
    return hashes


def test_ranks_share_one_index_and_split_the_batch(tmp_path: Path) -> None:
    cfg = prepared(
        tmp_path, train=make_texts(60), other=make_texts(60, 1), validation=make_texts(20, 2)
    )
    split = run_distributed(read_slice, 2, cfg)
    whole = read_slice(0, 1, cfg)
    # Two ranks read two micro-batches each where one rank reads the first two of four.
    assert [split[0][i] for i in range(2)] == whole
    assert split[0] != split[1]
    assert len(list((tmp_path / "cache").glob("*/complete.json"))) == 2
