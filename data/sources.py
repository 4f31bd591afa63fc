"""Text sources: what a `SourceConfig` reads, as a stream of documents.

`json`, `parquet`, `text` (one document a file) and hub names stream through Hugging Face
`datasets`; `code` and `packages` are in data/code_corpus.py. A source reads the same documents in
the same order each time: restarts rely on it.
"""

import glob
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import os_errors_as_data_errors, sha256_file
from recipes.errors import ConfigError, DataError
from recipes.schema import SourceConfig

FILE_KINDS = ("json", "parquet", "text")
INSTALLED = ("code", "packages")
_ROWS = 64


@dataclass(frozen=True)
class InputFile:
    """One file as it was when it was hashed."""

    name: str
    """How messages and manifests call it."""
    path: str
    bytes: int
    mtime_ns: int
    sha256: str = ""
    """Empty while only listed."""

    def unchanged_since(self, other: "InputFile") -> bool:
        """Same file by size and time, without reading it."""
        return (self.path, self.bytes, self.mtime_ns) == (other.path, other.bytes, other.mtime_ns)


@dataclass
class Source:
    """One stream of documents and what it is made of."""

    key: str
    """`data.sources[i]`, for messages."""
    cfg: SourceConfig
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out so far in the newest pass, by reason."""

    def inputs(self, known: list[InputFile]) -> list[InputFile]:
        """The hashed files to read, in order; empty for a hub data set.

        Args:
            known: files hashed earlier; those unchanged since are not read again.
        """
        raise NotImplementedError

    def documents(self, files: list[InputFile]) -> Iterator[str]:
        """Non-empty documents in a fixed order, capped at cfg.max_megabytes."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """Everything besides the files that decides the documents, for the manifest."""
        return {}

    def text_bytes(self, files: list[InputFile]) -> int | None:
        """About the size of the text to come, for the progress bar; None if unknown."""
        if self.cfg.dataset not in ("text", *INSTALLED):
            return None
        total = sum(f.bytes for f in files)
        return total if self.cfg.max_megabytes is None else min(total, self.cap_bytes)

    @property
    def cap_bytes(self) -> int:
        """cfg.max_megabytes in bytes."""
        return int((self.cfg.max_megabytes or 0) * 1e6)


def stat_file(name: str, path: Path) -> InputFile:
    """List one file."""
    status = path.stat()
    return InputFile(name, str(path), status.st_size, status.st_mtime_ns)


def hash_files(files: list[InputFile], known: list[InputFile]) -> list[InputFile]:
    """Hash files, except those that did not change since they were `known`."""
    earlier = {f.path: f for f in known}
    hashed = []
    for file in files:
        old = earlier.get(file.path)
        if old is not None and file.unchanged_since(old):
            sha256 = old.sha256
        else:
            sha256 = sha256_file(Path(file.path))
        hashed.append(InputFile(file.name, file.path, file.bytes, file.mtime_ns, sha256))
    return hashed


def check_unchanged(key: str, files: list[InputFile]) -> None:
    """Raise DataError if a file changed since it was listed."""
    for file in files:
        path = Path(file.path)
        if not path.is_file() or not stat_file(file.name, path).unchanged_since(file):
            raise DataError(
                f"{key}: {file.path} changed while it was read; start again when it is complete"
            )


def open_source(key: str, cfg: SourceConfig) -> Source:
    """The source that `cfg` describes.

    Raises:
        ConfigError: keys that do not go together.
    """
    if cfg.max_megabytes is not None and cfg.max_megabytes <= 0:
        raise ConfigError(
            f"{key}.max_megabytes={cfg.max_megabytes} must be positive; use null for all"
        )
    if cfg.dataset in INSTALLED:
        from data.code_corpus import CodeSource, PackageSource

        return (CodeSource if cfg.dataset == "code" else PackageSource)(key, cfg)
    if cfg.dataset in FILE_KINDS:
        if not cfg.data_files:
            raise ConfigError(
                f"{key}.dataset={cfg.dataset} reads files; set {key}.data_files to paths or globs"
            )
        return HuggingFaceSource(key, cfg)
    if cfg.data_files or Path(cfg.dataset).exists():
        raise ConfigError(
            f"{key}.dataset={cfg.dataset} is not a kind of file; for local files use one of "
            f"{', '.join(FILE_KINDS)} with data_files (or `code`, `packages`)"
        )
    return HuggingFaceSource(key, cfg)


class HuggingFaceSource(Source):
    """Rows of a data set, streamed: memory does not grow with its size."""

    def inputs(self, known: list[InputFile]) -> list[InputFile]:
        """Expand data_files in the order given, each glob sorted by name."""
        files: dict[str, InputFile] = {}
        for pattern in self.cfg.data_files:
            matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
            matches = [m for m in matches if Path(m).is_file()]
            if not matches:
                raise DataError(
                    f"{self.key}.data_files={pattern} matches no file; paths are relative to "
                    f"{Path.cwd()}"
                )
            for match in matches:
                files[match] = stat_file(match, Path(match))
        with os_errors_as_data_errors(f"{self.key}.data_files", "make it readable"):
            return hash_files(list(files.values()), known)

    def documents(self, files: list[InputFile]) -> Iterator[str]:
        """The text column, row by row, up to the first text that would exceed the cap."""
        self.skipped.clear()
        total = 0
        for text in self._column(files):
            total += len(text.encode())
            if self.cfg.max_megabytes is not None and total > self.cap_bytes:
                return
            yield text

    def _column(self, files: list[InputFile]) -> Iterator[str]:
        column = "text" if self.cfg.dataset == "text" else self.cfg.text_key
        for batch in self._batches(files):
            if column not in batch:
                raise DataError(
                    f"{self.key}.text_key={column} is no column of {self._name(files)}; it has "
                    + ", ".join(sorted(batch))
                )
            for text in batch[column]:
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"{self.key}.text_key={column} holds {type(text).__name__}, not text; "
                        "choose a column of strings"
                    )
                if text:
                    yield text
                else:
                    self.skipped["empty"] += 1

    def _batches(self, files: list[InputFile]) -> Iterator[dict[str, list[Any]]]:
        """Column -> values of a few rows. Any error of the library becomes a DataError."""
        import datasets

        keywords: dict[str, Any] = {}
        if files:
            keywords["data_files"] = {self.cfg.split: [f.path for f in files]}
        if self.cfg.dataset == "text":
            keywords["sample_by"] = "document"
        datasets.disable_progress_bars()
        # datasets, pyarrow, fsspec and the hub's client raise a dozen unrelated types.
        try:
            stream = datasets.load_dataset(
                self.cfg.dataset,
                self.cfg.subset,
                split=self.cfg.split,
                streaming=True,
                **keywords,
            )
            batches = iter(stream.iter(batch_size=_ROWS))
        except Exception as error:
            raise self._unreadable(files, error) from error
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise self._unreadable(files, error) from error
            if batch is None:
                return
            yield batch

    def _name(self, files: list[InputFile]) -> str:
        if not files:
            return self.cfg.dataset
        return files[0].name if len(files) == 1 else f"{files[0].name} ... {files[-1].name}"

    def _unreadable(self, files: list[InputFile], error: Exception) -> DataError:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines()
        reason = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        if files:
            culprit = _not_utf8(files) if isinstance(cause, UnicodeDecodeError) else None
            return DataError(
                f"{self.key}.data_files: cannot read {culprit or self._name(files)} as "
                f"{self.cfg.dataset} ({reason}); repair or remove it"
            )
        return DataError(
            f"{self.key}.dataset={self.cfg.dataset} cannot be read from the hub ({reason}); check "
            "the name, subset, split and network, or download its files and use "
            "dataset=json, parquet or text with data_files"
        )


def _not_utf8(files: list[InputFile]) -> str | None:
    """The first file that is not UTF-8."""
    for file in files:
        try:
            with open(file.path, encoding="utf-8") as stream:
                while stream.read(1 << 20):
                    pass
        except UnicodeDecodeError:
            return file.name
    return None
