"""Shards of checkpoints: what PyTorch would write, where it is, and what becomes of errors."""

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from model.integrity import checksum
from train.shards import Archives, detach_storages, without_crc, write_shards

PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "vector": lambda: torch.randn(7),
    "one number": lambda: torch.tensor(3.5),
    "matrix of half": lambda: torch.randn(384, 256).bfloat16(),
    "double": lambda: torch.randn(3, 5).double(),
    "whole numbers": lambda: torch.arange(12).view(3, 4),
    "bytes": lambda: torch.arange(256, dtype=torch.uint8),
    "truth": lambda: torch.tensor([True, False]),
    "eight bits": lambda: torch.randn(16).to(torch.float8_e4m3fn),
    "five axes": lambda: torch.randn(1, 1, 2, 3, 4),
    "odd stride of one row": lambda: torch.randn(5).as_strided((1, 5), (99, 1)),
    "large": lambda: torch.randn(3_000_001),
}
OTHER: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(0, 3),
    "part of a buffer": lambda: torch.randn(10)[2:5],
    "transposed": lambda: torch.randn(3, 4).t(),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
    "with gradient": lambda: torch.randn(3, requires_grad=True),
    "complex, conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_archives_are_those_of_pytorch(name: str) -> None:
    """The second tensor of a kind takes another way than the first."""
    ours, theirs, archives = io.BytesIO(), io.BytesIO(), Archives()
    with without_crc():
        for _ in range(2):
            tensor = (PLAIN | OTHER)[name]()
            archives.save(tensor, ours)
            torch.save(tensor, theirs)
    assert ours.getvalue() == theirs.getvalue()


def bucket(path: Path, *data: Any) -> tuple[Any, ...]:
    """What Megatron plans for a file."""
    kinds = {io.BytesIO: WriteItemType.BYTE_IO, torch.Tensor: WriteItemType.TENSOR}
    items = [
        (WriteItem(MetadataIndex(f"{path.name} {i}"), kinds[type(one)]), one)
        for i, one in enumerate(data)
    ]
    objects = [item for item in items if isinstance(item[1], io.BytesIO)]
    return str(path), path.name, (objects, [item for item in items if item not in objects])


def test_everything_is_found_where_it_is_said_to_be(tmp_path: Path) -> None:
    written: dict[str, list[Any]] = {
        "a.distcp": [torch.randn(40, 50), io.BytesIO(b"an object"), torch.randn(40, 50)],
        "b.distcp": [torch.randn(5_000_000), torch.randn(20_000_000), torch.ones(3)],
    }
    buckets = [bucket(tmp_path / name, *data) for name, data in written.items()]
    results, sums = write_shards(buckets)
    assert sorted(results) == [0, 1]
    for number, (name, data) in enumerate(written.items()):
        content = (tmp_path / name).read_bytes()
        assert sums[name].bytes == len(content)
        assert sums[name].digest == checksum(tmp_path / name)
        places = {r.index.fqn: r.storage_data for r in results[number]}
        assert sum(place.length for place in places.values()) == len(content)
        for i, one in enumerate(data):
            place = places[f"{name} {i}"]
            assert place.relative_path == name
            part = content[place.offset : place.offset + place.length]
            if isinstance(one, io.BytesIO):
                assert part == one.getvalue()
            else:
                assert torch.equal(torch.load(io.BytesIO(part)), one)


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """Of either file, by the error of the system."""
    (tmp_path / "full.distcp").symlink_to("/dev/full")
    tensors = [torch.randn(100), torch.randn(100).view(20, 5).t()]
    for one in tensors:
        buckets = [bucket(tmp_path / name, one) for name in ("whole.distcp", "full.distcp")]
        with pytest.raises(OSError) as raised:
            write_shards(buckets)
        assert raised.value.errno == errno.ENOSPC


def test_storages_are_detached_in_place() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    buffer = torch.arange(24, dtype=torch.float32)
    parts = {
        "rows": buffer[4:16].view(3, 4),
        "number": buffer[7],
        "half": buffer[2:6].view(torch.bfloat16),
        "columns": buffer.view(4, 6).t(),
    }
    content: Any = {
        "nested": [
            {name: ShardedTensor.from_rank_offsets(name, part)} for name, part in parts.items()
        ],
        "step": 3,
    }
    detach_storages(content)
    found = {name: entry.data for one in content["nested"] for name, entry in one.items()}
    for name, part in parts.items():
        assert torch.equal(found[name], part) and found[name].dtype == part.dtype
        assert found[name].data_ptr() == part.data_ptr()
        assert found[name].untyped_storage().nbytes() == part.nbytes
    assert found["columns"].stride() == parts["columns"].stride()
    buffer += 1
    assert torch.equal(found["rows"], parts["rows"])
