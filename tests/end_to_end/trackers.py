"""Reads back what a run sent to TensorBoard and wandb, and compares it with metrics.jsonl."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.training import records


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line, those in lists under `name/1`, `name/2`, ..."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": v for i, v in enumerate(value, start=1)}
        elif type(value) in (int, float) and name != "step":
            flat[name] = value
    return flat


def assert_shown_in_tensorboard(run: Path) -> None:
    """TensorBoard shows every number of every step once, with its value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = records(run)
    names = {name for line in lines for name in numbers(line)}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        expected = [(r["step"], numbers(r)[name]) for r in lines if name in numbers(r)]
        shown = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected], name
        # TensorBoard keeps single precision.
        assert [v for _, v in shown] == pytest.approx([v for _, v in expected], rel=1e-6), name


def wandb_runs(run: Path) -> list[tuple[str, dict[int, dict[str, float]]]]:
    """(id, step -> name -> value) of each start of a run, in order, from wandb's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        name, history = "", {}
        for data in _wandb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                history[record.history.step.num] = values
        found.append((name, history))
    return found


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, behind wandb's seven bytes of header.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, header, full, last = 32768, struct.Struct("<IHB"), 1, 4
    position, record = 7, b""
    while position + header.size <= len(data):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        record += data[position : position + length]
        position += length
        if kind in (full, last):
            yield record
            record = b""
