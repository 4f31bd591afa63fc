"""Converting a run, and training on from what was converted, as a user does."""

import json
import re
import signal
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end.training import Command, records, train
from tests.unit.plain_model import run as run_plainly
from tests.unit.world import fresh_world
from train.batches import Batches
from train.loaded import run_recipe


def convert(data: Path, *words: str) -> Command:
    return Command(words, data, "model.convert")


@pytest.fixture(scope="module")
def exported(data: Path, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in Hugging Face's format, not to be changed."""
    folder = tmp_path_factory.mktemp("hugging_face") / "exported"
    said = convert(data, "to_hf", str(straight), str(folder)).run()
    assert f"written: {folder}" in said
    return folder


def test_a_run_goes_out_and_comes_back(data: Path, straight: Path, exported: Path, tmp_path: Path):
    imported = tmp_path / "imported"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "conversion.json"):
        assert (exported / name).exists(), name
    said = convert(data, "from_hf", str(exported), str(imported)).run()
    assert f"checkpoint.load={imported}" in said

    weights = [f"checkpoint.load={imported}", "stage.train_steps=1"]
    recipe = ["--config-dir", str(imported / "recipes"), "model=exported"]
    train(data, tmp_path / "on", *recipe, *weights).run()
    identity = json.loads((tmp_path / "on" / "identity.json").read_text())
    assert identity["initial_parameters"] == records(straight)[-1]["params_hash"]

    # The weights of a run, without a conversion, and in another layout.
    again = [f"checkpoint.load={straight}", "stage.train_steps=1"]
    train(data, tmp_path / "again", *again).run()
    identity = json.loads((tmp_path / "again" / "identity.json").read_text())
    assert identity["initial_parameters"] == records(straight)[-1]["params_hash"]

    # What was imported names no data to evaluate on.
    for module, *to in (("train.evaluate",), ("train.calibrate", str(tmp_path / "file"))):
        message = Command([str(imported), *to], data, module).refused()
        assert f"{imported} was imported and names no data" in message


def test_what_was_exported_says_what_the_run_says(
    data: Path, straight: Path, exported: Path, tmp_path: Path
):
    """Speculation reads whole texts instead of states, which BF16 rounds otherwise: that its text
    is the same is tested in FP32."""
    texts = []
    thinking = ("--thinking-budget", "2", "--temperature", "0.8", "--seed", "1", "--tokens", "20")
    for source, more in (
        (straight, ()),
        (exported, ()),
        (exported, ("--speculate", "2")),
        (exported, thinking),
    ):
        file = tmp_path / "texts.json"
        words = (str(source), "--prompt", "def f(", "--prompt", "x", "--tokens", "6", *more)
        Command((*words, "--json", str(file)), data, "train.generate").run()
        texts.append(json.loads(file.read_text()))
    assert [t["tokens"] for t in texts[0]] == [t["tokens"] for t in texts[1]]
    assert all(len(t["tokens"]) == 6 and t["passes"] <= 6 for t in texts[2])
    assert all("</think>" in t["text"] for t in texts[3])
    assert texts[3][0]["tokens"][:2] != texts[0][0]["tokens"][:2]  # drawn


def test_a_run_goes_out_in_nvfp4(data: Path, straight: Path, tmp_path: Path):
    convert(data, "to_hf", str(straight), str(tmp_path), "convert.quantize=nvfp4").run()
    config = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W4A16_NVFP4"
    names = json.loads((tmp_path / "config.json").read_text())
    assert names["quantization_config"]


