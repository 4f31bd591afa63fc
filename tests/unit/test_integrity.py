"""Checksums of checkpoints: ours, and Megatron's own, which other checkpoints bring."""

import json
from pathlib import Path

import pytest

from model.integrity import INTEGRITY, checksum, write_manifest
from recipes.errors import CheckpointError
from tests.unit.world import fresh_world
from train.checksums import damage, write_sums


def test_published_values(tmp_path: Path) -> None:
    """Of the empty file (xxHash's and FIPS 180's test vectors), and of b"abc" (FIPS 180)."""
    empty, abc = tmp_path / "empty", tmp_path / "abc"
    empty.write_bytes(b"")
    abc.write_bytes(b"abc")
    assert checksum(empty) == "99aa06d3014798d86001c324468d497f"
    assert checksum(empty, "sha256").startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert checksum(abc, "sha256").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize("writer", ["ours", "Megatron's"])
def test_a_changed_byte_is_found(writer: str, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    shard = tmp_path / "__0_0.distcp"
    shard.write_bytes(bytes(range(256)) * 5000)
    with fresh_world():
        write_sums(tmp_path, {}) if writer == "ours" else save_integrity_manifest(str(tmp_path))
        algorithm = json.loads((tmp_path / INTEGRITY).read_text())["algorithm"]
        assert algorithm == ("xxh3_128" if writer == "ours" else "sha256")
        assert damage(tmp_path) is None
        with shard.open("r+b") as file:
            file.seek(1_000_000)
            file.write(b"\x01")
        assert damage(tmp_path) == "__0_0.distcp is not what was saved: its checksum differs"


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, {})
    text = (tmp_path / INTEGRITY).read_text()
    (tmp_path / INTEGRITY).write_text(text.replace("xxh3_128", "crc32"))
    with fresh_world(), pytest.raises(CheckpointError, match="'crc32'; known are xxh3_128, sha256"):
        damage(tmp_path)
