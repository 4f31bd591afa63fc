"""Megatron torch_dist checkpoints, tensor by tensor, without a model or process groups.

A checkpoint is a folder of `.distcp` files that hold pieces of tensors, and `.metadata`, which
says where each piece is and which part of which tensor. Whatever layout wrote it, a tensor is
put together from its pieces, or read as one slice of its leading axis.
"""

import io
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from model.conversion.table import Pair, Shape, Spec
from model.integrity import INTEGRITY, checksum, write_manifest
from recipes.errors import CheckpointError

METADATA = ".metadata"
_OPTIMIZER = "optimizer."
_COMMON_STATE = "common_state/shard_0_1"
"""Where Megatron expects what is not a tensor; these checkpoints hold nothing else."""


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor and where its bytes are."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


class TorchDistReader:
    """The weights of a checkpoint; optimizer state and random states are passed over.

    Args:
        folder: of the checkpoint.
        sums: what each file is compared with before it is first read; None: nothing.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, folder: Path, sums: "Checksums | None" = None) -> None:
        self.folder = folder
        self._sums = sums
        if sums is not None:
            sums.check(METADATA)
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # whatever a damaged pickle raises
            raise CheckpointError(f"{folder / METADATA} cannot be read: {error}") from error
        self._pieces: dict[str, list[_Piece]] = {}
        self._kinds: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or name.startswith(_OPTIMIZER):
                continue
            self._kinds[name] = tuple(entry.size), entry.properties.dtype
            self._pieces[name] = list(_pieces(name, entry, metadata.storage_data or {}))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every weight."""
        return {name: shape for name, (shape, _) in self._kinds.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight."""
        return self._kinds[name][1]

    def files(self) -> list[Path]:
        """The files that hold weights."""
        return sorted({self.folder / p.file for pieces in self._pieces.values() for p in pieces})

    def read(self, spec: Spec) -> Tensor:
        """A weight, or one slice of it.

        Raises:
            CheckpointError: its bytes are missing or damaged.
        """
        dtype = self.dtype(spec.name)
        result = torch.empty(spec.shape, dtype=dtype)
        filled = 0
        for piece in self._pieces[spec.name]:
            offsets, sizes, lead = piece.offsets, piece.sizes, 0
            if spec.index is not None:
                lead = spec.index - offsets[0]
                if not 0 <= lead < sizes[0]:
                    continue
                offsets, sizes = offsets[1:], sizes[1:]
            part = self._load(spec.name, piece)
            if spec.index is not None:
                part = part[lead]
            if tuple(sizes) == spec.shape:
                return part
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            result[place] = part
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder}: {spec.name} has {filled} of {result.numel()} elements; "
                "the checkpoint is incomplete"
            )
        return result

    def _load(self, name: str, piece: _Piece) -> Tensor:
        path = self.folder / piece.file
        if self._sums is not None:
            self._sums.check(piece.file)
        try:
            with path.open("rb") as file:  # buffered: a single read takes 2 GiB at most
                file.seek(piece.start)
                data = file.read(piece.length)
            tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != piece.sizes:
            raise CheckpointError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}, not {piece.sizes}; "
                "the file belongs to another checkpoint"
            )
        return tensor.detach()


def _pieces(name: str, entry: TensorStorageMetadata, storage: dict[Any, Any]) -> Iterator[_Piece]:
    for chunk in entry.chunks:
        where = storage[MetadataIndex(name, chunk.offsets)]
        yield _Piece(
            tuple(chunk.offsets),
            tuple(chunk.sizes),
            where.relative_path,
            where.offset,
            where.length,
        )


type Written = tuple[list[WriteResult], dict[str, str]]
"""Of one file: where its tensors are, and its checksum."""


@dataclass(frozen=True)
class Planned:
    """A weight to write, or one slice of it."""

    spec: Spec
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.spec.shape).numel() * self.dtype.itemsize

    @property
    def whole(self) -> Shape:
        """Shape of the whole tensor."""
        shape = self.spec.shape
        return shape if self.spec.index is None else (self.spec.of, *shape)


class TorchDistWriter:
    """Writes a checkpoint in parts, one file each, in any order and from any thread.

    parts: what each file holds.
    """

    def __init__(self, folder: Path, parts: Sequence[Sequence[Planned]]) -> None:
        self.folder = folder
        self._parts = parts
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        plans = [SavePlan([_item(planned) for planned in part]) for part in parts]
        plans.append(SavePlan([_common_state_item()]))
        self._plans = self._writer.prepare_global_plan(plans)

    def write(self, part: int, tensors: Iterable[Tensor]) -> Written:
        """Write one part; returns what `finish` needs to know.

        tensors: the values, in the order of the plan; each is taken when its turn comes.
        """
        return self._write(part, _Values(iter(tensors)))

    def finish(self, written: Iterable[Written]) -> None:
        """Write `.metadata` and what else makes it a checkpoint of Megatron's."""
        common = self._write(len(self._parts), _Values(iter([])))
        known: dict[str, Any] = {}
        for planned in (p for part in self._parts for p in part):
            name = planned.spec.name
            if name not in known:
                known[name] = TensorStorageMetadata(
                    _properties(planned.dtype), torch.Size(planned.whole), []
                )
            known[name].chunks.append(_chunk(planned))
        known[_COMMON_STATE] = BytesStorageMetadata()
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(backend))
        parts = [*written, common]
        self._writer.finish(Metadata(known), [results for results, _ in parts])
        sums = {name: sum_ for _, part in parts for name, sum_ in part.items()}
        sums |= {n: checksum(self.folder / n) for n in (METADATA, "metadata.json")}
        write_manifest(self.folder, sums)

    def _write(self, part: int, values: "_Values") -> Written:
        results = self._writer.write_data(self._plans[part], values).value()
        files = {result.storage_data.relative_path for result in results}
        return results, {name: checksum(self.folder / name) for name in files}


