"""What a stage may change, as it is written in a recipe: recipes of groups, and keys."""

import re
from dataclasses import fields, is_dataclass
from typing import Any

from recipes.errors import ConfigError
from recipes.keys import nearest, plain_key, valid_keys
from recipes.schema import Recipe

STAGE_GROUPS = ("data", "optimizer", "precision", "parallel", "stage")
"""Groups of which a stage may choose another recipe, and whose keys it may set."""

_OTHER_KEYS = ("checkpoint.save_interval",)
_SHARED = ("data.tokenizer", "precision.params_dtype", "optimizer.optimizer", "stage.name")
"""What the stages of a run have in common: they train one set of parameters on one vocabulary."""


def split_entry(name: str, entry: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The recipes a stage chooses, and its keys, dotted, in the order they are written.

    Raises:
        ConfigError: something a stage cannot change.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"stages.{name} is no name for a stage; use letters, digits and _")
    if not isinstance(entry, dict):
        raise ConfigError(
            f"stages.{name}={entry} is no stage; write what it changes: {{data: NAME, "
            "stage.train_tokens: 1e12}, or {} for nothing"
        )
    chosen: dict[str, str] = {}
    keys: dict[str, Any] = {}
    for key, value in entry.items():
        if key in STAGE_GROUPS and isinstance(value, str):
            chosen[key] = value
            continue
        for inner, leaf in _leaves(str(key), value).items():
            _check_key(name, inner)
            keys[inner] = leaf
    return chosen, keys


def check_entry(key: str, value: Any) -> None:
    """Check one override of the command line, `stages.NAME...=value`.

    Raises:
        ConfigError: something a stage cannot change.
    """
    name, *rest = key.split(".")[1:] or [""]
    if not name:
        if not isinstance(value, dict):
            raise ConfigError(f"stages={value} must be a mapping: {{NAME: {{KEY: VALUE}}}}")
        for inner, entry in value.items():
            check_entry(f"stages.{inner}", entry)
    elif not rest:
        if value is not None:
            split_entry(name, value)
    else:
        split_entry(name, {".".join(rest): value})


def differences(base: Recipe, stage: Recipe) -> dict[str, Any]:
    """Dotted key -> value of what a stage has otherwise than its recipe, lists as a whole."""
    old = _flat(base)
    return {
        key: value
        for key, value in _flat(stage).items()
        if value != old[key] and key.partition(".")[0] not in ("stages", "run")
    }


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            found |= _flat(value, f"{prefix}{item.name}.")
        else:
            found[f"{prefix}{item.name}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Lists and elements of lists as YAML has them."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _leaves(key: str, value: Any) -> dict[str, Any]:
    """Dotted key -> value below a nested mapping."""
    if not isinstance(value, dict) or key in valid_keys():
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(f"{key}.{name}", inner)
    return found


def _check_key(name: str, key: str) -> None:
    group, keys = key.partition(".")[0], valid_keys()
    allowed = group in STAGE_GROUPS or key in _OTHER_KEYS
    if allowed and plain_key(key) not in keys:
        raise ConfigError(
            f"unknown key stages.{name}.{key}; {nearest(plain_key(key), keys, STAGE_GROUPS)}"
        )
    if not allowed and (key in keys or any(k.startswith(f"{key}.") for k in keys)):
        raise ConfigError(
            f"stages.{name}.{key} is the same in every stage; a stage changes keys of "
            f"{', '.join(STAGE_GROUPS)}, and {', '.join(_OTHER_KEYS)}"
        )
    if not allowed:
        raise ConfigError(
            f"unknown key stages.{name}.{key}; {nearest(plain_key(key), keys, STAGE_GROUPS)}"
        )
    if any(key == k or key.startswith(f"{k}.") for k in _SHARED):
        raise ConfigError(
            f"stages.{name}.{key} is the same in every stage; set {key} of the recipe itself"
        )
