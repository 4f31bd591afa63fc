"""What saving costs training, and how fast it writes, beside a plain write of the same bytes.

    python -m tests.benchmarks.save --folder /a/disk/with/room [--rounds 3] [--data corpora]
        [--tensor-mb 0.25 1 4 16 64] [--ranks 2]

prints one JSON object: for the real state of experiment=small (or another) and for a synthetic one,
the seconds for which a synchronous and an asynchronous save stop the trainer, the bytes a second
of the former as a share of a plain write with sync, and what checksums cost saving and loading.
Synchronous saves and plain writes alternate, each after as many bytes were deleted: a plain write
takes 0.6 s or 3.6 s here by which pages the kernel finds for its cache. `fastest` compares the
fastest of each. With --tensor-mb also those of states of tensors of these sizes.
A synchronous save stops it until the checkpoint is complete; an asynchronous one while the state is
described to another process, which then copies it (async_copy: a step may not end before that). The
same of several ranks, which share the optimizer's state, with --ranks. What else the latter costs
(memory and disk are shared) is seen with --data: how much longer the steps after a save take.
"""

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.convert import drop_caches


def real_state(experiment: str, *overrides: str) -> Any:
    """The state of a recipe, with optimizer state in it."""
    import torch.distributed as dist

    from model.validate import validate_recipe
    from recipes.compose import load_recipe
    from train.build import build_state

    recipe = load_recipe([f"experiment={experiment}", "run.dir=unused", *overrides])
    state, _ = build_state(recipe, validate_recipe(recipe, dist.get_world_size()))
    state.optimizer.prepare_grads()
    state.optimizer.step()  # creates the moments
    return state


def measure_ranks(rank: int, ranks: int, folder: Path, experiment: str, rounds: int) -> Any:
    """Seconds that data-parallel ranks stand still for a save; medians of some rounds."""
    from model.backends import install_backends
    from parallel.groups import initialize_groups
    from recipes.compose import load_recipe

    install_backends("host")
    own = [f"parallel.data_parallel_size={ranks}", "stage.micro_batch_size=1"]
    recipe = load_recipe([f"experiment={experiment}", "run.dir=unused", *own])
    initialize_groups(recipe.parallel, recipe.run.seed)
    saves = {name: Saves(folder, name == "async") for name in ("sync", "async")}
    state = real_state(experiment, *own)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in saves}
    for i in range(rounds + 1):
        for name, one in saves.items():
            parts = one.once(state)
            if i:  # the first one warms up
                found[name].append(parts)
    saves["async"].checkpointer.close()
    result = {
        f"{name}_{part}": round(median(parts[part] for parts in all_parts), 4)
        for name, all_parts in found.items()
        for part in all_parts[0]
    }
    stall = result["async_hand_over"] + result["async_finish"]
    return {"async_stall_of_sync": round(stall / result["sync_hand_over"], 3), "seconds": result}