class _Values(SavePlanner):
    """Gives the writer one tensor after the other."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([{}], stream)
            return stream
        assert write_item.tensor_data is not None
        return next(self._tensors).reshape(write_item.tensor_data.chunk.sizes)

    # The rest of the interface is for saving a state dict.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("set_up_planner: there is no state dict")

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("create_local_plan: plans are made by TorchDistWriter")

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        raise NotImplementedError("create_global_plan: plans are made by TorchDistWriter")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError("finish_plan: plans are made by TorchDistWriter")


def _item(planned: Planned) -> WriteItem:
    chunk = _chunk(planned)
    return WriteItem(
        MetadataIndex(planned.spec.name, chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, _properties(planned.dtype), torch.Size(planned.whole)),
    )


def _chunk(planned: Planned) -> ChunkStorageMetadata:
    shape, index = planned.spec.shape, planned.spec.index
    offsets = [0] * len(shape) if index is None else [index, *[0] * len(shape)]
    sizes = shape if index is None else (1, *shape)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _properties(dtype: torch.dtype) -> TensorProperties:
    return TensorProperties(dtype=dtype)


def _common_state_item() -> WriteItem:
    return WriteItem(MetadataIndex(_COMMON_STATE), WriteItemType.BYTE_IO)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder a path means: itself, or the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / METADATA).exists():
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").exists():
            return find_checkpoint(folder / (folder / "latest").read_text().strip())
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {METADATA} nor checkpoints/latest; give a run "
        "directory, or one of its checkpoints/iter_* folders"
    )


def step_of(name: str) -> int | None:
    """The step of a run's checkpoint, by the name of its folder; None: the folder is not the run's,
    but perhaps a user's copy."""
    match = re.fullmatch(r"iter_(\d{7}|[1-9]\d{7,})", name, re.ASCII)
    return int(match[1]) if match else None


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of a run's complete checkpoints, oldest first."""
    found = {step_of(file.parent.name): file.parent for file in folder.glob("*/meta.json")}
    return {step: found[step] for step in sorted(s for s in found if s is not None)}


def saved_recipe(checkpoint: Path) -> dict[str, Any]:
    """The recipe of the run a checkpoint belongs to, as written in its config.json.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (checkpoint, checkpoint.parent.parent):
        file = folder / "config.json"
        if file.exists():
            try:
                recipe = json.loads(file.read_text())
            except ValueError as error:
                raise CheckpointError(f"{file} is not valid JSON: {error}") from error
            if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), dict):
                raise CheckpointError(f"{file} holds no recipe with a model; restore it")
            return recipe
    raise CheckpointError(
        f"{checkpoint} has no config.json beside it or in its run directory, so its model is not "
        "known; restore it"
    )


def native_shapes(plan: Iterable[Pair]) -> dict[str, Shape]:
    """Name -> shape of every tensor of Megatron's side, stacked ones once."""
    specs = (spec for pair in plan for spec in pair.native)
    return {s.name: s.shape if s.index is None else (s.of, *s.shape) for s in specs}


class Checksums:
    """Compares each file of a checkpoint, once, with the checksum it was saved with. Its bytes are
    then in the page cache for whoever reads them next.

    Raises:
        CheckpointError: there are no checksums.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = folder / INTEGRITY
        try:
            found = json.loads(manifest.read_text())
            self._sums: dict[str, str] = found["files"]
            self._algorithm: str = found["algorithm"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{manifest} cannot be read ({error}); restore the checkpoint, or convert it with "
                "convert.verify=false"
            ) from error
        self._locks = {name: Lock() for name in self._sums}
        self._checked: set[str] = set()

    def check(self, name: str) -> None:
        """Check a file unless it was checked before.

        Raises:
            CheckpointError: it is missing, changed, or has no checksum.
        """
        file = self._folder / name
        if name not in self._sums:
            raise CheckpointError(f"{file} has no checksum in {INTEGRITY}; restore the checkpoint")
        with self._locks[name]:
            if name in self._checked:
                return
            try:
                now = checksum(file, self._algorithm)
            except OSError as error:
                raise CheckpointError(
                    f"{file}: {error.strerror}; restore the checkpoint"
                ) from error
            if now != self._sums[name]:
                raise CheckpointError(f"{file} is not as it was saved; restore the checkpoint")
            self._checked.add(name)
