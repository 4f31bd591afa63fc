"""The long-context experiment in small, and the memory a step takes."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.long_context import RECOMPUTE, measure
from tests.end_to_end.training import SMALL, Command, records, sources

LENGTHS = {"len_8k": 256, "len_32k": 512, "len_128k": 1024, "len_512k": 2048}
"""Stage of the experiment -> its length here."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_experiment_runs_through_its_stages(tmp_path: Path) -> None:
    """On whole packages, as it is shipped but for lengths: two ranks from the first long stage on,
    and 512k in turn with a short length."""
    run = tmp_path / "run"
    words = [f"stages.{s}.stage.sequence_length={length}" for s, length in LENGTHS.items()]
    short = "share: 0.5, sequence_length: 128, global_batch_size: 8"
    train = f"train: [{{path: {tmp_path}/code/train}}]"
    words += [f"stages.len_512k.stage.mix=[{{{short}, {train}}}]", f"run.dir={run}"]
    words += ["experiment=tiny_long_context", "stages.pretrain.stage.train_steps=2"]
    Command([*words, "logging.progress=false"], tmp_path).run(timeout=800)
    steps = records(run)
    tokens = [step["tokens"] for step in steps]
    taken = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    assert len(set(taken[:2])) == 1
    assert taken[2:12] == [256] * 4 + [512] * 4 + [1024] * 2
    assert sorted(taken[12:]) == [1024, 1024, 2048, 2048]
    assert all(("context" in step["wire"]) == (i >= 2) for i, step in enumerate(steps))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_grows_with_the_length(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same amount for every token: nothing is of the length's square. A matrix of 16,384
    x 8,192 BF16 scores would be 256 MiB, next to some 100 of everything else."""
    monkeypatch.setenv("STRATA_DATA", str(data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fixed = ("experiment", "stage.", "checkpoint.", "logging.progress")
    words = [w for w in SMALL if not w.startswith(fixed)]
    words += [*RECOMPUTE["selective"], sources(data)]
    lengths = (8192, 16384, 32768)
    first, second, third = (max(measure(tmp_path, n, words)["peaks"]) for n in lengths)
    assert third - second == pytest.approx(2 * (second - first), rel=0.3)
    state = json.loads((tmp_path / "32768" / "metrics.jsonl").read_text().splitlines()[-1])
    assert state["tokens"] == 2 * 32768
