"""What the end-to-end tests share: a small data set and a run, made once; a small disk."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.training import SMALL, Command, sources, train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder."""
    folder = tmp_path_factory.mktemp("data")
    Command([*SMALL, sources(folder)], folder, "data.prepare").run()
    return folder


@pytest.fixture(scope="session")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nothing happened to, with a checkpoint at steps 6 and 12."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(data, run, "checkpoint.save_interval=6").run()
    return run


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")

    def remount(self, options: str) -> None:
        """Change it: `size=60m`, `ro`."""
        self._mount("-o", f"remount,{options}")

    def unmount(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(
            ["mount", *options, str(self.folder)], check=True, capture_output=True, text=True
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        disk = SmallDisk(folder, 16)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"a disk that fills up needs the right to mount a tmpfs: {reason.strip()}")
    yield disk
    disk.unmount()