def synthetic_state(gigabytes: float, megabytes: float = 64) -> dict[str, Any]:
    """Tensors of so many MiB as the state dictionary of a model and its optimizer."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    noise = torch.randn(round(megabytes * 2**8), 2**10)
    count = max(1, round(gigabytes * 1e9 / noise.nbytes))
    return {
        f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", noise.clone(), replica_id=0)
        for i in range(count)
    }


def plain_write(file: Path, size: int) -> float:
    """Seconds of one large write that ends when it is on the disk."""
    piece = os.urandom(2**26)
    started = time.perf_counter()
    with file.open("wb") as stream:
        for start in range(0, size, len(piece)):
            stream.write(memoryview(piece)[: size - start])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Saves:
    """Checkpoints of a state, one after the other, in a folder."""

    def __init__(self, folder: Path, background: bool) -> None:
        from recipes.schema import CheckpointConfig
        from train.checkpoint import Checkpointer

        config = CheckpointConfig(async_save=background, keep_last=1)
        self.checkpointer = Checkpointer(folder, config, lambda n: "no data", print)

    def once(self, state: Any) -> dict[str, float]:
        """Save, train meanwhile (wait), and become the latest; seconds of each part."""
        state.progress.step += 1
        parts = {"hand_over": seconds(lambda: self.checkpointer.save(state))}
        saver = self.checkpointer._saver
        parts["copy"] = seconds(self.checkpointer.before_update)
        parts["background"] = seconds(lambda: saver.ended(blocking=True)) if saver else 0.0
        parts["finish"] = seconds(self.checkpointer.poll)
        self.checkpointer._wait_for_removal()
        return parts

    def files(self, state: Any) -> list[Path]:
        """Of the latest."""
        return list(self.checkpointer._path(state.progress.step).iterdir())


def measure_writes(saves: Saves, state: Any, rounds: int) -> dict[str, float]:
    """Synchronous saves beside plain writes of as many bytes."""
    taken: dict[str, list[float]] = {"sync": [], "plain": []}
    for i in range(rounds + 1):
        sync = saves.once(state)["hand_over"]
        size = sum(f.stat().st_size for f in saves.files(state))
        plain = plain_write(saves.checkpointer.folder.parent / "plain", size)
        if i:  # the first one warms up
            taken["sync"].append(sync)
            taken["plain"].append(plain)
    sync, plain = median(taken["sync"]), median(taken["plain"])
    return {
        "gigabytes": round(size / 1e9, 3),
        "write_of_plain": round(plain / sync, 3),
        "fastest": round(min(taken["plain"]) / min(taken["sync"]), 3),
        "sync": round(sync, 4),
        "plain": round(plain, 4),
    }


def measure(folder: Path, make_state: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """All figures of one state; medians of some rounds."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoints = folder / "checkpoints"
    sync, background = [Saves(checkpoints, b) for b in (False, True)]  # before there is a state
    state = make_state()
    writes = measure_writes(sync, state, 3 * rounds)
    found: dict[str, list[float]] = {}
    for i in range(rounds + 1):
        one = {"sync": sync.once(state)["hand_over"]}
        files = sync.files(state)
        one["checksums"] = seconds(lambda: _hash(files))  # noqa: B023
        drop_caches(files[0].parent)
        one["checksums_from_disk"] = seconds(lambda: _hash(files))  # noqa: B023
        drop_caches(files[0].parent)
        one["load"] = seconds(lambda: sync.checkpointer.load(state)) if i else 0.0
        parts = background.once(state)
        one["async"] = parts["hand_over"] + parts["finish"]
        one |= {f"async_{name}": value for name, value in parts.items()}
        if i:  # the first one warms up
            for name, value in one.items():
                found.setdefault(name, []).append(value)
    background.checkpointer.close()
    result: dict[str, Any] = {name: round(median(values), 4) for name, values in found.items()}
    return {
        "writes": writes,
        "async_stall_of_sync": round(result["async"] / result["sync"], 3),
        "checksums_of_load": round(result["checksums_from_disk"] / result["load"], 3),
        "seconds": result,
    }


def _hash(files: list[Path]) -> None:
    from train.checksums import sum_of

    for file in files:
        sum_of(file)


class Synthetic:
    """Stands where a TrainState does, for a state that is only tensors."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        from train.state import Progress

        self.tensors, self.progress, self.layout = tensors, Progress(), {"dp": 1}

    def gather_parameters(self) -> None:
        """One rank has all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.save")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--experiment", default="small")
    parser.add_argument("--state-gb", type=float, default=4.0, help="of the synthetic state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensor-mb", type=float, nargs="+", default=[], help="sizes, in MiB")
    parser.add_argument("--ranks", type=int, help="of data parallelism, on this machine")
    parser.add_argument("--data", type=Path, help="STRATA_DATA for steps; none without")
    chosen = parser.parse_args()
    if chosen.data is not None:
        os.environ["STRATA_DATA"] = str(chosen.data)
    from model.backends import install_backends

    install_backends("host")
    from parallel.groups import one_rank

    root: Path = chosen.folder / "save_benchmark"
    shutil.rmtree(root, ignore_errors=True)
    result: dict[str, Any] = {}
    try:
        with one_rank():
            result[chosen.experiment] = measure(
                root / "real", partial(real_state, chosen.experiment), chosen.rounds
            )
            shutil.rmtree(root)
            with synthetic_states():
                result["synthetic"] = measure(
                    root / "synthetic",
                    lambda: Synthetic(synthetic_state(chosen.state_gb)),
                    chosen.rounds,
                )
                for megabytes in chosen.tensor_mb:
                    shutil.rmtree(root)
                    (root / "checkpoints").mkdir(parents=True)
                    result[f"tensors of {megabytes:g} MiB"] = measure_writes(
                        Saves(root / "checkpoints", False),
                        Synthetic(synthetic_state(1.0, megabytes)),
                        3 * chosen.rounds,
                    )
            if chosen.data is not None:
                result["training"] = measure_training(
                    root / "training", chosen.experiment, 2 * chosen.rounds
                )
        if chosen.ranks is not None:
            from tests.distributed.harness import run_distributed

            folder = root / "ranks/checkpoints"
            folder.mkdir(parents=True)
            work = (folder, chosen.experiment, chosen.rounds)
            result[f"{chosen.ranks} ranks"] = run_distributed(
                measure_ranks, chosen.ranks, *work, timeout=600
            )[0]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(result, indent=1))


