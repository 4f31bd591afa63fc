"""`python -m train.calibrate CHECKPOINT FILE`: the largest activations of modules trained in NVFP4.

An export with quantised weights can then say how to scale activations too: `python -m model.convert
to_hf ... convert.quantize=POLICY convert.calibration=FILE`. Runs the checkpoint on one rank, on the
first training batches of its run, unquantised, as modelopt calibrates. FILE is JSON: the policy,
how many tokens were read, and by module the largest absolute value of its input.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.compose import load_recipe
from recipes.errors import ConfigError, StrataError
from recipes.rules import listed
from recipes.schema import PrecisionConfig
from train.guards import write_atomically
from train.loaded import Loaded, require_data, with_model


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
        job = partial(calibrate, precision=precision, batches=chosen.batches, file=chosen.file)
        require_data(chosen.checkpoint, "data.train", "give a run that went on from it")
        code = with_model(chosen.checkpoint, job)
    except StrataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def calibrate(loaded: Loaded, precision: PrecisionConfig, batches: int, file: Path) -> int:
    """Write the largest activation of every module the policy `precision` has in NVFP4.

    Raises:
        ConfigError: it has none, or one met no token.
    """
    import torch
    from tqdm import tqdm

    from model.gemms import policy_of
    from precision.apply import linear_modules
    from train.batches import Batches, check_data
    from train.step import forward_step

    recipe = loaded.recipe
    policy = policy_of(replace(recipe, precision=precision))
    wanted = {d.gemm.name for d in policy.start if d.format == "nvfp4"}
    if not wanted:
        raise ConfigError(f"--policy={precision.name} has no module in nvfp4; use another policy")
    check_data(recipe)
    data = Batches(recipe, dp=1).train_from(0)
    modules = linear_modules([loaded.model])
    largest: dict[str, float] = defaultdict(float)

    def see(module: str, x: torch.Tensor) -> None:
        if x.numel():
            largest[module] = max(largest[module], x.abs().max().item())

    def taken(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if hasattr(module, "layer_norm_weight"):  # it normalises what it is given
            weight = module.layer_norm_weight
            x = torch.nn.functional.rms_norm(x, weight.shape, weight, module.eps)
        see(name, x)

    def activated(name: str, module: Any, _: Any, made: tuple[torch.Tensor, Any]) -> None:
        see(name, module.config.activation_func(made[0]))

    for name in wanted:
        experts, _, last = name.rpartition(".")
        if last == "linear_fc2" and experts.endswith(".experts"):
            # Megatron weighs the input of the second product with the router's scores. Readers of
            # Hugging Face's layout weigh its output: their input is the activation as it is.
            first = modules[f"{experts}.linear_fc1"]
            first.register_forward_hook(partial(activated, name))
        else:
            modules[name].register_forward_pre_hook(partial(taken, name))
    tokens = 0
    with torch.no_grad():
        for batch in tqdm(islice(data, batches), "calibrating", total=batches, unit="batch"):
            forward_step(iter([batch]), loaded.model)
            tokens += batch["tokens"].numel()
    unseen = sorted(wanted - largest.keys())
    if unseen:
        raise ConfigError(f"no activation of {listed(unseen)} was met; read more --batches")
    found = {
        "policy": precision.name,
        "tokens": tokens,
        "activations": dict(sorted(largest.items())),
    }
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    print(f"{len(largest)} modules, {tokens:,} tokens: {file}")
    return 0


if __name__ == "__main__":
    main()
