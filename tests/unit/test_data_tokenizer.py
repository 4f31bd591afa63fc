"""Tokenizers: lossless, deterministic, the same as Megatron's, clear about what is missing."""

import base64
import json
import pickle
import shutil
from pathlib import Path

import pytest

from data.tokenizer import build_tokenizer, codec, is_trained, tokenizer_sha256, train_bpe
from recipes.errors import ConfigError, DataError
from recipes.schema import TokenizerConfig
from tests.fixtures.corpus import make_texts

TEXTS = make_texts(200)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(TEXTS, path, 400)
    return TokenizerConfig(path=str(path), train_vocab_size=400)


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    pieces = [bytes([i]) for i in range(256)] + [b"al", b"alpha", b" be", b"ta"]
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": ""}
        for i, p in enumerate(pieces)
    ]
    path = tmp_path_factory.mktemp("tiktoken") / "ranks.json"
    path.write_text(json.dumps(rows))
    return TokenizerConfig(library="tiktoken", path=str(path))


@pytest.fixture(params=["huggingface", "tiktoken", "byte-level"])
def cfg(request, bpe, tiktoken_file) -> TokenizerConfig:
    byte_level = TokenizerConfig(library="byte-level")
    return {"huggingface": bpe, "tiktoken": tiktoken_file, "byte-level": byte_level}[request.param]


def test_round_trip_is_exact_and_never_ends_a_document(cfg):
    tokenizer = build_tokenizer(cfg)
    encoder = codec(tokenizer)
    for text in TEXTS + ["", "trailing blanks  \n\n", "</s><pad><s>"]:
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text
        assert tokenizer.eod not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_codec_gives_megatrons_ids(cfg):
    tokenizer = build_tokenizer(cfg)
    encoder = codec(tokenizer)
    for text in ["alpha beta\n  return {}", "Grün 数据 \t self"]:  # no control tokens in these
        assert list(encoder.encode(text)) == list(tokenizer.tokenize(text))


def test_control_tokens_are_tokens_in_prompts_alone(bpe, tiktoken_file, tmp_path):
    from tokenizers import AddedToken, Tokenizer

    thinking = tmp_path / "thinking"
    shutil.copytree(bpe.path, thinking)
    engine = Tokenizer.from_file(f"{thinking}/tokenizer.json")
    engine.add_special_tokens([AddedToken("</think>", special=True, normalized=False)])
    engine.save(f"{thinking}/tokenizer.json")
    for cfg, text, token in (
        (TokenizerConfig(path=str(thinking)), "</think>", engine.token_to_id("</think>")),
        (bpe, "<|endoftext|>", build_tokenizer(bpe).eod),
        (tiktoken_file, "</s>", build_tokenizer(tiktoken_file).eod),
    ):
        prompts = codec(build_tokenizer(cfg), control=True)
        assert token is not None and list(prompts.encode(text)) == [token]
        documents = codec(build_tokenizer(cfg))
        for encoder in (documents, pickle.loads(pickle.dumps(documents))):
            assert (
                token not in encoder.encode(text) and encoder.decode(encoder.encode(text)) == text
            )


def test_codec_survives_pickling(cfg):
    encoder = codec(build_tokenizer(cfg))
    copy = pickle.loads(pickle.dumps(encoder))
    for text in TEXTS:
        assert list(copy.encode(text)) == list(encoder.encode(text))


def test_trained_tokenizer(bpe, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bpe.path)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == "<|endoftext|>"
    assert build_tokenizer(bpe).eod == tokenizer.eos_token_id
    # merges were learned: fewer tokens than bytes
    assert len(codec(build_tokenizer(bpe)).encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    train_bpe(TEXTS, tmp_path / "again", 400)
    again = TokenizerConfig(path=str(tmp_path / "again"))
    assert tokenizer_sha256(again) == tokenizer_sha256(bpe)


def test_hash_follows_the_files_not_the_place(bpe, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in Path(bpe.path).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    (moved / "model.safetensors").write_bytes(b"weights")
    cfg = TokenizerConfig(path=str(moved))
    assert tokenizer_sha256(cfg) == tokenizer_sha256(bpe)
    settings = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "alpha"}))
    assert tokenizer_sha256(cfg) != tokenizer_sha256(bpe)


def test_trained_for_another_size(bpe):
    assert is_trained(bpe)
    with pytest.raises(ConfigError, match="train_vocab_size=500.*trained for 400"):
        is_trained(TokenizerConfig(path=bpe.path, train_vocab_size=500))


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (TokenizerConfig(library="sentencpiece"), ConfigError, "library=sentencpiece.*huggingface"),
        (TokenizerConfig(library="huggingface"), ConfigError, "needs data.tokenizer.path"),
        (TokenizerConfig(path="no/where"), DataError, "path=no/where does not exist"),
        (TokenizerConfig(path="tests"), DataError, "path=tests holds no tokenizer"),
        (TokenizerConfig(library="tiktoken", path="no.json"), DataError, "path=no.json"),
    ],
)
def test_what_is_wrong_with_the_recipe(cfg, error, message):
    with pytest.raises(error, match=message):
        build_tokenizer(cfg)


def test_damaged_and_endless_tokenizers(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not a huggingface tokenizer"):
        build_tokenizer(TokenizerConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_bytes((Path(bpe.path) / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(DataError, match="no end-of-document token"):
        build_tokenizer(TokenizerConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="train_vocab_size=256 is below 257"):
        train_bpe(TEXTS, tmp_path / "small", 256)
