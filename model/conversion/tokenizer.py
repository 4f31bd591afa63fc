"""The tokenizer and other small files that travel with the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from recipes.errors import CheckpointError

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that are the tokenizer's matter."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that are there."""
    for name in _TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def copy_extras(source: Path, target: Path) -> None:
    """Copy every file of a Hugging Face folder but the weights and their index."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights:
            shutil.copyfile(file, target / file.name)


def special_tokens(folder: Path) -> dict[str, int | None]:
    """SPECIAL as the tokenizer has them; None: has none."""
    config = read_json(folder / "special_tokens_map.json")
    config |= read_json(folder / "tokenizer_config.json")
    tokenizer = read_json(folder / "tokenizer.json")
    if not tokenizer:
        return {}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []}
    result: dict[str, int | None] = {}
    for field in SPECIAL:
        token = config.get(field.removesuffix("_id"))
        text = token.get("content") if isinstance(token, dict) else token
        result[field] = ids.get(text)
    return result


def stop_tokens(folder: Path) -> set[int]:
    """The tokens at which a text ends, by the folder's own word: of its generation_config.json and
    config.json, which may name several."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in tokens):
            raise CheckpointError(
                f"{folder / name}: eos_token_id={json.dumps(value)} is neither a token nor a list "
                "of tokens; correct it"
            )
        found.update(tokens)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a file; none if it is not there.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; restore it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no fields; restore it")
    return found
