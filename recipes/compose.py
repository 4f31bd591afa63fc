"""From command-line overrides to one typed, checked Recipe.

Hydra composes, the schema checks; what Hydra and OmegaConf say about a bad key or value is
turned into one sentence that names the nearest valid key.
"""

import contextlib
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from recipes.errors import ConfigError, StrataError, on_every_rank
from recipes.keys import describe_keys, nearest, plain_key, valid_keys
from recipes.schema import Recipe
from recipes.stage_keys import check_entry, differences, split_entry
from recipes.stages import choose, stage_recipes, with_keys

_SHIPPED = Path(__file__).parent
"""The recipes of this package."""

MULTIRUN = ("-m", "--multirun")
"""Hydra's names of the option that lets a key have several values."""

USAGE = """usage: python -m {module} [GROUP=CHOICE | KEY=VALUE]...

  experiment=NAME   one of: {experiments}
  --config-dir DIR  look for recipes in DIR too: DIR/experiment/mine.yaml is experiment=mine
  --cfg             print the resolved recipe and stop
  --keys            print every key with its meaning and stop
  traceback=true    show where a user error came from

example: python -m {module} experiment=tiny stage.train_steps=20
"""


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """The recipes of a group: those shipped and those of the user's folder."""
    found = [f for root in _roots(config_dir) for f in (root / group).glob("*.yaml")]
    return sorted({f.stem for f in found})


def groups(config_dir: Path | None = None) -> list[str]:
    """The groups of the recipe tree: folders that hold recipes."""
    found = [f for root in _roots(config_dir) for f in root.glob("*/*.yaml")]
    return sorted({f.parent.name for f in found})


def load_recipe(overrides: Sequence[str], config_dir: Path | str | None = None) -> Recipe:
    """Compose `recipes/config.yaml` with `overrides` into a Recipe.

    Args:
        overrides: Hydra overrides, e.g. `["experiment=tiny", "stage.train_steps=20"]`.
        config_dir: a folder with recipes of the user's own, in the same groups.

    Returns:
        The recipe. What its stages change is written out as keys, whatever recipes they chose; with
        `run.stage=NAME`, the recipe of that stage alone.

    Raises:
        ConfigError: unknown group, choice or key, a value of the wrong type, a key that no
            group and no override sets, a recipe file that cannot be read, or a stage that is not
            there.
    """
    folder = _existing(config_dir)
    parsed = _check_keys(overrides, folder)
    composed = _compose(overrides, parsed, folder)
    recipe = _typed(composed)
    for name, entry in list(recipe.stages.items()):
        if entry is None:
            del recipe.stages[name]
            continue
        chosen, keys = split_entry(name, entry)
        for group, choice in chosen.items():
            if choice not in choices(group, folder):
                raise ConfigError(
                    f"stages.{name}.{group}={choice}: there is no such recipe; use one of "
                    + ", ".join(choices(group, folder))
                )
        with _said_of_stage(name):
            staged = _compose(overrides, parsed, folder, chosen) if chosen else composed
            staged = cast(DictConfig, with_keys(staged, keys))
            recipe.stages[name] = differences(recipe, _typed(staged))
    return choose(recipe, recipe.run.stage) if recipe.run.stage is not None else recipe


def _compose(
    overrides: Sequence[str],
    parsed: list[Override],
    folder: Path | None,
    chosen: Mapping[str, str] | None = None,
) -> DictConfig:
    """What Hydra makes of the overrides, with other choices for some groups."""
    ConfigStore.instance().store(name="schema", node=Recipe)
    # Stages of the command line may be new, which keys of a recipe may not: Hydra refuses them.
    stages = [o for o in parsed if o.key_or_group.split(".")[0] == "stages"]
    words = [
        word
        for word, o in zip(overrides, parsed, strict=True)
        if o not in stages and o.key_or_group.lstrip("/") not in (chosen or {})
    ]
    words += [f"{group}={choice}" for group, choice in (chosen or {}).items()]
    if folder:
        # Not as_uri: Hydra takes %20 for three characters, and goes on without the folder.
        words.append(f"hydra.searchpath=[{quoted(f'file://{folder}')}]")
    with _explained(folder):
        with initialize_config_module("recipes", version_base="1.3"):
            composed = compose("config", overrides=words)
        for override in stages:
            _set_stage(composed, override.key_or_group, override.value())
    return composed


def _set_stage(composed: DictConfig, key: str, value: Any) -> None:
    """Put one override into what the recipe says of its stages."""
    _, name, within = [*key.split(".", 2), None, None][:3]
    with open_dict(composed.stages):
        if name is None:
            composed.stages = value
        elif within is None:
            composed.stages[name] = value
        else:  # as a key of its own, after those of the recipe: it may follow a choice
            if composed.stages.get(name) is None:
                composed.stages[name] = {}
            composed.stages[name].pop(within, None)
            composed.stages[name][within] = value


