"""The mean of checkpoints, and the weights that make it a decay."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.conversion.common import write_model
from model.conversion.merge import merge, minus_sqrt_weights
from model.conversion.table import pairs
from model.conversion.torch_dist import TorchDistReader
from recipes.errors import CheckpointError, ConfigError
from recipes.schema import MergeConfig
from tests.unit.conversion import build, load, logits, model_of, save, scramble, tokens_of
from tests.unit.world import fresh_world

FIELDS: dict[str, Any] = {"hybrid_layer_pattern": "ME*-/*E"}
COUNT = 3


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_the_weights_are_those_of_a_decay(count: int):
    """A walk with a constant learning rate, and the same steps under a minus-sqrt decay."""
    steps = np.random.default_rng(0).normal(size=count)
    constant = np.cumsum(steps)
    decayed = sum((1 - math.sqrt(i / count)) * step for i, step in enumerate(steps))
    weights = minus_sqrt_weights(count)
    assert math.isclose(sum(weights), 1)
    assert math.isclose(float(np.dot(weights, constant)), float(decayed))
    assert weights == sorted(weights, reverse=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with three checkpoints, one of a future that was gone back from, and a
    user's copy."""
    folder = tmp_path_factory.mktemp("run")
    model = model_of(FIELDS)
    with fresh_world():
        network = build(model)
        for step in range(1, COUNT + 2):
            path = folder / "checkpoints" / f"iter_{step:07d}"
            scramble(network, seed=step)
            save(network, path, model)
            (path / "meta.json").write_text("{}")
    shutil.copytree(path, folder / "checkpoints" / "iter_0000002_mine")
    (folder / "checkpoints" / "latest").write_text(f"iter_{COUNT:07d}\n")
    return folder


def options(run: Path, target: Path, **changes: Any) -> MergeConfig:
    return merging(run, target=target, shard_gigabytes=1e-4, **changes)


def merging(*sources: Path, target: Path, **changes: Any) -> MergeConfig:
    names = [str(source) for source in sources]
    return replace(MergeConfig(names, str(target), evaluate=False), **changes)


def iterations(run: Path) -> list[Path]:
    return [run / "checkpoints" / f"iter_{step:07d}" for step in range(1, COUNT + 1)]


def test_every_tensor_is_the_weighted_mean(run: Path, tmp_path: Path):
    given = [0.5, 0.75, -0.25]
    for weights in ([], given):
        target = tmp_path / str(len(weights))
        _, chosen = merge(options(run, target, weights=weights))
        assert [path for path, _ in chosen] == iterations(run)
        wanted = weights or minus_sqrt_weights(COUNT)
        assert [w for _, w in chosen] == wanted
        readers, found = [TorchDistReader(p) for p in iterations(run)], TorchDistReader(target)
        for spec in (s for p in pairs(model_of(FIELDS)) for s in p.native):
            mean = sum(w * r.read(spec).double() for w, r in zip(wanted, readers, strict=True))
            torch.testing.assert_close(found.read(spec).double(), mean, rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "3" / "conversion.json").read_text())
    assert list(report["merged"].values()) == given


def test_a_mean_of_one_is_that_checkpoint(run: Path, tmp_path: Path):
    last = options(run, tmp_path / "merged", last=2, weights=[0.0, 1.0])
    merge(last)
    tokens = tokens_of(model_of(FIELDS))
    with fresh_world():
        network = build(model_of(FIELDS))
        load(network, tmp_path / "merged")
        found = logits(network, tokens)
        scramble(network, seed=COUNT)
        assert torch.equal(found, logits(network, tokens))


def test_mistakes_are_explained(run: Path, tmp_path: Path):
    target = tmp_path / "merged"
    for changes, text in (
        ({"weights": [1.0]}, "has 1 entries for 3 checkpoints"),
        ({"weights": [1.0, 1.0, 1.0]}, "let it sum to 1"),
        ({"weights": [1.0, math.nan, 0.0]}, "let it sum to 1"),
        ({"last": 1}, "merge.last=1"),
        ({"workers": 0}, "merge.workers=0"),
        ({"evaluate": True}, "merge.evaluate=true .*iter_0000001 was imported; use false"),
    ):
        with pytest.raises(ConfigError, match=text):
            merge(options(run, target, **changes))
    with pytest.raises(ConfigError, match="leaves 1 checkpoints"):
        merge(options(iterations(run)[0], target))
    with pytest.raises(ConfigError, match="merge.target is not given"):
        merge(MergeConfig(sources=[str(run)]))
    with fresh_world():
        other = model_of({"hybrid_layer_pattern": "ME"})
        save(build(other), tmp_path / "other", other)
    with pytest.raises(CheckpointError, match="does not hold the tensors of its model"):
        merge(merging(iterations(run)[0], tmp_path / "other", target=target))
    # The same shapes, computed with otherwise.
    shutil.copytree(iterations(run)[0], tmp_path / "top2")
    write_model(model_of(FIELDS | {"moe_router_topk": 2}), tmp_path / "top2")
    with pytest.raises(CheckpointError, match="top2 is of another model: moe_router_topk=2"):
        merge(merging(iterations(run)[0], tmp_path / "top2", target=target))
    assert not target.exists()
