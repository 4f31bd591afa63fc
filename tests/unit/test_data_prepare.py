"""Preparation: what lands in the pair and its manifest, and what a second run does."""

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data import prepare as prepare_module
from data import writer
from data.manifest import Manifest, load_manifest, missing_reason
from data.prepare import ensure_prepared, prepare
from data.tokenizer import build_tokenizer, codec
from data.workers import encode_all
from recipes.errors import ConfigError, DataError
from recipes.schema import SourceConfig, TokenizerConfig
from tests.fixtures.corpus import (
    DeadlyCodec,
    config,
    json_source,
    make_texts,
    prepared,
    write_jsonl,
)

TEXTS = make_texts(60)


def files_of(prefix: Path) -> dict[str, bytes]:
    return {s: Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx")}


def manifest_of(prefix: Path) -> Manifest:
    manifest = load_manifest(Path(f"{prefix}.json"))
    assert manifest is not None
    return manifest


def test_pair_holds_the_documents_in_order(tmp_path):
    cfg = prepared(tmp_path, train=TEXTS)
    dataset = IndexedDataset(cfg.train[0].path)
    assert len(dataset) == len(dataset.document_indices) - 1 == len(TEXTS)
    for text, ids in zip(TEXTS, dataset, strict=True):
        # byte-level: ids are the bytes themselves, and 256 ends the document
        assert ids[-1] == 256
        assert bytes(ids[:-1].astype(np.uint8)).decode() == text


def test_manifest_is_true(tmp_path):
    cfg = prepared(tmp_path, train=["", *TEXTS])
    manifest = manifest_of(tmp_path / "train")
    assert manifest is not None
    source = tmp_path / "train.jsonl"
    (file,) = manifest.inputs
    assert (file.path, file.bytes) == (str(source), source.stat().st_size)
    assert file.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.documents == len(TEXTS)
    assert manifest.bytes == sum(len(t.encode()) for t in TEXTS)
    assert manifest.tokens == manifest.bytes + len(TEXTS)
    assert manifest.skipped == {"empty": 1}
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eod) == (264, 256)
    assert manifest.dtype == "uint16"
    for suffix, written in ((".bin", manifest.bin), (".idx", manifest.idx)):
        content = Path(cfg.train[0].path + suffix).read_bytes()
        assert written.sha256 == hashlib.sha256(content).hexdigest()
        assert written.bytes == len(content)
    assert not (tmp_path / "train.parts").exists()


def test_number_of_workers_does_not_matter(tmp_path):
    texts = make_texts(4000)  # several batches
    sources = [json_source(tmp_path, f"w{n}", texts) for n in (1, 2, 3)]
    for n, source in zip((1, 2, 3), sources, strict=True):
        prepare(dataclasses.replace(config(source), prepare_workers=n))
    first = files_of(tmp_path / "w1")
    assert files_of(tmp_path / "w2") == first
    assert files_of(tmp_path / "w3") == first


def test_a_dead_worker_is_an_error_not_a_hang():
    with pytest.raises(DataError, match="prepare_workers=2: a tokenizing process died"):
        list(encode_all(DeadlyCodec("byte-level", None), TEXTS, 2))


def test_second_run_writes_nothing(tmp_path, capsys):
    cfg = prepared(tmp_path, train=TEXTS)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("train.*")}
    prepare(cfg)
    assert "up to date" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("train.*")} == before
    os.utime(tmp_path / "train.jsonl")  # touched, not changed
    prepare(cfg)
    assert "up to date" in capsys.readouterr().out


def test_changed_inputs_are_named_and_rebuilt(tmp_path, capsys):
    cfg = prepared(tmp_path, train=TEXTS)
    source = cfg.sources[0]
    capsys.readouterr()
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:50])
    prepare(cfg)
    assert "changed files: " + str(tmp_path / "train.jsonl") in capsys.readouterr().out
    assert manifest_of(tmp_path / "train").documents == 50
    prepare(dataclasses.replace(cfg, sources=[dataclasses.replace(source, max_megabytes=0.001)]))
    assert "max_megabytes was None and is 0.001" in capsys.readouterr().out
    assert manifest_of(tmp_path / "train").bytes <= 1000
    (tmp_path / "train.bin").write_bytes(b"cut off")
    prepare(dataclasses.replace(cfg, sources=[dataclasses.replace(source, max_megabytes=0.001)]))
    assert "damaged" in capsys.readouterr().out
    assert missing_reason(source.output) is None


def test_tokenizer_is_trained_once_and_its_change_is_noticed(tmp_path, capsys):
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer"), train_vocab_size=300)
    cfg = config(json_source(tmp_path, "train", TEXTS), tokenizer=tokenizer)
    prepare(cfg)
    assert "tokenizer trained" in capsys.readouterr().out
    prepare(cfg)
    out = capsys.readouterr().out
    assert "up to date" in out
    assert "tokenizer trained" not in out
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    bigger = dataclasses.replace(tokenizer, train_vocab_size=310)
    prepare(dataclasses.replace(cfg, tokenizer=bigger))
    assert "another tokenizer" in capsys.readouterr().out
    assert manifest_of(tmp_path / "train").tokenizer.vocab_size == 310
    decode = codec(build_tokenizer(bigger)).decode
    dataset = IndexedDataset(cfg.train[0].path)
    assert [decode(ids[:-1]) for ids in dataset] == TEXTS


