"""The payload report of a real run on two ranks."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.training import SMALL, Command, sources


def test_measured_equals_predicted(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*SMALL, sources(data), f"run.dir={run}", "stage.train_steps=2"]
    overrides += ["parallel.expert_model_parallel_size=2"]
    printed = Command(overrides, data, module="parallel.payload").run()
    found = json.loads((run / "payload.json").read_text())
    sent = found["bytes_per_token_and_layer"]
    one_way = 4 * 64 * 2  # top-4, l = 64, BF16
    for purpose, amounts in sent["measured"].items():
        predicted = {"forward": one_way / 2, "backward": one_way / 2, "operand": 2 * one_way}
        assert sent["predicted"][purpose] == predicted
        assert amounts["operand"] == 2 * one_way
        # 8 experts on 2 ranks: an untrained router is not even.
        assert 0 < amounts["forward"] == amounts["backward"] < one_way
    # d = l = 64: both projections, 2 FLOPs a weight.
    assert found["projections"]["flops_per_token_and_layer"] == 2 * 2 * 64 * 64
    assert found["expert_weights_read"]["one_token_alone"] == 4 * 2 * 64 * 128 * 2
    # Two layers and one of MTP, which runs twice: 4 x 64 tokens, top-4, two steps.
    assert [sum(layer) for layer in found["load"]["tokens"]] == [2048, 2048, 4096]
    assert (run / "plots" / "expert_load.png").stat().st_size > 0
    assert "expert_combine, backward" in printed

    # A finished run has nothing to measure in another layout.
    overrides += ["stage.micro_batch_size=1"]
    message = Command(overrides, data, module="parallel.payload").refused()
    assert "the measurement of another layout (micro_batch_size: 2 -> 1)" in message


@pytest.mark.parametrize(
    ("layout", "again"),
    [
        pytest.param(
            ["tensor_model_parallel_size=2", "expert_tensor_parallel_size=2"],
            0,
            id="split experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                "tensor_model_parallel_size=2",
                "expert_tensor_parallel_size=1",
                "expert_model_parallel_size=2",
                "recompute_granularity=selective",
                "recompute_modules=[moe]",
            ],
            1,
            id="recomputed experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                "expert_model_parallel_size=2",
                "recompute_granularity=full",
                "recompute_method=uniform",
                "recompute_num_layers=1",
            ],
            (2 * 1 + 2 * 2) / 4,
            id="recomputed layers",
        ),
    ],
)
def test_what_stays_is_predicted_exactly(
    data: Path, tmp_path: Path, layout: list[str], again: float
) -> None:
    run = tmp_path / "run"
    overrides = [*SMALL, sources(data), f"run.dir={run}", "stage.train_steps=1"]
    overrides += [f"parallel.{word}" for word in layout]
    Command(overrides, data, module="parallel.payload").run()
    found = json.loads((run / "payload.json").read_text())
    sent = found["bytes_per_token_and_layer"]
    for purpose, amounts in sent["measured"].items():
        predicted = sent["predicted"][purpose]
        assert amounts["operand"] == pytest.approx(predicted["operand"])
        # Not exact: what is repeated most is not what is sent most.
        assert amounts["backward"] == pytest.approx(amounts["forward"] * (1 + again), rel=0.01)
    # Each micro batch of 2 x 64 tokens is read by one rank, or half by each of two.
    split = 2 if "tensor_model_parallel_size=2" in layout else 1
    one = 8 * 2 * 64 * 128 * 2
    tokens = 2 * 64 * 2 / split
    assert found["expert_weights_read"]["token_of_a_micro_batch"] == one / tokens
