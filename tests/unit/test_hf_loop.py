"""The Hugging Face baseline is what it says: runs, dt clamp lifted, no stand-ins.

Each test has a process of its own, because the test session itself runs on stand-ins.
"""

import json
import os
import subprocess
import sys

FACTS = """
import json, torch
from tests.benchmarks.hf_loop import TINY, build_hf, main, train_hf

arguments = "--shape tiny --dtype bf16 --steps 1 --seq 16 --batch 1 --threads 1"
main(arguments.split())

model = build_hf(TINY, torch.bfloat16)
mamba, moe = model.model.layers[0].mixer, model.model.layers[1].mixer
batch = torch.randint(TINY["vocab_size"], (2, 16))
before = model(input_ids=batch, labels=batch).loss.item()
train_hf(model, [batch], steps=3, learning_rate=1e-2)
after = model(input_ids=batch, labels=batch).loss.item()
print(json.dumps({
    "time_step_limit": [str(limit) for limit in mamba.time_step_limit],
    "router_bias": str(moe.gate.e_score_correction_bias.dtype),
    "weights": str(moe.gate.weight.dtype),
    "before": before,
    "after": after,
}))
"""

STAND_IN = """
import sys, types, torch
sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
sys.modules["mamba_ssm"].__strata_standin__ = True
from tests.benchmarks.hf_loop import TINY, build_hf
build_hf(TINY, torch.float32)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    # One thread: on tensors of this size a second one only waits when the machine is busy.
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_it_trains_with_the_clamp_lifted_and_prints_json():
    process = run(FACTS)
    assert process.returncode == 0, process.stderr
    command_line, facts = map(json.loads, process.stdout.splitlines())
    assert command_line["shape"] == "tiny"
    assert command_line["dtype"] == "bf16"
    assert command_line["tokens_per_second"] > 0
    assert facts["time_step_limit"] == ["0.0", "inf"]
    assert facts["router_bias"] == "torch.float32"
    assert facts["weights"] == "torch.bfloat16"
    # One batch seen five times is learnt by heart unless the loop does not train.
    assert facts["after"] < facts["before"] - 1


def test_it_refuses_our_stand_ins():
    process = run(STAND_IN)
    assert process.returncode != 0
    assert "mamba_ssm is our stand-in" in process.stderr
