"""What a run starts from, as hashes: two runs with the same ones differ only in precision."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recipes.schema import Recipe
from train.batches import Batches
from train.guards import write_atomically
from train.hashes import parameters_hash
from train.rundir import NOT_LEARNING, flat


def write_identity(recipe: Recipe, data: Batches, chunks: list[Any]) -> None:
    """Write identity.json into the run directory, before the first step. A collective.

    initial_parameters: of every parameter and router bias (train/hashes.py). data_order: of
    samples spread over the whole run. recipe_without_precision: of every other key that decides
    what is learned.
    """
    parameters = parameters_hash(chunks)
    if dist.get_rank() != 0:
        return
    keys = {
        key: value
        for key, value in flat(asdict(recipe)).items()
        if not any(key == k or key.startswith(f"{k}.") for k in NOT_LEARNING)
    }
    rest = json.dumps(keys, sort_keys=True)
    identity = {
        "initial_parameters": parameters,
        "data_order": data.fingerprint(data.last_step),
        "recipe_without_precision": hashlib.sha256(rest.encode()).hexdigest(),
    }
    path = Path(recipe.run.dir) / "identity.json"
    write_atomically(path, json.dumps(identity, indent=1) + "\n")
