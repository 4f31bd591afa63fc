"""`python -m train.compare` as a user runs it: paired arms, their report, and a second start."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.training import Command, end_with, records, train, wait_for_step

STEPS = 8
ARMS = ("bf16-7", "bf16-8", "nvfp4-7", "nvfp4-8")


def comparison(data: Path, folder: Path, *overrides: str) -> Command:
    small = train(
        data,
        folder,
        f"stage.train_steps={STEPS}",
        "model.hybrid_layer_pattern=ME*E/*E",
        "checkpoint.save_interval=3",
        "logging.log_params_hash=false",
    )
    arms = ("compare.precisions=[bf16,nvfp4]", "compare.seeds=2", "run.seed=7")
    return Command([*small.overrides, *arms, *overrides], data, "train.compare")


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def metrics(folder: Path) -> list[bytes]:
    return [(folder / "arms" / name / "metrics.jsonl").read_bytes() for name in ARMS]


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison that was stopped in its second arm and started again, and what it printed.

    The budget is wide: eight steps say nothing about precision.
    """
    folder = tmp_path_factory.mktemp("compare") / "nvfp4"
    command = comparison(data, folder, "compare.budget=0.5")
    process = command.start()
    wait_for_step(process, folder / "arms" / ARMS[1], 2)
    end_with(process, signal.SIGTERM, code=3)
    assert not (folder / "report.md").exists()
    return folder, command.run()


def test_arms_are_paired_and_reported(compared: tuple[Path, str]) -> None:
    folder, output = compared
    assert f"arm 1 of 4: {ARMS[0]}: finished before, {STEPS} steps" in output
    assert "resumed at step" in output
    (arm,) = report(folder)["arms"].values()
    assert [pair["paired"] for pair in arm["pairs"]] == [True, True]
    assert [pair["arm"]["seed"] for pair in arm["pairs"]] == [7, 8]
    identities = [pair["arm"]["identity"] for pair in arm["pairs"]]
    assert identities[0]["initial_parameters"] != identities[1]["initial_parameters"]
    assert identities[0]["data_order"] != identities[1]["data_order"]
    assert arm["pairs"][0]["arm"]["formats"]["nvfp4"] > 0
    gap = arm["verdict"]["gap"]["mean"]
    last = [[r["loss"] for r in records(folder / "arms" / name)][-2:] for name in ARMS]
    by_hand = [last[k + 2][i] / last[k][i] - 1 for k in (0, 1) for i in (0, 1)]
    assert gap == pytest.approx(sum(by_hand) / 4, rel=1e-6)
    assert gap != 0
    text = (folder / "report.md").read_text()
    assert text.startswith("# nvfp4 against bf16\n\n**nvfp4: PASS")
    assert identities[0]["data_order"][:12] in text
    plots = {"loss_gap.png", "loss.png", "flushed-nvfp4.png"}
    assert {p.name for p in (folder / "plots").iterdir()} == plots
    seen = {name: folder / "arms" / name / "precision.jsonl" for name in ARMS}
    assert [seen[name].exists() for name in ARMS] == [False, False, True, True]
    steps = {json.loads(line)["step"] for line in seen[ARMS[2]].read_text().splitlines()}
    assert steps == {2, 4, 6, 8}
    assert arm["flushed_to_zero"]["weight"]


def test_finished_arms_are_not_trained_again(
    compared: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(compared[0], folder)
    # A budget that an arm meets only if it is not worse than the baseline.
    worse = report(folder)["arms"]["nvfp4"]["verdict"]["gap"]["mean"] > 0
    output = comparison(data, folder, "compare.budget=1e-9").run(code=1 if worse else 0)
    assert output.count("finished before") == 4
    assert metrics(folder) == metrics(compared[0])


def test_finished_runs_of_two_seeds_pass_and_a_worse_one_fails(
    compared: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    arms = compared[0] / "arms"

    def command(budget: float, *names: str | Path) -> Command:
        chosen = f"compare.runs=[{','.join(str(arms / name) for name in names)}]"
        own = [chosen, f"compare.budget={budget}", f"run.dir={tmp_path}/report"]
        return Command(own, data, "train.compare")

    output = command(0.01, *ARMS[:2]).run()
    assert "not paired" in output and "run.seed 7 -> 8" in output
    # One of two runs that differ is worse than the other, whichever.
    losses = {n: [r["loss"] for r in records(arms / n)][-2:] for n in (ARMS[0], ARMS[2])}
    worse = sum(a / b for a, b in zip(losses[ARMS[2]], losses[ARMS[0]], strict=True)) > 2
    names = (ARMS[0], ARMS[2]) if worse else (ARMS[2], ARMS[0])
    assert "FAIL" in command(1e-9, *names).run(code=1)
    assert report(tmp_path / "report")["passed"] is False
    # A copy that claims to have quantised has the losses of the run it is a copy of.
    sabotaged = tmp_path / "sabotaged"
    shutil.copytree(arms / ARMS[0], sabotaged)
    for name in ("config.json", "precision.json"):
        shutil.copy(arms / ARMS[2] / name, sabotaged)
    output = command(0.5, ARMS[0], sabotaged).run(code=1)
    assert "exactly the losses of" in output and "was ignored" in output


@pytest.mark.slow
def test_models_are_trained_and_compared(data: Path, tmp_path: Path) -> None:
    small = train(data, tmp_path / "models", "experiment=tiny_moe_ablation", "stage.train_steps=4")
    chosen = (
        "compare.budget=0.5",
        "model.hybrid_layer_pattern=ME",
        "logging.log_params_hash=false",
    )
    own = ("experiment=tiny", "model.num_moe_experts=8", "model.hybrid_layer_pattern=ME*E/*E/*E")
    overrides = [o for o in small.overrides if o not in own]
    output = Command([*overrides, *chosen], data, "train.compare").run()
    assert "arm 2 of 2: tiny_latent_moe-" in output
    found = report(tmp_path / "models")
    (pair,) = found["arms"]["tiny_latent_moe"]["pairs"]
    assert pair["paired"]
    identities = [pair[side]["identity"] for side in ("arm", "baseline")]
    assert identities[0]["data_order"] == identities[1]["data_order"]
    assert identities[0]["initial_parameters"] != identities[1]["initial_parameters"]
    assert found["models"]["tiny_latent_moe"]["settings"]["moe_latent_size"] == 32


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["compare.precisions=[bf16,nvpf4]"], "nvpf4"),
        (["compare.precisions=[bf16]"], "nothing to compare"),
        (["compare.precisions=[]"], "nothing to compare"),
        (["compare.runs=[a,b]"], "both say what to compare"),
        (["precision=nvfp4"], "leave precision out"),
        (["compare.models=[tiny_moe,tiny_latent_moe]"], "compare.models=[tiny_moe, tiny_latent"),
    ],
)
def test_mistakes_are_named(overrides: list[str], said: str, data: Path, tmp_path: Path) -> None:
    given = comparison(data, tmp_path / "run", *overrides)
    assert said in given.refused()
    assert not (tmp_path / "run").exists()
