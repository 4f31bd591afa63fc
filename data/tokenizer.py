"""Tokenizers: Megatron's objects, the picklable codec the workers use, and BPE training.

Three libraries of `megatron.core.tokenizers` are offered: `huggingface` (a directory),
`tiktoken` (a JSON list of {rank, token_bytes, token_str}) and `byte-level` (nothing).
Nothing here imports megatron or transformers until a tokenizer is really built: a training
run finds vocabulary size and end-of-document id in the manifest instead.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.files import sha256_file, sha256_json, write_json
from recipes.errors import ConfigError, DataError
from recipes.schema import TokenizerConfig

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

LIBRARIES = ("huggingface", "tiktoken", "byte-level")
END_OF_TEXT = "<|endoftext|>"

# Megatron's defaults (eos 0, pad 1) are bytes that text may hold.
_BYTE_LEVEL = {"vocab_size": 264, "_eos_id": 256, "_pad_id": 257, "_bos_id": 258}
# What of a directory decides the ids; a model directory also holds weights and prose.
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges")
# More text hardly moves the merges of a small vocabulary, and training time is linear in it.
_TRAINING_BYTES = 8_000_000


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer wrote a file, and what a reader must know of it."""

    library: str
    path: str | None
    sha256: str
    """Hash over the names and contents of the tokenizer's files."""
    vocab_size: int
    eod: int
    """Id that ends every document."""


class Codec:
    """Text to ids and back, without control tokens; small enough to send to a worker.

    A document that contains the *text* of a control token (tokenizer sources do) must not
    end a document, so such text is encoded like any other.
    """

    def __init__(self, library: str, engine: Any, control: bool = False) -> None:
        """`engine`: tokenizers.Tokenizer, tiktoken.Encoding, or None for bytes. `control`: the text
        of a control token is that token, as whoever writes a prompt means it."""
        self._library, self._engine, self._control = library, engine, control
        self._set_engine()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_engine()  # not part of its pickled state

    def _set_engine(self) -> None:
        if self._library == "huggingface":
            self._engine.encode_special_tokens = not self._control

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of one text, without end of document."""
        if self._library == "huggingface":
            ids = self._engine.encode(text, add_special_tokens=False).ids
        elif self._library == "tiktoken" and self._control:
            ids = self._engine.encode(text, allowed_special="all")
        elif self._library == "tiktoken":
            ids = self._engine.encode_ordinary(text)
        else:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens of a byte-level vocabulary have no text."""
        ids = [int(i) for i in ids]
        if self._library == "huggingface":
            return str(self._engine.decode(ids, skip_special_tokens=False))
        if self._library == "tiktoken":
            return str(self._engine.decode(ids))
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def tokenizer_sha256(cfg: TokenizerConfig) -> str:
    """Hash of the files that decide the ids of the configured tokenizer.

    Raises:
        ConfigError: unknown library or no path.
        DataError: the path does not exist or holds no tokenizer.
    """
    files = _tokenizer_files(cfg)
    settings = _BYTE_LEVEL if cfg.library == "byte-level" else {}
    return sha256_json([cfg.library, settings, [(f.name, sha256_file(f)) for f in files]])


def build_tokenizer(cfg: TokenizerConfig) -> "MegatronTokenizerText":
    """The configured tokenizer as Megatron's own object.

    Raises:
        ConfigError: unknown library or no path.
        DataError: nothing there, unreadable, or no end-of-document token.
    """
    _tokenizer_files(cfg)
    from megatron.core.tokenizers import MegatronTokenizer

    keywords: dict[str, Any] = {}
    if cfg.library == "byte-level":
        keywords = dict(_BYTE_LEVEL)
    elif cfg.library == "huggingface":
        keywords = {"include_special_tokens": False}
    elif cfg.library == "tiktoken":
        keywords = _tiktoken_size(Path(cfg.path or ""))
    metadata = {"library": cfg.library}
    try:
        tokenizer = MegatronTokenizer.from_pretrained(cfg.path, metadata_path=metadata, **keywords)
    except (ValueError, AssertionError, OSError) as error:
        reason = str(error).strip().splitlines() or ["not in the form of that library"]
        raise DataError(
            f"data.tokenizer.path={cfg.path} is not a {cfg.library} tokenizer: {reason[0]}"
        ) from error
    if tokenizer.eod is None:
        raise DataError(
            f"data.tokenizer.path={cfg.path} has no end-of-document token; set eos_token in "
            "its tokenizer_config.json"
        )
    return tokenizer


def identify(cfg: TokenizerConfig, tokenizer: "MegatronTokenizerText") -> TokenizerIdentity:
    """What a manifest keeps of a tokenizer."""
    return TokenizerIdentity(
        library=cfg.library,
        path=cfg.path,
        sha256=tokenizer_sha256(cfg),
        vocab_size=int(tokenizer.vocab_size),
        eod=int(tokenizer.eod),
    )


