"""Mistakes a user can make: one line with key, value, rule and remedy; nothing is touched."""

from pathlib import Path

import pytest

from tests.end_to_end.training import Command, train, tree

MISTAKES = {
    "unknown key": (["model.hiden_size=4"], "model.hiden_size=4 did you mean model.hidden_size"),
    "wrong type": (["model.num_moe_experts=eight"], "model.num_moe_experts eight int"),
    "bad symbol": (["model.hybrid_layer_pattern=MEX"], "hybrid_layer_pattern 'X' at position 2"),
    "sizes of a batch": (["stage.micro_batch_size=3"], "global_batch_size=4 multiple 3"),
    "sizes of a layout": (
        ["parallel.expert_model_parallel_size=3"],
        "parallel.expert_model_parallel_size=3 num_moe_experts=8 use",
    ),
    "sizes of a model": (["model.num_attention_heads=3"], "num_attention_heads=3"),
    "missing data": (
        ["data.train=[{path: nowhere/train}]"],
        "data.train[0].path=nowhere/train python -m data.prepare",
    ),
    "too few rows": (["model.vocab_size=256"], "model.vocab_size=256 512"),
    "another tokenizer": (
        ["data.tokenizer.library=byte-level", "data.tokenizer.train_vocab_size=null"],
        "data.train[0].path was written with the huggingface tokenizer point data.tokenizer",
    ),
    "no such device": (["device=cuda"], "device=cuda device=host"),
    "unwritable directory": (["run.dir=/proc/run"], "run.dir=/proc/run choose a directory"),
    "unwritable, two ranks": (
        ["run.dir=/proc/run", "parallel.data_parallel_size=2"],
        "run.dir=/proc/run choose a directory",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    mistake: str, data: Path, tmp_path: Path
) -> None:
    overrides, words = MISTAKES[mistake]
    before = tree(data)
    message = train(data, tmp_path / "run", *overrides).refused()
    for word in words.split():
        assert word in message, message
    assert list(tmp_path.iterdir()) == []
    assert tree(data) == before


def test_a_directory_of_another_run_is_refused(data: Path, straight: Path) -> None:
    before = tree(straight)
    message = train(data, straight, "optimizer.lr=1e-3", "run.seed=7").refused()
    assert "optimizer.lr: 0.006 -> 0.001" in message and "run.seed: 1234 -> 7" in message
    assert f"run.dir={straight}" in message and "choose another run.dir" in message
    assert tree(straight) == before


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "x"}])
def test_half_a_launcher(variables: dict[str, str], data: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "2"} if "SLURM_PROCID" in variables else {}
    command = train(data, tmp_path / "run")
    message = Command(command.overrides, data, environment=variables | slurm).refused()
    assert "torchrun" in message
