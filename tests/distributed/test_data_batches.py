"""Data sets on several ranks: one builds the indices, all read the same samples."""

import hashlib
import resource
from pathlib import Path

import pytest

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


def build_where_rank_0_cannot_write(rank: int, world_size: int, cfg: DataConfig) -> str:
    """What this rank is told when the index does not fit on the disk of rank 0."""
    from data.batches import build_datasets
    from recipes.errors import DataError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        build_datasets(cfg, 32, 7, 64, 16)
    except DataError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


@pytest.mark.parametrize("blend", [1, 2])
def test_a_failure_of_rank_0_ends_every_rank(blend: int, tmp_path: Path) -> None:
    names = ["train", "other"][:blend]
    cfg = prepared(tmp_path, **{n: make_texts(60, i) for i, n in enumerate(names)})
    first, second = run_distributed(build_where_rank_0_cannot_write, 2, cfg, timeout=30)
    assert first == second
    assert f"data.cache={tmp_path / 'cache'}" in first and "space left" in first
    assert not list((tmp_path / "cache").glob("*/complete.json"))
