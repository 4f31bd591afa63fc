"""From command-line overrides to one typed, checked Recipe.

Hydra composes, the schema checks; what Hydra and OmegaConf say about a bad key or value is
turned into one sentence that names the nearest valid key.
"""

import dataclasses
import difflib
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from recipes.errors import ConfigError, StrataError
from recipes.schema import Recipe

USAGE = """usage: python -m {module} [GROUP=CHOICE | KEY=VALUE]...

  experiment=NAME   one of: {experiments}
  --cfg             print the resolved recipe and stop
  --keys            print every key with its meaning and stop
  traceback=true    show where a user error came from

example: python -m {module} experiment=tiny stage.train_steps=20
"""


@cache
def valid_keys(node: type = Recipe) -> dict[str, str]:
    """Every dotted key of the recipe -> the type it takes, in schema order."""
    keys: dict[str, str] = {}
    for name, hint in get_type_hints(node).items():
        if dataclasses.is_dataclass(hint):
            keys |= {f"{name}.{k}": v for k, v in valid_keys(cast(type, hint)).items()}
        else:
            keys[name] = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
    return keys


def choices(group: str) -> list[str]:
    """The shipped recipes of a group, for messages."""
    from importlib.resources import files

    folder = files("recipes").joinpath(group)
    if not folder.is_dir():
        return []
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def groups() -> list[str]:
    """The groups of the recipe tree, for messages."""
    from importlib.resources import files

    found = (f for f in files("recipes").iterdir() if f.is_dir() and not f.name.startswith("_"))
    return sorted(f.name for f in found)


def nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean X?` for the closest of the valid names, or a list of some of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if not close and "." in name:  # right leaf, wrong group
        leaf = name.rsplit(".", 1)[1]
        close = [v for v in valid if v.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"did you mean {close[0]}?"
    shown = [v for v in valid if v.split(".")[0] == name.split(".")[0]] or list(valid)
    return "valid here: " + ", ".join(shown[:40])


def load_recipe(overrides: Sequence[str]) -> Recipe:
    """Compose `recipes/config.yaml` with `overrides` into a Recipe.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=tiny", "stage.train_steps=20"]`.

    Raises:
        ConfigError: unknown group, choice or key, a value of the wrong type, or a key that
            no group and no override sets.
    """
    ConfigStore.instance().store(name="schema", node=Recipe)
    _check_keys(overrides)
    try:
        with initialize_config_module("recipes", version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        return cast(Recipe, OmegaConf.to_object(composed))
    except MissingConfigException as error:
        raise ConfigError(_first_line(error)) from error
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key} is set by no recipe; give it on the command line") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every key resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def run_cli(main: Callable[[Recipe], int | None], module: str) -> None:
    """Run `main(recipe)` for the overrides in sys.argv and exit with its code.

    A StrataError is printed as one message and exits with 2; `traceback=true` shows where
    it came from.
    """
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help") for a in arguments):
        print(USAGE.format(module=module, experiments=", ".join(choices("experiment"))))
        raise SystemExit(0)
    if "--keys" in arguments:
        print(describe_keys())
        raise SystemExit(0)
    show = "--cfg" in arguments
    overrides = [a for a in arguments if a != "--cfg"]
    try:
        unknown = [a for a in overrides if a.startswith("-")]
        if unknown:
            raise ConfigError(f"{unknown[0]} is not an option; use --help, --cfg or --keys")
        recipe = load_recipe(overrides)
        if show:
            print(to_yaml(recipe), end="")
            raise SystemExit(0)
        raise SystemExit(main(recipe) or 0)
    except StrataError as error:
        if any(a.lower() == "traceback=true" for a in overrides):
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def describe_keys() -> str:
    """Every key with its type and the docstring under its field, from the schema's source."""
    import ast
    import inspect

    from recipes import schema

    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields: dict[str, str] = {}
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                fields[ast.unparse(statement.target)] = " ".join(text.split())
        docs[node.name] = fields
    hints = get_type_hints(Recipe)
    lines = []
    for key, kind in valid_keys().items():
        group, _, leaf = key.rpartition(".")
        owner = hints[group].__name__ if group in hints else "Recipe"
        text = docs.get(owner, {}).get(leaf, "")
        lines.append(f"{key} ({kind})\n    {text}")
    return "\n".join(lines)


def _check_keys(overrides: Sequence[str]) -> None:
    """Reject unknown groups, choices and keys with the nearest valid name."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override} is not an override; write KEY=VALUE or GROUP=CHOICE"
        ) from error
    keys, known = valid_keys(), groups()
    for override in parsed:
        key = override.key_or_group.lstrip("/")
        if override.is_delete() or override.is_add() or override.is_force_add():
            raise ConfigError(
                f"{override.input_line}: keys are fixed by the schema and can neither be "
                "added (+) nor deleted (~); write KEY=VALUE"
            )
        if key in known:
            value = override.value()
            if isinstance(value, str) and value not in choices(key):
                raise ConfigError(
                    f"{key}={value} is not a recipe; use one of {', '.join(choices(key))}"
                )
            continue
        root = key.split("[")[0]
        if root in keys or any(k.startswith(root + ".") for k in keys):
            continue
        if any(root.startswith(k + ".") and "dict" in keys[k] + "list" for k in keys):
            continue  # an element of a list or mapping: OmegaConf checks it
        raise ConfigError(
            f"{override.input_line}: unknown key {key}; {nearest(key, [*keys, *known])}"
        )


def _explain(error: BaseException) -> str:
    """One sentence for what Hydra or OmegaConf said, with the cause's key and type."""
    cause: Any = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    if isinstance(error, ConfigCompositionException) and cause is error:
        return _first_line(error)
    key = getattr(cause, "full_key", None)
    text = _first_line(cause)
    if key:
        kind = valid_keys().get(key)
        if kind is not None:
            return f"{key}: {text}; it takes {kind}"
        if "not in" in text:
            return f"unknown key {key}; {nearest(key, list(valid_keys()))}"
        return f"{key}: {text}"
    return text


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
