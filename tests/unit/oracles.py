"""Other people's libraries as oracles: unpacked wheels outside of the environment, which they would
disturb."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def unpacked(wheel: str, why: str) -> Path:
    """Folder of an unpacked wheel (`name==version`), from the user's cache or the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strata" / "oracles"
    folder = cache / wheel.replace("==", "-")
    if not folder.exists():
        if os.environ.get("STRATA_OFFLINE"):
            pytest.skip(f"STRATA_OFFLINE is set and {wheel} is not in {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        done = subprocess.run([*command, wheel], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(
                f"{wheel} could not be downloaded: {why} is in it; set STRATA_OFFLINE=1 to skip "
                f"this test\n{done.stderr}"
            )
        unpacking = cache / f"unpacking-{os.getpid()}-{folder.name}"
        pattern = f"{wheel.replace('-', '_').replace('==', '-')}-*.whl"
        with zipfile.ZipFile(next(cache.glob(pattern))) as archive:
            archive.extractall(unpacking)
        if not folder.exists():
            unpacking.rename(folder)
    return folder


def run(module: str, folder: Path) -> str:
    """What `python -m MODULE FOLDER` prints; fails if it does."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