def measure_training(folder: Path, experiment: str, rounds: int) -> dict[str, Any]:
    """Seconds that a save adds to the steps after it, beside as many steps just before and just
    after them (machines are not equally fast all the time). The trainer has one thread."""
    import torch

    from model.validate import validate_recipe
    from recipes.compose import load_recipe
    from train.batches import Batches
    from train.build import build_state
    from train.trainer import Trainer

    shape = ["stage.sequence_length=512", "stage.global_batch_size=2", "stage.micro_batch_size=2"]
    recipe = load_recipe([f"experiment={experiment}", f"run.dir={folder}", *shape])
    folder.mkdir()
    saves = {mode: Saves(folder, mode == "async") for mode in ("sync", "async")}
    layout = validate_recipe(recipe, 1)
    state, routers = build_state(recipe, layout)
    data, torch_threads = Batches(recipe, layout.dp), torch.get_num_threads()
    checkpointer = saves["sync"].checkpointer
    trainer = Trainer(recipe, state, routers, data, checkpointer, None, [1.0])  # type: ignore[arg-type]
    torch.set_num_threads(1)

    def some_steps(mode: str | None) -> float:
        """Longer than a save takes."""
        trainer.checkpointer = saves[mode or "sync"].checkpointer
        started = time.perf_counter()
        if mode is not None:
            trainer.checkpointer.save(state)
        for _ in range(3):
            trainer._step()
            trainer.checkpointer.poll()
        taken = time.perf_counter() - started
        trainer.checkpointer.wait()
        return taken

    added: dict[str, list[float]] = {"sync": [], "async": []}
    for i in range(rounds + 1):
        before = some_steps(None)
        for mode in added:
            with_save, after = some_steps(mode), some_steps(None)
            if i:  # the first ones warm up
                added[mode].append(with_save - (before + after) / 2)
            before = after
    for one in saves.values():
        one.checkpointer.close()
    torch.set_num_threads(torch_threads)
    cost = {mode: median(values) for mode, values in added.items()}
    return {
        "seconds_a_sync_save_adds": round(cost["sync"], 3),
        "seconds_an_async_save_adds": round(cost["async"], 3),
        "async_of_sync": round(cost["async"] / cost["sync"], 3),
        "all": {mode: [round(v, 3) for v in values] for mode, values in added.items()},
    }


@contextlib.contextmanager
def synthetic_states() -> Iterator[None]:
    """Inside, a Checkpointer saves and loads a `Synthetic` by the code it has for a TrainState."""
    from unittest import mock

    from train import checkpoint

    def state_dict(state: Synthetic, loading: bool) -> dict[str, Any]:
        return dict(state.tensors)

    with (
        mock.patch.object(checkpoint, "state_dict", state_dict),
        mock.patch.object(checkpoint.Checkpointer, "load", _load_synthetic),
    ):
        yield


def _load_synthetic(checkpointer: Any, state: Synthetic) -> None:
    """What loading does to any state: checksums, then tensors."""
    from megatron.core import dist_checkpointing

    from train.checksums import damage

    path = checkpointer.folder / f"iter_{state.progress.step:07d}"
    assert damage(path) is None
    dist_checkpointing.load(dict(state.tensors), str(path))


if __name__ == "__main__":
    main()
