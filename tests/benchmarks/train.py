"""Training speed as ratios within one run on one machine.

    python -m tests.benchmarks.train [hugging_face] [bare] [startup] [precision]

- `hugging_face`: tokens/s of `python -m train` against transformers' NemotronH of the same
  shape in a plain PyTorch loop (tests/benchmarks/hf_loop.py), BF16, MTP off on both sides,
  alternating in processes of their own.
- `bare`: the trainer's step against the barest loop over Megatron's schedule and optimizer on
  the same model, alternating in one process.
- `precision`: step time of the small model in emulated NVFP4 and MXFP8 against BF16, alternating
  in processes of their own.
- `startup`: seconds from the command to the first reported step, tiny model.

Prints one JSON object a line. Needs the prepared data of `python -m data.prepare
experiment=tiny`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.world import spin_briefly

ROUNDS = 3
SHAPES = {
    "tiny": ("MEMEM*EME", 256, 8, 12),
    "small": ("MEMEMEM*EMEMEM*EME", 1024, 4, 5),
}
"""Model -> pattern without MTP, sequence length, sequences of a step, steps."""


def hugging_face() -> None:
    """Ratio (a) of the speed criterion."""
    for name in SHAPES:
        pairs = [(_ours(name), _theirs(name)) for _ in range(ROUNDS)]
        ratios = [a / b for a, b in pairs]
        _print("hugging_face", name, ratios, "tokens/s ours, theirs", pairs)


def precision() -> None:
    """What emulated block formats cost, as ratios of step times."""
    speeds: dict[str, list[float]] = {"bf16": [], "nvfp4": [], "mxfp8": []}
    for _ in range(ROUNDS):
        for name, found in speeds.items():
            found.append(_ours("small", f"precision={name}"))
    for name in ("nvfp4", "mxfp8"):
        pairs = list(zip(speeds["bf16"], speeds[name], strict=True))
        _print("precision", name, [a / b for a, b in pairs], "tokens/s bf16, this", pairs)


def _ours(name: str, *overrides: str) -> float:
    pattern, sequence, batch, steps = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        _train(
            f"experiment={name}",
            f"run.dir={folder}/run",
            f"model.hybrid_layer_pattern={pattern}",
            f"stage.sequence_length={sequence}",
            f"stage.global_batch_size={batch}",
            f"stage.micro_batch_size={batch}",
            f"stage.train_steps={steps}",
            "stage.eval_interval=null",
            "stage.eval_steps=1",
            "checkpoint.save_interval=null",
            *overrides,
        )
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines]
    return statistics.median(speeds[len(speeds) // 3 :])


def _theirs(name: str) -> float:
    _, sequence, batch, steps = SHAPES[name]
    sizes = ["--seq", str(sequence), "--batch", str(batch), "--steps", str(max(2, steps // 2))]
    command = [sys.executable, "-m", "tests.benchmarks.hf_loop", "--shape", name, *sizes]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["tokens_per_second"])


def _train(*overrides: str) -> None:
    command = [sys.executable, "-m", "train", *overrides, "logging.progress=false"]
    subprocess.run(command, check=True, capture_output=True)


def bare() -> None:
    """Ratio (b): what the trainer adds to Megatron's own work."""
    from model.backends import install_backends
    from model.validate import validate_recipe
    from recipes.compose import load_recipe
    from train.world import joined_world

    backends = install_backends("host")
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(["experiment=tiny", f"run.dir={folder}", "logging.progress=false"])
        layout = validate_recipe(recipe)
        with joined_world(recipe, backends, None):
            _compare_steps(recipe, layout, folder)


def _compare_steps(recipe: Any, layout: Any, folder: str) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from model.counts import flops_per_token
    from train.batches import Batches
    from train.build import build_state
    from train.metrics import Reporter
    from train.step import forward_step
    from train.trainer import Trainer

    state, routers = build_state(recipe, layout)
    data = Batches(recipe, layout.dp)
    reporter = Reporter(Path(folder), recipe.logging, True, {}, 0, 100)
    flops = flops_per_token(recipe.model, recipe.stage.sequence_length)
    no_checkpoints: Any = None
    trainer = Trainer(recipe, state, routers, data, no_checkpoints, reporter, [flops])
    forward_backward, batches = get_forward_backward_func(), data.train_from(0)

    def ours() -> None:
        trainer.stop.agreed()
        started = time.perf_counter()
        result = trainer._step()
        reporter.step(trainer._record(result, time.perf_counter() - started))

    def barest() -> None:
        state.chunks[0].zero_grad_buffer()
        state.optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=state.chunks,
            num_microbatches=1,
            seq_length=recipe.stage.sequence_length,
            micro_batch_size=recipe.stage.micro_batch_size,
            forward_only=False,
        )
        state.optimizer.step()
        state.schedule.step(increment=2048)

    pairs = []
    for _ in range(ROUNDS * 4):
        pairs.append((_seconds(ours), _seconds(barest)))
    pairs = pairs[2:]  # the first steps warm up
    _print("bare", "tiny", [b / a for a, b in pairs], "seconds ours, bare", pairs[-3:])


def startup() -> None:
    """Seconds (c) from the command to the first reported step."""
    times = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            command = [sys.executable, "-m", "train", "experiment=tiny", f"run.dir={run}"]
            started = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not (run / "metrics.jsonl").exists():
                assert process.poll() is None, "the run ended before its first step"
                time.sleep(0.02)
            times.append(time.perf_counter() - started)
            process.kill()
            process.wait()
    _print("startup", "tiny", times, "seconds", times)


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _print(benchmark: str, model: str, ratios: list[float], what: str, values: Any) -> None:
    result = {"benchmark": benchmark, "model": model, "median": statistics.median(ratios)}
    result |= {"min": min(ratios), "max": max(ratios), what: values}
    rounded = json.loads(json.dumps(result), parse_float=lambda x: round(float(x), 3))
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    spin_briefly()
    benchmarks = {f.__name__: f for f in (hugging_face, bare, startup, precision)}
    for entry in sys.argv[1:] or benchmarks:
        benchmarks[entry]()
