"""What must never be committed."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_nothing_that_is_ignored_is_tracked() -> None:
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_no_large_file_is_tracked() -> None:
    large = [
        f for f in git("ls-files") if (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2**20
    ]
    assert large == []
