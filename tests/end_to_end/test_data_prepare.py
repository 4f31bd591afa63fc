"""`python -m data.prepare` as a user runs it: default corpus, killed, continued, refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import writer
from data.manifest import load_manifest
from data.prepare import prepare
from recipes.schema import SourceConfig
from tests.fixtures.corpus import config, make_texts, write_jsonl

ROOT = Path(__file__).parents[2]
SMALL = (
    "data=code",
    "data.tokenizer.train_vocab_size=600",
    "data.sources.0.packages=[json,email]",
    "data.sources.0.max_megabytes=0.3",
    "data.sources.1.packages=[logging]",
)
# Prepares with two workers, and kills itself at a document inside the third part.
KILLED = """
import os, signal, sys
import data.prepare
from tests.fixtures.corpus import config
from recipes.schema import SourceConfig

def encode_all_then_die(*args):
    for number, item in enumerate(real_encode_all(*args)):
        if number == 14_000:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

if __name__ == "__main__":  # the workers import this file too
    import data.writer
    real_encode_all, data.prepare.encode_all = data.prepare.encode_all, encode_all_then_die
    data.writer.PART_BYTES = int(sys.argv[3])
    cfg = config(SourceConfig(output=sys.argv[1], dataset="json", data_files=[sys.argv[2]]))
    cfg.prepare_workers = 2
    data.prepare.prepare(cfg)
"""


def run(*overrides: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *overrides],
        cwd=ROOT,
        env=os.environ | {"STRATA_DATA": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_default_corpus_small(tmp_path):
    first = run(*SMALL, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "tokenizer trained, 600 tokens" in first.stdout
    assert first.stdout.count(": written, ") == 2
    manifest = load_manifest(tmp_path / "code" / "train.json")
    assert manifest is not None
    assert 100_000 < manifest.bytes <= 300_000
    assert {f.name.split("/")[0] for f in manifest.inputs} == {"json", "email"}
    second = run(*SMALL, folder=tmp_path)
    assert second.stdout.count(": up to date, ") == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=nowhere"], "data=nowhere"),
        (["data.sources.0.packages=[no_such_package]"], "no_such_package is not installed"),
    ],
)
def test_user_errors_are_one_message(tmp_path, overrides, message):
    result = run("data=code", *overrides, folder=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_killed_in_the_middle_continues_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "x.jsonl", make_texts(20_000))
    part_bytes = file.stat().st_size // 4
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), str(file), str(part_bytes)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed.parts" / "00001.json").exists()
    assert not (tmp_path / "killed.bin").exists()

    def prepare_here(output: str) -> None:
        source = SourceConfig(output=str(tmp_path / output), dataset="json", data_files=[str(file)])
        prepare(config(source))

    prepare_here("whole")
    capsys.readouterr()
    monkeypatch.setattr(writer, "PART_BYTES", part_bytes)
    prepare_here("killed")
    assert "continuing after" in capsys.readouterr().out
    for suffix in (".bin", ".idx"):
        continued = tmp_path / f"killed{suffix}"
        assert continued.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not (tmp_path / "killed.parts").exists()
