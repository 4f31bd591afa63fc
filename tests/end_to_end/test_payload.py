"""The payload report of a real run on two ranks."""

import json
from pathlib import Path

from tests.end_to_end.training import SMALL, Command, sources


def test_measured_equals_predicted(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*SMALL, sources(data), f"run.dir={run}", "stage.train_steps=2"]
    overrides += ["parallel.expert_model_parallel_size=2"]
    printed = Command(overrides, data, module="parallel.payload").run()
    found = json.loads((run / "payload.json").read_text())
    sent = found["bytes_per_token_and_layer"]
    assert sent["predicted"] == {"operand": 4 * 64 * 2, "sent": 4 * 64 * 2 / 2}
    for amounts in sent["measured"].values():
        assert amounts["operand"] == 2 * sent["predicted"]["operand"]
        # 8 experts on 2 ranks: an untrained router is not even.
        assert 0 < amounts["forward"] == amounts["backward"] < sent["predicted"]["operand"]
    # d = l = 64: both projections, 2 FLOPs a weight.
    assert found["projections"]["flops_per_token_and_layer"] == 2 * 2 * 64 * 64
    assert found["expert_weights_read"]["one_token_alone"] == 4 * 2 * 64 * 128 * 2
    # Two layers and one of MTP, which runs twice: 4 x 64 tokens, top-4, two steps.
    assert [sum(layer) for layer in found["load"]["tokens"]] == [2048, 2048, 4096]
    assert (run / "plots" / "expert_load.png").stat().st_size > 0
    assert "expert_combine, backward" in printed
