"""The corpus that is already there: Python source of installed packages.

A file is a document (`code`), or a whole package is one (`packages`): text for long sequences.
Tests are left out, exact duplicates dropped, and a cap is shared evenly between packages.
The bytes change with the installed versions: the manifest says which they were.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from data.files import os_errors_as_data_errors
from data.sources import InputFile, Source, stat_file
from recipes.errors import ConfigError, DataError

STDLIB = "stdlib"
# Also keeps other packages out of the standard library's own folder.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


class CodeSource(Source):
    """The .py files of `cfg.packages`, one document a file."""

    def inputs(self, known: list[InputFile]) -> list[InputFile]:
        """Read all candidates, drop empty, undecodable and duplicate ones, share the cap.

        Raises:
            ConfigError: no package named.
            DataError: a package is not installed or has no Python source.
        """
        if not self.cfg.packages:
            raise ConfigError(f"{self.key}.packages is empty; name installed packages, or {STDLIB}")
        self.skipped.clear()
        seen: set[str] = set()
        chosen: dict[str, list[InputFile]] = {}
        for package in dict.fromkeys(self.cfg.packages):
            with os_errors_as_data_errors(f"{self.key}.packages={package}", "make it readable"):
                chosen[package] = self._files_of(package, seen)
        if self.cfg.max_megabytes is not None:
            chosen = _share(chosen, self.cap_bytes)
        return [file for files in chosen.values() for file in files]

    def documents(self, files: list[InputFile]) -> Iterator[str]:
        """The text of the files, by package (as listed) and path."""
        for file in files:
            yield Path(file.path).read_bytes().decode()

    def description(self) -> dict[str, Any]:
        """Versions of the packages, as far as they are called like their distribution."""
        return {"versions": {p: _version(p) for p in dict.fromkeys(self.cfg.packages)}}

    def _files_of(self, package: str, seen: set[str]) -> list[InputFile]:
        """Usable files of a package by path; `seen` holds the hashes of earlier ones."""
        paths = [(root, path) for root in self._roots(package) for path in _python_files(root)]
        if not paths:
            raise DataError(f"{self.key}.packages={package} has no Python source files")
        files = []
        for root, path in paths:
            text = path.read_bytes()
            sha256 = hashlib.sha256(text).hexdigest()
            reason = _unusable(text) or ("duplicates" if sha256 in seen else None)
            if reason is not None:
                self.skipped[reason] += 1
                continue
            seen.add(sha256)
            listed = stat_file(_name(package, root, path), path)
            files.append(dataclasses.replace(listed, sha256=sha256))
        return files

    def _roots(self, package: str) -> list[Path]:
        if package == STDLIB:
            return [Path(sysconfig.get_paths()["stdlib"])]
        spec = None
        if package.isidentifier():
            spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(
                f"{self.key}.packages={package} is not installed; install it or take it out"
            )
        if spec.submodule_search_locations:
            return [Path(p) for p in spec.submodule_search_locations]
        return [Path(spec.origin)] if spec.origin else []


class PackageSource(CodeSource):
    """The same files, each package one long document: its files in path order."""

    def documents(self, files: list[InputFile]) -> Iterator[str]:
        """The text of each package, as listed."""
        for _, own in groupby(files, key=lambda file: file.name.partition("/")[0]):
            yield "\n".join(super().documents(list(own)))


def _share(files: dict[str, list[InputFile]], cap_bytes: int) -> dict[str, list[InputFile]]:
    """Choose files up to `cap_bytes`, shared evenly by bytes between packages.

    Each turn goes to the package with the fewest bytes so far, which gives its next file in
    the order of a hash of the name: a sample of the whole package, not its letters A to C.
    """
    waiting = {
        package: sorted(queue, key=lambda f: hashlib.sha256(f.name.encode()).digest())
        for package, queue in files.items()
        if queue
    }
    taken = dict.fromkeys(waiting, 0)
    chosen: set[str] = set()
    while waiting:
        package = min(waiting, key=lambda p: taken[p])
        file = waiting[package].pop()
        if sum(taken.values()) + file.bytes > cap_bytes:
            break
        taken[package] += file.bytes
        chosen.add(file.path)
        if not waiting[package]:
            del waiting[package]
    return {p: [f for f in queue if f.path in chosen] for p, queue in files.items()}


def _python_files(root: Path) -> list[Path]:
    """The .py files under a folder (or the file itself), sorted, excluded folders left out."""
    if root.is_file():
        return [root] if root.suffix == ".py" else []
    found = []
    for folder, subfolders, names in root.walk():
        subfolders[:] = [s for s in subfolders if s not in _EXCLUDED_FOLDERS]
        found += [folder / n for n in names if n.endswith(".py") and (folder / n).is_file()]
    return sorted(found)


def _name(package: str, root: Path, path: Path) -> str:
    """`package/path/in/package.py`, the same on every machine."""
    relative = path.name if path == root else path.relative_to(root).as_posix()
    return f"{package}/{relative}"


def _unusable(text: bytes) -> str | None:
    """Why a file is no document, or None."""
    if not text:
        return "empty"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "undecodable"
    return None


def _version(package: str) -> str | None:
    if package == STDLIB:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, or not at all
        return None