def _typed(composed: DictConfig) -> Recipe:
    with _explained(None):
        return cast(Recipe, OmegaConf.to_object(composed))


@contextlib.contextmanager
def _said_of_stage(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stages.{name}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"stages.{name}: {_explain(error)}") from error


@contextlib.contextmanager
def _explained(folder: Path | None) -> Iterator[None]:
    """Turn what Hydra and OmegaConf say into one sentence."""
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing(error, folder)) from error
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{key} is set by no recipe; give it on the command line") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"a recipe is not valid YAML: {text}") from error


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every key resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def points(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Every combination of the values of a sweep (`optimizer.lr=1e-3,2e-3`, Hydra's grammar).

    Returns:
        A name made of the values, fit for a folder -> overrides; one entry, named "", if nothing
        is swept.

    Raises:
        ConfigError: what is no override, or two points of one name.
    """
    axes = []
    for override in _parsed(overrides):
        key = override.get_key_element()
        if override.is_sweep_override():
            short = key.split(".")[-1]
            axes.append([(f"{key}={v}", f"{short}-{v}") for v in override.sweep_string_iterator()])
        else:
            axes.append([(str(override.input_line), "")])
    found: dict[str, list[str]] = {}
    for point in itertools.product(*axes):
        name = re.sub(r"[^\w.+-]+", "-", "_".join(label for _, label in point if label))
        if name in found:
            raise ConfigError(f"two points of the sweep would be called {name}; give other values")
        found[name] = [override for override, _ in point]
    return found


def quoted(text: str) -> str:
    """A text as a value of an override, whatever its characters are in Hydra's grammar."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides of a command line, and the value of --config-dir.

    Raises:
        ConfigError: --config-dir without a value.
    """
    overrides = list(arguments)
    config_dir = _take_option(overrides, "--config-dir")
    return overrides, Path(config_dir) if config_dir else None


def run_cli(
    main: Callable[[Recipe], int | None],
    module: str,
    sweeps: bool = False,
    all_stages: bool = False,
) -> None:
    """Run `main(recipe)` for the overrides in sys.argv and exit with its code.

    With `sweeps`, `--multirun` lets keys have several values: `main` gets the recipe of the first
    point, and reads the others from sys.argv (see `points`). Without `all_stages`, `main` looks at
    one stage: of a recipe with several it gets the first, which is said.

    A StrataError is printed as one message (by rank 0 alone if every rank raises it) and exits with
    its code, 2; `traceback=true` shows where it came from. Ctrl-C exits with 130, unless `main`
    handles it.
    """
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help") for a in arguments):
        print(USAGE.format(module=module, experiments=", ".join(choices("experiment"))))
        raise SystemExit(0)
    if "--keys" in arguments:
        print(describe_keys())
        raise SystemExit(0)
    show = "--cfg" in arguments
    flags = ["--cfg", *(MULTIRUN if sweeps else [])]
    overrides = [a for a in arguments if a not in flags]
    try:
        overrides, config_dir = split_arguments(overrides)
        unknown = [a for a in overrides if a.startswith("-")]
        if unknown:
            if unknown[0] in MULTIRUN:
                raise ConfigError(f"{unknown[0]}: only python -m slurm.submit sweeps")
            raise ConfigError(
                f"{unknown[0]} is not an option; use --help, --config-dir DIR, --cfg or --keys"
            )
        if set(MULTIRUN) & set(arguments):
            overrides = next(iter(points(overrides).values()))
        with on_every_rank():
            recipe = load_recipe(overrides, config_dir)
        if show:
            print(to_yaml(recipe), end="")
            raise SystemExit(0)
        if recipe.stages and not all_stages:
            names = list(recipe.stages)
            print(
                f"stage {names[0]} of {', '.join(names)}; run.stage=NAME chooses another",
                file=sys.stderr,
            )
            recipe = stage_recipes(recipe)[0]
        raise SystemExit(main(recipe) or 0)
    except StrataError as error:
        if any(a.lower() == "traceback=true" for a in overrides):
            traceback.print_exc()
        if not (error.on_every_rank and _rank()):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was saved", file=sys.stderr)
        raise SystemExit(130) from None


def refuse_stages(recipe: Recipe, module: str) -> None:
    """For a command that runs `python -m train` with keys of its own: those of a stage come after
    them.

    Raises:
        ConfigError: the recipe has stages, or is one of them.
    """
    if recipe.stages or any(a.startswith("run.stage=") for a in sys.argv[1:]):
        raise ConfigError(
            f"python -m {module} takes a recipe without stages, whose keys would come after its "
            "own; give another experiment and the stage's keys"
        )


def _rank() -> int:
    """This process's number among those a launcher started."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(number) if number.isdigit() else 0


def _roots(config_dir: Path | None) -> list[Path]:
    return [_SHIPPED, *([config_dir] if config_dir else [])]


def _existing(config_dir: Path | str | None) -> Path | None:
    if config_dir is None:
        return None
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder; give one with recipes in it")
    shipped = {f.relative_to(_SHIPPED) for f in _SHIPPED.rglob("*.yaml")}
    for file in sorted(folder.glob("*/*.yaml")):
        if file.relative_to(folder) in shipped:  # Hydra would read the shipped one
            raise ConfigError(f"{file} has the name of a shipped recipe; give it another name")
    return folder


def _take_option(arguments: list[str], name: str) -> str | None:
    """Remove `name VALUE` or `name=VALUE` from the arguments and return VALUE."""
    for i, argument in enumerate(arguments):
        if argument.startswith(name + "="):
            return arguments.pop(i).split("=", 1)[1]
        if argument == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name} needs a value; write {name} DIR")
            del arguments[i]
            return arguments.pop(i)
    return None


def _parsed(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override} is not an override; write KEY=VALUE or GROUP=CHOICE, and quote "
            "values with spaces or special characters: 'KEY=\"VALUE\"'"
        ) from error


