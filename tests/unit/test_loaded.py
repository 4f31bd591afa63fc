"""What a checkpoint that was imported, and so knows its model alone, is run with."""

import json
from pathlib import Path

import pytest

from model.conversion.from_hf import from_hf
from model.conversion.to_hf import to_hf
from model.conversion.tokenizer import stop_tokens
from model.validate import validate_recipe
from recipes.errors import CheckpointError
from tests.unit.conversion import build, model_of, options, save
from tests.unit.world import fresh_world
from train.loaded import require_data, run_recipe

MODEL = model_of({"hybrid_layer_pattern": "ME*", "max_position_embeddings": 64})


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    with fresh_world():
        save(build(MODEL), folder, MODEL)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_imported_checkpoint_runs_as_it_is(native: Path, tmp_path: Path, dtype: str):
    """In the dtype of its weights, vectors in FP32 or not, and with nothing of another run."""
    to_hf(options(native, tmp_path / "hf", dtype=dtype))
    imported = from_hf(options(tmp_path / "hf", tmp_path / "imported"), print)
    recipe = run_recipe(imported)
    assert recipe.precision.params_dtype == dtype
    assert recipe.stage.sequence_length <= 64
    assert validate_recipe(recipe, 1, "host").world_size == 1
    assert not (recipe.data.train or recipe.data.validation or recipe.data.tokenizer.path)
    with pytest.raises(CheckpointError, match=r"no data \(data.train\), as runs do; give a run"):
        require_data(imported, "data.train", "give a run")


def test_a_folder_says_where_its_texts_end(tmp_path: Path):
    assert stop_tokens(tmp_path) == set()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert stop_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert stop_tokens(tmp_path) == {2, 11}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_tokens(tmp_path) == {2, 11}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(CheckpointError, match='eos_token_id="</s>" is neither a token nor'):
        stop_tokens(tmp_path)