@pytest.mark.slow
def test_activations_are_scaled_by_their_largest(data: Path, straight: Path, tmp_path: Path):
    """All linear modules, against the same weights and tokens in plain float64 arithmetic; the run
    is in BF16."""
    file, plain, both = (tmp_path / name for name in ("calibration.json", "plain", "both"))
    policy = ("--policy", "nvfp4_all")
    Command((str(straight), str(file), "--batches", "2", *policy), data, "train.calibrate").run()
    convert(data, "to_hf", str(straight), str(plain)).run()
    words = ("convert.quantize=nvfp4_all", f"convert.calibration={file}")
    convert(data, "to_hf", str(straight), str(both), *words).run()

    with fresh_world():
        batches = islice(Batches(run_recipe(straight), dp=1).train_from(0), 2)
        texts = [row.tolist() for batch in batches for row in batch["tokens"]]
    assert len(texts) == 4
    wanted: dict[str, float] = {}
    for text in texts:
        run_plainly(plain, text, wanted)

    def of_a_layer(name: str) -> str:
        return re.sub(r"experts\.\d+", "experts", name)  # which share one scale

    largest: dict[str, float] = defaultdict(float)
    for name, value in wanted.items():
        largest[of_a_layer(name)] = max(largest[of_a_layer(name)], value)
    found = load_file(both / "model.safetensors")
    scales = {k.removesuffix(".input_scale"): v for k, v in found.items() if "input_scale" in k}
    assert scales.keys() == wanted.keys()
    for name, scale in scales.items():
        assert scale.item() * 6 * 448 == pytest.approx(largest[of_a_layer(name)], rel=0.01), name


def test_a_run_is_merged_and_evaluated(data: Path, straight: Path, tmp_path: Path):
    said = Command((str(straight), str(tmp_path / "merged")), data, "model.merge").run()
    losses = [line.split() for line in said.splitlines() if "checkpoints/iter_" in line]
    assert [f"{float(w):.3f}" for _, w in losses[:2]] == ["0.707", "0.293"]
    assert float(losses[3][1]) == pytest.approx(records(straight)[-1]["validation_loss"], abs=1e-5)
    assert f"{tmp_path / 'merged'}" in said.splitlines()[-1]


def killed(data: Path, words: tuple[str, ...], target: Path, parts: int) -> bool:
    """Start a conversion and kill it once so many of its parts are written; whether that was in
    the middle."""
    command = convert(data, *words).start()
    while command.poll() is None:
        if len(list((target / ".conversion").glob("*.pickle"))) >= parts:
            command.kill()
            break
    command.communicate()
    return (target / ".conversion").exists() and command.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_conversion_survives_kill_9(data: Path, straight: Path, tmp_path: Path):
    """Killed again and again, both ways, it ends with the bytes of one that was not."""
    small = ("convert.shard_gigabytes=1e-5", "convert.workers=1")
    for direction, source in (("to_hf", straight), ("from_hf", tmp_path / "whole_to_hf")):
        whole, target = tmp_path / f"whole_{direction}", tmp_path / f"killed_{direction}"
        convert(data, direction, str(source), str(whole), *small).run()
        words = (direction, str(source), str(target), *small)
        for parts in (1, 5, 15):
            assert killed(data, words, target, parts), parts
            assert not any((target / name).exists() for name in ("config.json", ".metadata"))
        convert(data, *words).run()
        assert not (target / ".conversion").exists()
        files = {f.name for f in whole.iterdir() if f.is_file()} - {"conversion.json"}
        assert files == {f.name for f in target.iterdir() if f.is_file()} - {"conversion.json"}
        for name in (n for n in files if n.endswith((".safetensors", ".distcp"))):
            assert (target / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_weights_of_another_model_are_refused(data: Path, straight: Path, tmp_path: Path):
    load = f"checkpoint.load={straight}"
    message = train(data, tmp_path / "run", load, "model.hybrid_layer_pattern=ME*E").refused()
    assert "only in the checkpoint: mtp.layers.0." in message
    message = train(data, tmp_path / "run", load, "model.moe_latent_size=32").refused()
    assert "fc1_latent_proj.weight [64, 64] instead of [32, 64]" in message
    message = train(data, tmp_path / "run", f"checkpoint.load={tmp_path}").refused()
    assert "is no checkpoint" in message


def test_mistakes_are_one_line(data: Path, straight: Path, tmp_path: Path):
    for words, text in (
        ((), "the first word is missing"),
        (("to_megatron",), "the first word is to_megatron"),
        (("to_hf", "a"), "convert.target is not given"),
        (("to_hf", "a", "b", "c"), "c is one path too many"),
        (("to_hf", "nowhere", str(tmp_path / "x")), "nowhere is no checkpoint"),
        (("to_hf", "a", "b", "convert.shards=2"), "unknown key convert.shards"),
    ):
        assert text in convert(data, *words).refused()
