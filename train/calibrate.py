"""`python -m train.calibrate CHECKPOINT FILE`: the largest activations of modules trained in NVFP4.

An export with quantised weights can then say how to scale activations too: `python -m model.convert
to_hf ... convert.quantize=POLICY convert.calibration=FILE`. Runs the checkpoint on one rank, on the
first training batches of its run, with the modules of the policy quantised. FILE is JSON: the
policy, how many tokens were read, and by module the largest absolute value of its input.
"""

import argparse
import json
import sys
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.compose import load_recipe
from recipes.errors import ConfigError, StrataError
from recipes.rules import listed
from train.guards import write_atomically
from train.loaded import Loaded, with_model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m train.calibrate")
    parser.add_argument(
        "checkpoint", type=Path, help="a run, one of its checkpoints, or a merged one"
    )
    parser.add_argument("file", type=Path, help="what is written")
    parser.add_argument("--policy", default="nvfp4", help="a recipe of the group precision (nvfp4)")
    parser.add_argument("--batches", type=int, default=32, help="micro batches to read (32)")
    chosen = parser.parse_args()
    try:
        # As the export reads it: of that recipe nothing else is used.
        precision = load_recipe(["experiment=tiny", f"precision={chosen.policy}"]).precision
        job = partial(calibrate, batches=chosen.batches, file=chosen.file)
        code = with_model(chosen.checkpoint, job, precision)
    except StrataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def calibrate(loaded: Loaded, batches: int, file: Path) -> int:
    """Write the largest activation of every NVFP4 module.

    Raises:
        ConfigError: the policy has no such module, or the modules are the real Transformer
            Engine's, which cannot be watched.
    """
    import torch
    from tqdm import tqdm

    from model.gemms import policy_of
    from precision.apply import apply_policy, linear_modules
    from train.batches import Batches, check_data
    from train.step import forward_step

    recipe = loaded.recipe
    policy, name = policy_of(recipe), recipe.precision.name
    wanted = {d.gemm.name for d in policy.start if d.format == "nvfp4"}
    if not wanted:
        raise ConfigError(f"--policy={name} has no module in nvfp4; use another policy")
    check_data(recipe)
    data = Batches(recipe, dp=1).train_from(0)
    apply_policy([loaded.model], policy)
    modules = {n: m for n, m in linear_modules([loaded.model]).items() if n in wanted}
    if any(not hasattr(module, "observer") for module in modules.values()):
        raise ConfigError(
            "calibration watches the emulated Transformer Engine, and this machine has the real "
            "one; run it where there is no GPU"
        )
    largest: dict[str, float] = defaultdict(float)

    def see(module: str, _: Any, role: str, source: Any, quantized: Any) -> None:
        if role == "input":
            largest[module] = max(largest[module], source.abs().max().item())

    for module_name, module in modules.items():
        setattr(module, "observer", partial(see, module_name))  # noqa: B010 - not of every module
    tokens = 0
    with torch.no_grad():
        for batch in tqdm(islice(data, batches), "calibrating", total=batches, unit="batch"):
            forward_step(iter([batch]), loaded.model)
            tokens += batch["tokens"].numel()
    unseen = sorted(wanted - largest.keys())
    if unseen:
        raise ConfigError(f"no activation of {listed(unseen)} was met; read more --batches")
    found = {"policy": name, "tokens": tokens, "activations": dict(sorted(largest.items()))}
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    print(f"{len(largest)} modules, {tokens:,} tokens: {file}")
    return 0


if __name__ == "__main__":
    main()
