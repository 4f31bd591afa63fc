"""`python -m model.convert to_hf runs/mine exported`: Megatron <-> Hugging Face checkpoints.

    python -m model.convert to_hf RUN_OR_CHECKPOINT FOLDER [convert.KEY=VALUE]...
    python -m model.convert from_hf FOLDER CHECKPOINT [convert.KEY=VALUE]...

Nothing is downloaded and no model is built: tensors go from file to file.
"""

import sys

from recipes.compose import run_cli
from recipes.errors import ConfigError
from recipes.schema import ConvertConfig, Recipe

DIRECTIONS = ("to_hf", "from_hf")


def main() -> None:
    """Entry point; everything heavy is imported behind it."""
    words = sys.argv[1:]
    paths = [w for w in words if "=" not in w and not w.startswith("-")]
    sys.argv[1:] = [w for w in words if w not in paths]

    def run(recipe: Recipe) -> None:
        if not paths or paths[0] not in DIRECTIONS:
            raise ConfigError(
                f"the first word is {paths[0] if paths else 'missing'}; use "
                "to_hf RUN_OR_CHECKPOINT FOLDER or from_hf FOLDER CHECKPOINT"
            )
        _convert(paths[0], _options(recipe.convert, paths[1:]))

    run_cli(run, "model.convert")


def _options(options: ConvertConfig, paths: list[str]) -> ConvertConfig:
    """The convert group with the paths of the command line in it."""
    if len(paths) > 2:
        raise ConfigError(f"{paths[2]} is one path too many; give a source and a target")
    for name, path in zip(("source", "target"), paths, strict=False):
        setattr(options, name, path)
    return options


def _convert(direction: str, options: ConvertConfig) -> None:
    if direction == "to_hf":
        from model.conversion.to_hf import to_hf

        print(f"written: {to_hf(options)}")
        return
    from model.conversion.from_hf import from_hf

    target = from_hf(options, print)
    recipe = next((target / "recipes" / "model").glob("*.yaml"))
    print(
        f"written: {target}\n"
        f"train from it with --config-dir {target / 'recipes'} model={recipe.stem} "
        f"checkpoint.load={target}"
    )


if __name__ == "__main__":
    main()
