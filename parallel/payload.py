"""`python -m parallel.payload experiment=tiny parallel.expert_model_parallel_size=2`.

What LatentMoE sends, computes and reads, measured beside what is predicted.

Trains a few steps with `python -m train` in `run.dir` (real collectives, counted as wire.md says)
and reports per token and per MoE layer. Writes payload.json and plots/expert_load.png there.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.job import layers_of_share, shares
from parallel.recompute import times_again
from recipes.compose import refuse_stages, run_cli
from recipes.errors import ConfigError, StrataError
from recipes.rules import fail
from recipes.schema import ModelConfig, Recipe
from recipes.tables import table

if TYPE_CHECKING:
    from parallel.layout import Layout

STEPS = 5
"""Trained unless stage.train_steps says otherwise."""

SHORT = {
    "stage.train_steps": str(STEPS),
    "stage.eval_interval": "null",
    "stage.eval_steps": "1",
    "checkpoint.save_interval": "null",
    "logging.expert_load": "true",
    "logging.progress": "false",
}
"""Overrides of the run that are not given."""


def main(recipe: Recipe) -> int:
    """Train, measure, print and write the report.

    Raises:
        ConfigError: the model has no experts, the recipe has stages or several sequence lengths,
            or is not valid.
        StrataError: the run failed.
    """
    from model.pattern import parse_pattern
    from model.validate import validate_recipe

    refuse_stages(recipe, "parallel.payload")
    if recipe.stage.mix:
        raise ConfigError("parallel.payload measures one sequence length; use stage.mix=[]")
    layout = validate_recipe(recipe)
    if recipe.parallel.moe_token_dispatcher_type != "alltoall":
        fail(
            "parallel.moe_token_dispatcher_type",
            recipe.parallel.moe_token_dispatcher_type,
            "is not what parallel.payload predicts",
            "use alltoall",
        )
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    cut = shares(pattern.stages, pattern.mtp, pattern.mtp_depths, layout.pp)
    passes = [layer for share in cut for layer in layers_of_share(recipe.parallel, share)]
    again = [times_again(recipe.parallel, x, "mlp.experts") for x in passes if x.symbol == "E"]
    if not again:
        raise ConfigError(
            f"model.hybrid_layer_pattern={recipe.model.hybrid_layer_pattern} has no MoE layer (E)"
        )
    given = {argument.split("=")[0] for argument in sys.argv[1:]}
    folder = Path(recipe.run.dir if "run.dir" in given else f"runs/payload-{recipe.model.name}")
    _refuse_another_layout(recipe, folder)
    overrides = shortened(given | {"run.dir"}) + [f"run.dir={folder}"] * ("run.dir" not in given)
    done = subprocess.run([sys.executable, "-m", "train", *sys.argv[1:], *overrides], check=False)
    if done.returncode == 2:
        return 2  # it has said why
    if done.returncode:
        raise StrataError(f"the run ended with exit code {done.returncode}; see {folder}/logs")
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    found = report(recipe, layout, again, records)
    (folder / "payload.json").write_text(json.dumps(found, indent=1) + "\n")
    picture = draw(found["load"]["tokens"], folder / "plots" / "expert_load.png")
    print(as_text(recipe, found))
    print(f"\n{folder}/payload.json, {picture}")
    return 0


def _refuse_another_layout(recipe: Recipe, folder: Path) -> None:
    """A finished run may be started again in another layout, and then has nothing left to do."""
    file = folder / "config.json"
    if not file.exists():
        return
    measured, now = json.loads(file.read_text()), asdict(recipe)
    before = {**measured["parallel"], "micro_batch_size": measured["stage"]["micro_batch_size"]}
    after = {**now["parallel"], "micro_batch_size": now["stage"]["micro_batch_size"]}
    changed = [
        f"{key}: {before.get(key)} -> {new}" for key, new in after.items() if new != before.get(key)
    ]
    if changed:
        raise ConfigError(
            f"run.dir={folder} holds the measurement of another layout ({'; '.join(changed)}); "
            "choose another run.dir, or remove that folder"
        )


def shortened(given: set[str]) -> list[str]:
    """Overrides of the run beside the keys that are given; one of steps and tokens fixes its
    length, whichever the recipe has."""
    settings = {"stage.train_tokens": "null", **SHORT}
    if "stage.train_tokens" in given:
        settings["stage.train_steps"] = "null"
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def report(
    recipe: Recipe, layout: "Layout", again: Sequence[int], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """All numbers.

    Args:
        again: of each MoE layer a token goes through, passes that the backward pass repeats.
        records: metrics of the steps, with `expert_load`.
    """
    from model.counts import layer_flops

    model, stage = recipe.model, recipe.stage
    width, k = model.moe_latent_size or model.hidden_size, model.moe_router_topk
    element = 2 if recipe.precision.params_dtype == "bf16" else 4
    tokens = stage.global_batch_size * stage.sequence_length * len(records)
    operand = dispatched_bytes(model, element)
    passes = len(again)
    predicted = expected(operand, dispatched_bytes(model, 4), layout, sum(again) / passes)
    measured = {}
    for purpose in predicted:
        of = [record["wire"].get(purpose, {}) for record in records]
        totals = {n: sum(x.get(n, 0) for x in of) / tokens / passes for n in _COUNTED}
        backward = totals["backward_bytes"]
        measured[purpose] = {
            "forward": totals["bytes"] - backward,
            "backward": backward,
            "operand": totals["operand_bytes"],
        }
    flops = layer_flops(model, "E", stage.sequence_length)
    latent = flops.get("mlp.fc1_latent_proj", 0.0) + flops.get("mlp.fc2_latent_proj", 0.0)
    weight = 2 * width * (model.moe_ffn_hidden_size or 0) * element
    experts = model.num_moe_experts or 1
    ranks, split = layout.ep * layout.etp, layout.tp * layout.cp  # a sequence is split so often
    batch = stage.micro_batch_size * stage.sequence_length * ranks / split
    load = [record["expert_load"] for record in records if "expert_load" in record]
    summed = [
        [sum(step[i][e] for step in load) for e in range(experts)] for i in range(_rows(load))
    ]
    return {
        "bytes_per_token_and_layer": {"predicted": predicted, "measured": measured},
        "without_latent": dispatched_bytes(replace(model, moe_latent_size=None), element),
        "projections": {
            "flops_per_token_and_layer": latent,
            "share_of_layer": latent / sum(flops.values()),
        },
        "expert_weights_read": {
            "one_token_alone": k * weight,
            "token_of_a_micro_batch": experts * weight / batch,
        },
        "load": {
            "max_violation": [max(layer) * experts / max(1, sum(layer)) - 1 for layer in summed],
            "dead_experts": [sum(tokens == 0 for tokens in layer) for layer in summed],
            "tokens": summed,
        },
    }


def expected(
    operand: int, wide: int, layout: "Layout", again: float
) -> dict[str, dict[str, float]]:
    """Of dispatch and combine the bytes a token and layer with balanced routing: sent `forward`
    and `backward`, and `operand`, with what stays on its rank, both ways together.

    Tokens go to the ranks of their experts, and where those split their experts to each of them;
    what comes back from parts of an expert is added in FP32. Gradients go the same way.

    Args:
        operand: `dispatched_bytes`.
        wide: the same in FP32.
        again: forward passes that the backward pass repeats, mean over layers.
    """
    ep, etp = layout.ep, layout.etp
    found = {}
    for purpose, part in (("expert_dispatch", operand), ("expert_combine", wide)):
        sent = operand * (ep - 1) / ep + part * (etp - 1)
        # Of a gather the operand is what a rank has, of a reduction etp times as much.
        narrow, broad = (operand * (ep > 1) + part * n * (etp > 1) for n in (1, etp))
        forward = narrow if purpose == "expert_dispatch" else broad
        found[purpose] = {
            "forward": sent,
            "backward": sent * (1 + again),
            "operand": narrow + broad + again * forward,
        }
    return found


def dispatched_bytes(model: ModelConfig, element: int) -> int:
    """Of one token in one MoE layer, one way: top-k rows of the latent width, or of the hidden
    size without a latent. What stays on its rank is counted."""
    return model.moe_router_topk * (model.moe_latent_size or model.hidden_size) * element


_COUNTED = ("bytes", "backward_bytes", "operand_bytes")


_AMOUNTS = {"forward": "forward", "backward": "backward", "operand": "with what stays"}


def _rows(load: list[list[list[int]]]) -> int:
    return len(load[0]) if load else 0


def as_text(recipe: Recipe, found: dict[str, Any]) -> str:
    """The report to read."""
    sent, of_layer = found["bytes_per_token_and_layer"], found["load"]
    rows: list[tuple[str, ...]] = [("bytes a token and layer", "predicted", "measured")]
    for purpose, amounts in sent["measured"].items():
        for kind, title in _AMOUNTS.items():
            predicted = sent["predicted"][purpose][kind]
            rows.append((f"{purpose}, {title}", f"{predicted:,.1f}", f"{amounts[kind]:,.1f}"))
    projections, weights = found["projections"], found["expert_weights_read"]
    facts = [
        f"without a latent one way would carry {found['without_latent']:,} bytes a token",
        f"latent projections: {projections['flops_per_token_and_layer'] / 1e6:,.3f} MFLOP a token "
        f"and layer forward, {projections['share_of_layer']:.1%} of the layer",
        f"expert weights read: {weights['one_token_alone'] / 1e6:,.3f} MB by a token alone, "
        f"{weights['token_of_a_micro_batch'] / 1e6:,.4f} MB a token of a micro batch",
    ]
    loads: list[tuple[str, ...]] = [("MoE layer", "MaxVio", "dead experts")]
    for i, (violation, dead) in enumerate(
        zip(of_layer["max_violation"], of_layer["dead_experts"], strict=True), start=1
    ):
        loads.append((str(i), f"{violation:.2f}", f"{dead} of {recipe.model.num_moe_experts}"))
    return "\n\n".join([table(rows, left=(0,)), "\n".join(facts), table(loads, left=())])


def draw(tokens: list[list[int]], path: Path) -> Path:
    """Load of every layer: tokens of each expert over the mean, busiest first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, layer in enumerate(tokens, start=1):
        mean = max(1, sum(layer)) / len(layer)
        values = [count / mean for count in sorted(layer, reverse=True)]
        axes.step(range(1, len(layer) + 1), values, where="mid", label=f"MoE layer {i}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("expert, busiest first")
    axes.set_ylabel("tokens / mean")
    axes.grid(alpha=0.3)
    if len(tokens) <= 10:
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    run_cli(main, "parallel.payload", all_stages=True)
