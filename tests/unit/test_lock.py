"""A run directory has one command at a time, and is free when that is gone, however it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

import train.lock
from recipes.errors import ConfigError
from train.lock import RunLock

HOLDER = "import sys, time; from pathlib import Path; from train.lock import RunLock\n"
HOLDER += "lock = RunLock(Path(sys.argv[1])); print(lock.take(0), flush=True); time.sleep(60)"


def test_the_second_waits_a_little_and_is_told_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.lock, "_PATIENCE", 0.3)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "None\n"
        second = RunLock(tmp_path)
        with pytest.raises(ConfigError, match=f"is in use by process {first.pid} on "):
            second.take(0)
        first.kill()
    assert second.take(0) is None
    second.release()
