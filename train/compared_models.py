"""What the models of a comparison cost, side by side: parameters, FLOPs, bytes on the wire."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.payload import dispatched_bytes
from recipes.schema import PrecisionConfig, Recipe
from train.finished import FinishedRun


@dataclass(frozen=True)
class ModelFacts:
    """One model. `model.describe` prints the same numbers, layer by layer."""

    parameters: int
    """Elements of a checkpoint, multi-token prediction included."""
    active: int
    """Parameters of the main model one token meets, embedding and head included."""
    training_flops: float
    """Of one token: 3 x forward."""
    dispatched_bytes: int
    """All-to-all bytes of one token in one MoE layer, to the experts and back, forward, with what
    stays on its rank; 0 without experts."""
    settings: dict[str, Any]
    """Keys of the group `model` that are not the same for all, by name."""


def model_facts(runs: Mapping[str, FinishedRun]) -> dict[str, ModelFacts]:
    """The facts of the model of each run; nothing if they have the same.

    Models are built on the meta device, so every number is that of what was trained.
    """
    sections = {name: run.part("model") for name, run in runs.items()}
    first = next(iter(sections.values()))
    keys = [k for k in first if k != "name" and any(s[k] != first[k] for s in sections.values())]
    if all(section == first for section in sections.values()):
        return {}
    from model.backends import install_backends
    from model.counts import count_parameters, flops_per_token

    facts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about optional libraries
        install_backends("auto")
        for name, run in runs.items():
            dtype = run.part("precision")["params_dtype"]
            precision = PrecisionConfig(name="counted", params_dtype=dtype)
            counts = count_parameters(Recipe(model=run.model, precision=precision, stage=run.stage))
            element = 2 if dtype == "bf16" else 4
            experts = run.model.num_moe_experts
            facts[name] = ModelFacts(
                parameters=counts.total,
                active=counts.active,
                training_flops=flops_per_token(run.model, run.stage.sequence_length),
                dispatched_bytes=2 * dispatched_bytes(run.model, element) if experts else 0,
                settings={key: asdict(run.model)[key] for key in keys},
            )
    return facts
