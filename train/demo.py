"""`make demo`: train the tiny model on real text, stop it, resume it, show what it learned; train
it again in NVFP4 and compare.

Runs the commands a user would type, each in a process of its own.
"""

import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from recipes.compose import run_cli
from recipes.errors import StrataError
from recipes.schema import Recipe
from recipes.stages import train_steps
from train.compare import EXIT_FAILED
from train.guards import EXIT_COMPLETE, EXIT_STOPPED
from train.metrics import MetricsFile


def main(recipe: Recipe) -> int:
    """Prepare, train half, stop by a signal, resume, report; then NVFP4 against BF16."""
    arguments = sys.argv[1:]
    folder, steps = Path(recipe.run.dir), train_steps(recipe.stage)
    metrics = MetricsFile(folder / "metrics.jsonl")
    started = time.monotonic()
    _start("data.prepare", arguments, expect=EXIT_COMPLETE)
    done = max((r["step"] for r in metrics.read()), default=0)
    if done < steps // 2:
        process = _announce("train", arguments)
        while process.poll() is None and len(metrics.read()) < steps // 2:
            time.sleep(0.2)
        print(f"\n>>> stopping the run at half time: kill -TERM {process.pid}", flush=True)
        process.send_signal(signal.SIGTERM)
        _check("train", process.wait(), EXIT_STOPPED)
        print(">>> it saved its state; the same command goes on from there", flush=True)
    _start("train", arguments, expect=EXIT_COMPLETE)
    print(report(recipe, metrics, time.monotonic() - started), flush=True)
    _compare_precisions(recipe, arguments)
    return 0


def _compare_precisions(recipe: Recipe, arguments: list[str]) -> None:
    """The same run in NVFP4, and the report on the two; its verdict is the user's to read."""
    bf16, nvfp4 = recipe.run.dir, f"{recipe.run.dir}-nvfp4"
    same = [a for a in arguments if not a.startswith(("run.dir=", "precision="))]
    telemetry = f"logging.precision_interval={max(1, train_steps(recipe.stage) // 4)}"
    _start(
        "train",
        [*same, "precision=nvfp4", f"run.dir={nvfp4}", telemetry],
        expect=EXIT_COMPLETE,
    )
    folders = [f"compare.runs=[{bf16},{nvfp4}]", f"run.dir={bf16}-compared"]
    code = _announce("train.compare", folders).wait()
    if code not in (EXIT_COMPLETE, EXIT_FAILED):
        _check("train.compare", code, EXIT_COMPLETE)


def report(recipe: Recipe, metrics: MetricsFile, seconds: float) -> str:
    """What was learned, against a model that knows only how frequent each token is."""
    from data.statistics import unigram_entropy

    records = metrics.read()
    first, last = records[0], records[-1]
    unigram = unigram_entropy(recipe.data.train[0].path, recipe.data.validation[0].path)
    validation = last["validation_loss"]
    rows = [
        ("unigram model, held-out text", unigram),
        (f"{recipe.model.name}, training loss at step {first['step']}", first["loss"]),
        (f"{recipe.model.name}, held-out text at step {last['step']}", validation),
        *((f"  MTP depth {i + 1}, training", x) for i, x in enumerate(last["mtp_loss"])),
    ]
    lines = [f"{'':46s} nats/token  perplexity"]
    lines += [f"{name:46s} {loss:10.3f}  {math.exp(loss):10.1f}" for name, loss in rows]
    lines += [
        "",
        f"{last['tokens']:,} tokens in {seconds:.0f} s; curves: {recipe.run.dir}/plots/curves.png",
    ]
    return "\n".join(lines)


def _announce(module: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = ["-m", module, *arguments]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command])


def _start(module: str, arguments: list[str], expect: int) -> None:
    _check(module, _announce(module, arguments).wait(), expect)


def _check(module: str, code: int, expected: int) -> None:
    if code != expected:
        raise StrataError(f"python -m {module} ended with exit code {code}, not {expected}")


if __name__ == "__main__":
    run_cli(main, "train.demo")