def codec(tokenizer: "MegatronTokenizerText", control: bool = False) -> Codec:
    """The codec inside a Megatron tokenizer, which gives the same ids (a test compares).

    control: for prompts: the text of a control token is that token. Of one tokenizer, not together
    with a codec for documents.
    """
    library = str(tokenizer.library)
    engine = None
    # Megatron's wrapper goes through lists of token strings, several times slower, and lets
    # control tokens through: take the engine it wraps.
    if library == "huggingface":
        engine = tokenizer._tokenizer.tokenizer.backend_tokenizer
        engine.no_truncation()
        engine.no_padding()
    elif library == "tiktoken":
        engine = tokenizer._tokenizer.tokenizer
    return Codec(library, engine, control)


def is_trained(cfg: TokenizerConfig) -> bool:
    """Whether there is a tokenizer at `path`; false only if one is to be trained.

    Raises:
        ConfigError: the one that is there was trained for another vocabulary size.
    """
    if cfg.train_vocab_size is None or cfg.path is None:
        return True
    if not (Path(cfg.path) / "tokenizer.json").is_file():
        return False
    record = Path(cfg.path) / "training.json"
    if not record.is_file():
        return True  # a tokenizer from elsewhere
    size = json.loads(record.read_text())["train_vocab_size"]
    if size != cfg.train_vocab_size:
        raise ConfigError(
            f"data.tokenizer.train_vocab_size={cfg.train_vocab_size}, but the tokenizer at "
            f"data.tokenizer.path={cfg.path} was trained for {size}; use that size or "
            "another path"
        )
    return True


def train_bpe(texts: Iterable[str], path: Path, vocab_size: int) -> int:
    """Train a byte-level BPE and save it as a Hugging Face directory.

    The same texts give the same files. Only about the first 8 MB are used: pass texts that
    are spread over the corpus.

    Args:
        texts: documents.
        path: directory to write; tokenizer.json comes last, so it is complete or absent.
        vocab_size: tokens, the 256 bytes and the end-of-text token included.

    Returns:
        Tokens learned: fewer than asked for if the texts have no more merges.

    Raises:
        ConfigError: vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.train_vocab_size={vocab_size} is below 257, the 256 bytes and "
            "the end-of-text token; use 257 or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts), trainer)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "training.json", {"train_vocab_size": vocab_size})
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    temporary = path / "tokenizer.json.tmp"
    tokenizer.save(str(temporary))
    os.replace(temporary, path / "tokenizer.json")
    return int(tokenizer.get_vocab_size())


def _first_bytes(texts: Iterable[str]) -> Iterator[str]:
    left = _TRAINING_BYTES
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def _tokenizer_files(cfg: TokenizerConfig) -> list[Path]:
    if cfg.library not in LIBRARIES:
        raise ConfigError(
            f"data.tokenizer.library={cfg.library} is unknown; use one of {', '.join(LIBRARIES)}"
        )
    if cfg.library == "byte-level":
        return []
    if cfg.path is None:
        raise ConfigError(
            f"data.tokenizer.library={cfg.library} needs data.tokenizer.path; set it to a "
            + ("directory" if cfg.library == "huggingface" else "JSON file")
        )
    path = Path(cfg.path)
    if cfg.library == "tiktoken":
        if not path.is_file() or path.suffix != ".json":
            raise DataError(
                f"data.tokenizer.path={cfg.path} is no .json file, as tiktoken needs; give the "
                "list of {rank, token_bytes, token_str}"
            )
        return [path]
    files = []
    if path.is_dir():
        files = sorted(
            f
            for f in path.iterdir()
            if f.is_file()
            and (f.name.startswith(_TOKENIZER_FILES) or f.suffix in (".model", ".tiktoken"))
            and f.suffix != ".tmp"
        )
    if not files:
        state = "holds no tokenizer" if path.is_dir() else "does not exist"
        raise DataError(
            f"data.tokenizer.path={cfg.path} {state}; point it at a directory with "
            "tokenizer.json, or train one: python -m data.prepare with "
            "data.tokenizer.train_vocab_size set"
        )
    return files


def _tiktoken_size(path: Path) -> dict[str, int]:
    """Megatron's defaults (131072 of which 1000 special) cut to the ranks in the file."""
    try:
        ranks = len(json.loads(path.read_text()))
    except ValueError as error:
        raise DataError(f"data.tokenizer.path={path} is not JSON: {error}") from error
    special = 1000
    return {"num_special_tokens": special, "vocab_size": min(131072, ranks + special)}