def _check_keys(overrides: Sequence[str], config_dir: Path | None) -> list[Override]:
    """Reject unknown groups, choices and keys with the nearest valid name; return the others."""
    parsed = _parsed(overrides)
    keys, known = valid_keys(), groups(config_dir)
    for override in parsed:
        key = override.key_or_group.lstrip("/")
        if override.is_delete() or override.is_add() or override.is_force_add():
            raise ConfigError(
                f"{override.input_line}: keys are fixed by the schema and can neither be "
                "added (+) nor deleted (~); write KEY=VALUE"
            )
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line}: one run takes one value; write a list as [A,B]; "
                "python -m slurm.submit --multirun queues a run for each value of a sweep"
            )
        if key in known:
            value = override.value()
            for choice in value if isinstance(value, list) else [value]:
                if not isinstance(value, dict) and choice not in choices(key, config_dir):
                    raise ConfigError(
                        f"{override.input_line}: there is no such recipe; use one of "
                        + ", ".join(choices(key, config_dir))
                    )
        elif key.split(".")[0] == "stages":
            check_entry(key, override.value())
        elif (plain := plain_key(key)) not in keys and not any(
            k.startswith((plain + ".", plain + "[].")) or plain == k + "[]" for k in keys
        ):
            hint = nearest(plain, [*keys, *known], known)
            raise ConfigError(f"{override.input_line}: unknown key {key}; {hint}")
        elif keys.get(plain, "").startswith("list") and isinstance(override.value(), list):
            _check_elements(key, cast(list[Any], override.value()))
    return parsed


def _check_elements(key: str, elements: list[Any]) -> None:
    """Keys inside `data.train=[{path: a, weight: 1}]`, which OmegaConf reports without their
    place."""
    keys = valid_keys()
    for i, element in enumerate(elements):
        for name in element if isinstance(element, dict) else ():
            if f"{key}[].{name}" not in keys:
                raise ConfigError(
                    f"unknown key {key}[{i}].{name}; {nearest(f'{key}[].{name}', keys, groups())}"
                )


def _missing(error: MissingConfigException, config_dir: Path | None) -> str:
    """One sentence for a recipe that names another that is not there."""
    wanted = str(getattr(error, "missing_cfg_file", None) or "").lstrip("/")
    group = wanted.split("/")[0]
    text = _first_line(error)
    return f"{text}; use one of {', '.join(choices(group, config_dir))}" if group else text


def _explain(error: BaseException) -> str:
    """One sentence for what Hydra or OmegaConf said, with the cause's file, key and type."""
    cause: Any = error
    while not getattr(cause, "full_key", None):  # the first error that names its key says most
        if not isinstance(inner := cause.__cause__ or cause.__context__, OmegaConfBaseException):
            break
        cause = inner
    text = _first_line(cause)
    file = re.match(r"In '(.*?)': ", str(error))
    where = f"recipe {file[1]}: " if file else ""
    key = getattr(cause, "full_key", None)
    if not key:
        return text
    plain = plain_key(key)
    kind = valid_keys().get(plain)
    if kind is not None:
        return f"{where}{key}: {text}; it takes {kind}"
    if " not in '" in text:
        return f"{where}unknown key {key}; {nearest(plain, valid_keys(), groups())}"
    # OmegaConf names an element of a list without its place: say which override it is in.
    return f"{where or _first_line(error) + ': '}{key}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
