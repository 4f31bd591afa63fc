"""Every key of a recipe: its type, its meaning, and the nearest one to a mistake."""

import ast
import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import cast, get_args, get_type_hints

from recipes import schema
from recipes.schema import Recipe


@cache
def valid_keys() -> dict[str, str]:
    """Every dotted key of the recipe -> the type it takes, in schema order. `data.train[].path`
    is a key of each element of the list `data.train`."""
    return {key: kind for key, kind, _ in _fields(Recipe, "")}


def plain_key(key: str) -> str:
    """The key of any element: `data.train[0].path` or `data.train.0.path` ->
    `data.train[].path`."""
    return re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "[]", key)


def nearest(name: str, valid: Iterable[str], groups: Iterable[str]) -> str:
    """`did you mean X?` for the closest of the valid names, or where to find them."""
    valid = list(valid)
    parent, _, leaf = name.rpartition(".")
    leaves = {v.rpartition(".")[2]: v for v in reversed(valid)}
    siblings = {v.rpartition(".")[2]: v for v in valid if v.rpartition(".")[0] == parent}
    if leaf in leaves:  # right name, wrong group
        return f"did you mean {leaves[leaf]}?"
    for candidates in (siblings, leaves):
        close = difflib.get_close_matches(leaf, candidates, n=1, cutoff=0.7)
        if close:
            return f"did you mean {candidates[close[0]]}?"
    if parent.endswith("[]") and siblings:
        return f"{parent} takes " + ", ".join(siblings.values())
    return "the groups are " + ", ".join(groups) + "; --keys prints every key"


def describe_keys() -> str:
    """Every key with its type and the docstring under its field."""
    docs = _docstrings()
    return "\n".join(
        f"{key} ({kind})\n    {docs[field]}" for key, kind, field in _fields(Recipe, "")
    )


def _fields(node: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, type, `Class.field`) of every field below a dataclass."""
    for name, hint in get_type_hints(node).items():
        arguments = get_args(hint)
        element = arguments[0] if arguments else None
        if dataclasses.is_dataclass(hint):
            yield from _fields(cast(type, hint), f"{prefix}{name}.")
        elif dataclasses.is_dataclass(element):
            element = cast(type, element)
            yield f"{prefix}{name}", f"list[{element.__name__}]", f"{node.__name__}.{name}"
            yield from _fields(element, f"{prefix}{name}[].")
        else:
            kind = str(hint) if arguments else getattr(hint, "__name__", str(hint))
            yield f"{prefix}{name}", kind, f"{node.__name__}.{name}"


def _docstrings() -> dict[str, str]:
    """`Class.field` -> the docstring under it in recipes/schema.py."""
    docs: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = str(ast.literal_eval(following.value))
                docs[f"{node.name}.{ast.unparse(statement.target)}"] = " ".join(text.split())
    return docs