def test_parts_of_any_size_give_the_same_bytes(tmp_path, monkeypatch):
    prepared(tmp_path, whole=TEXTS)
    monkeypatch.setattr(writer, "PART_BYTES", 2000)
    prepared(tmp_path, parts=TEXTS)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("step", ["unlink", "bin", "idx", "json"])
def test_interrupted_publication_is_finished(tmp_path, monkeypatch, step, capsys):
    """Stop at each step of moving a new pair over an old one; readers see old, none or new."""
    cfg = prepared(tmp_path, train=TEXTS)
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:40])
    real_replace, real_unlink = os.replace, Path.unlink

    def fail(name: str) -> None:
        if name.endswith(f"train.{step}") or (step == "unlink" and name.endswith("train.json")):
            raise OSError(errno.ENOSPC, "No space left on device", name)

    def replace(source, target):
        if step != "unlink":
            fail(str(target))
        real_replace(source, target)

    def unlink(path, missing_ok=False):
        if step == "unlink":
            fail(str(path))
        real_unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(DataError, match="No space left on device; free space"):
            prepare(cfg)
    if step == "unlink":  # nothing was moved yet: the old pair is whole
        assert missing_reason(cfg.train[0].path) is None
        assert manifest_of(tmp_path / "train").documents == 60
    else:
        assert "not finished" in (missing_reason(cfg.train[0].path) or "")
    capsys.readouterr()
    prepare(cfg)
    assert "finished" in capsys.readouterr().out
    assert missing_reason(cfg.train[0].path) is None
    other = prepared(tmp_path, other=TEXTS[:40])
    assert files_of(tmp_path / "train") == files_of(Path(other.train[0].path))


def test_failure_keeps_the_finished_pair(tmp_path):
    cfg = prepared(tmp_path, train=TEXTS)
    before = files_of(tmp_path / "train")
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match="train.jsonl as json"):
        prepare(cfg)
    (tmp_path / "train.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"has no document \(left out: 1 empty\); nothing was"):
        prepare(cfg)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match="matches no file"):
        prepare(cfg)
    assert files_of(tmp_path / "train") == before
    assert manifest_of(tmp_path / "train").documents == 60


def test_a_file_that_grows_meanwhile_is_refused(tmp_path, monkeypatch):
    cfg = config(json_source(tmp_path, "train", TEXTS))

    def growing(codec, texts, workers):
        with open(tmp_path / "train.jsonl", "a") as stream:
            stream.write('{"text": "late"}\n')
        return encode_all(codec, texts, workers)

    monkeypatch.setattr(prepare_module, "encode_all", growing)
    with pytest.raises(DataError, match="train.jsonl changed while it was read"):
        prepare(cfg)
    assert not (tmp_path / "train.bin").exists()


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    source = json_source(tmp_path, "train", TEXTS)
    blocked = dataclasses.replace(source, output=str(tmp_path / "file" / "train"))
    with pytest.raises(DataError, match=r"sources\[0\].output=.*file.*; free space or choose"):
        prepare(config(blocked))


def test_what_is_wrong_with_the_recipe(tmp_path):
    with pytest.raises(ConfigError, match="data.sources of data=test is empty"):
        prepare(config())
    source = json_source(tmp_path, "train", TEXTS)
    with pytest.raises(ConfigError, match="train twice"):
        prepare(config(source, source))
    with pytest.raises(ConfigError, match="prepare_workers=0 must be"):
        prepare(dataclasses.replace(config(source), prepare_workers=0))
    trained = TokenizerConfig(library="byte-level", train_vocab_size=300)
    with pytest.raises(ConfigError, match="trains a huggingface tokenizer"):
        prepare(config(source, tokenizer=trained))
    empty = TokenizerConfig(path=str(tmp_path / "t"), train_vocab_size=300)
    nothing = json_source(tmp_path, "nothing", [""])
    with pytest.raises(DataError, match="nothing to train a tokenizer on"):
        prepare(config(nothing, tokenizer=empty))


def test_ensure_prepared(tmp_path, capsys):
    cfg = config(json_source(tmp_path, "train", TEXTS))
    with pytest.raises(
        DataError, match=r"data.train\[0\].path=.*train: no .bin/.idx there; run: python -m data.p"
    ):
        ensure_prepared(cfg)
    ensure_prepared(dataclasses.replace(cfg, prepare_if_missing=True))
    assert "written" in capsys.readouterr().out
    ensure_prepared(cfg)
    assert capsys.readouterr().out == ""


def test_duplicates_in_code_are_dropped(tmp_path, monkeypatch):
    for name, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / f"{name}_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = SourceConfig(
        output=str(tmp_path / "train"),
        dataset="code",
        packages=["one_module", "two_module", "three_module"],
    )
    prepare(config(source))
    manifest = manifest_of(tmp_path / "train")
    assert (manifest.documents, manifest.skipped) == (2, {"duplicates": 1})
    assert [f.name for f in manifest.inputs] == [
        "one_module/one_module.py",
        "three_module/three_module.py",
    ]
    raw = json.loads((tmp_path / "train.json").read_text())
    assert raw["source"]["versions"] == dict.fromkeys(source.packages)
