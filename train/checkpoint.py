"""Saving and loading the whole state of a run through Megatron's dist_checkpointing.

`checkpoints/iter_0000100/` is complete once it holds `meta.json`; `latest` names the newest
complete one and moves only after every byte is on the disk. Any layout can load what any
other layout saved.
"""

import contextlib
import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import sha256_file, sha256_json, sync
from data.ranks import on_first_rank
from model.conversion.torch_dist import complete_checkpoints, step_of
from model.integrity import INTEGRITY
from recipes.errors import CheckpointError
from recipes.schema import CheckpointConfig
from recipes.stages import Place
from train.checksums import damage, write_sums
from train.forked import can_act
from train.guards import write_atomically
from train.optimizer_state import load_optimizer, own_settings
from train.saver import Saver
from train.shards import detach_storages
from train.state import (
    RNG,
    Progress,
    TrainState,
    content_metadata,
    model_key,
    set_rng_state,
    state_dict,
)
from train.writing import Writer

_FILES_OF_A_RANK = 2
"""Written side by side while training waits: two threads take 0.46 s for the 1.3 GB of small, one
0.83 (2 cores). Where training goes on one of them leaves it more."""
META = "meta.json"
LATEST = "latest"
_OWN, _LISTED = "sha256", "integrity_sha256"
"""Fields of meta.json: the checksum of the other fields, and that of the list of checksums."""
_BEFORE = {"progress", "layout", "data"}
"""The fields of a meta.json written when it had no checksum."""


class Checkpointer:
    """Saves, finds, checks and loads checkpoints of one run directory.

    Create it before the state: with `async_save` the process that saves is forked here.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        data_fingerprint: Callable[[int], str],
        say: Callable[[str], None],
        place: Place | None = None,
    ) -> None:
        """Args:
        folder: where the checkpoints are, inside the run directory.
        config: when to save and what to keep.
        data_fingerprint: hash of the data read in a number of steps; a checkpoint whose hash
            differs belongs to other data or another order.
        say: tells the user what was decided.
        place: the stage among those of its run; None: the run has no other. The checkpoint at
            the end of a stage is always kept.
        """
        self.folder = folder
        self.config = config
        self.data_fingerprint = data_fingerprint
        self.say = say
        self.place = place if place is not None and place.staged else None
        self.last_saved: int | None = None
        """Step of the newest complete checkpoint; call `wait` first if one is being written."""
        self._writer = Writer(folder.parent)
        self._strategy: Any = None
        self._removal: threading.Thread | None = None
        self._saver: Saver | None = None
        if config.async_save and can_act():
            self._saver = Saver(self._write_whole, lambda message: self.say(message))

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of the current step; in the background if so configured.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; the previous
                checkpoint is untouched. In the background: by the next call of `save`, `poll`
                or `wait`.
        """
        self.wait()
        with _garbage_left_alone():
            self._save(state)

    def before_update(self) -> None:
        """Wait until weights and moments may change: a background save may be copying them."""
        self._writer.copied()

    def poll(self) -> None:
        """Finish a background save that is done. A collective: every rank must call it."""
        self._writer.poll(blocking=False)

    def wait(self) -> None:
        """Wait for a background save. A collective: every rank must call it."""
        self._writer.poll(blocking=True)

    def close(self) -> None:
        """Finish what is being written and end the background workers."""
        self._writer.close()
        self._wait_for_removal()
        if self._saver is not None:
            self._saver.close()

    def leave(self) -> None:
        """After an error, which other ranks may not know of: let a save that processes beside the
        ranks do come to its end."""
        if self._saver is not None:
            self._saver.close()

    def load(self, state: TrainState) -> bool:
        """Load the newest usable checkpoint into `state`.

        Returns:
            False if there is none, so training starts from the beginning.

        Raises:
            CheckpointError: the newest checkpoint is damaged (and the recipe does not allow an
                older one), or it does not fit the model.
        """
        candidates = self._candidates()
        for i, path in enumerate(candidates):
            try:
                self._load(path, state)
            except _Damaged as damage:
                if not self.config.allow_previous:
                    raise CheckpointError(
                        f"{path} is damaged ({damage}); restore it, or set "
                        "checkpoint.allow_previous=true to go on from the one before"
                    ) from damage
                if i + 1 == len(candidates):
                    raise CheckpointError(
                        f"{path} is damaged ({damage}) and there is no older checkpoint"
                    ) from damage
                self.say(f"{path} is damaged ({damage}); using {candidates[i + 1]} instead")
                continue
            self.last_saved = state.progress.step
            return True
        return False

    def _save(self, state: TrainState) -> None:
        from megatron.core.dist_checkpointing.mapping import apply_factories

        state.gather_parameters()
        meta = self._meta(state)
        content = state_dict(state, loading=False)
        if self._saver is not None:
            step = state.progress.step
            # Megatron's factories are known here only; the optimizer's are applied there.
            apply_factories({key: part for key, part in content.items() if key != "optimizer"})
            self._writer.hand_over(
                self._saver, (content, meta), self._path(step), lambda: self._saved(step)
            )
        else:
            apply_factories(content)
            detach_storages(content)
            self._write(content, meta, background=self.config.async_save)

    def _path(self, step: int) -> Path:
        return self.folder / f"iter_{step:07d}"

    def _saved(self, step: int) -> None:
        self.last_saved = step

    def _meta(self, state: TrainState) -> dict[str, Any]:
        """The fields of meta.json."""
        meta = {
            "progress": asdict(state.progress),
            "layout": state.layout,
            "data": self.data_fingerprint(state.progress.step),
        }
        if self.place is not None:
            meta["stage"] = self._stage_at(state.progress.step)
        return meta

    def _write_whole(self, content: dict[str, Any], meta: dict[str, Any]) -> None:
        """All of a save, to the deletion of old ones, in the process that saves."""
        self._write(content, meta, background=False)
        self._wait_for_removal()

    def _write(self, content: dict[str, Any], meta: dict[str, Any], background: bool) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.torch import (
            TorchDistSaveShardedStrategy,
        )

        path = self._path(meta["progress"]["step"])
        with self._writer.explained():
            on_first_rank(lambda: _clear(path))
        first = self._strategy is None
        if first:
            # Plans once what each rank writes where: a run's state keeps its structure.
            self._strategy = TorchDistSaveShardedStrategy(
                cached_metadata=True,
                thread_count=1 if self.config.async_save else _FILES_OF_A_RANK,
            )
        request = dist_checkpointing.save(
            content,
            str(path),
            self._strategy,
            # That every piece of every tensor is written once does not change either.
            validate_access_integrity=first,
            # Asked for in either case: Megatron's own synchronous save leaves the other ranks
            # waiting when one cannot write.
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=content_metadata(),
        )
        assert request is not None
        request.finalize_fns.append(lambda: self._finish(path, meta))
        self._writer.run(request, path, background=background)

    def _candidates(self) -> list[Path]:
        """Complete checkpoints, newest first, none newer than `latest`; the same on all ranks."""
        found: list[list[str] | CheckpointError] = [[]]
        if dist.get_rank() == 0:
            latest = self.folder / LATEST
            complete = complete_checkpoints(self.folder)
            if latest.exists():
                name = latest.read_text(errors="replace").strip() or "(nothing)"
                named = step_of(name)
                older = [p.name for s, p in complete.items() if named is None or s < named]
                found = [[name, *reversed(older)]]
            elif complete:  # killed just before the first one was named
                found = [[path.name for path in reversed(complete.values())]]
        dist.broadcast_object_list(found, src=0)
        assert isinstance(found[0], list)
        return [self.folder / name for name in found[0]]

    def _load(self, path: Path, state: TrainState) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling
        from megatron.core.utils import unwrap_model

        meta = on_first_rank(lambda: _read_meta(path))
        wrong = damage(path)
        if wrong is not None:
            raise _Damaged(wrong)
        self._check_stage(path, meta)
        if meta["data"] != self.data_fingerprint(meta["progress"]["step"]):
            raise CheckpointError(
                f"{path} was trained on other data or in another order than data.train and "
                "run.seed give now; restore the data (a longer stage.train_steps can also need "
                "more epochs and so another order)"
            )
        same_layout = meta["layout"] == state.layout
        request = state_dict(state, loading=True)
        if not same_layout:
            request.pop(RNG)
        try:
            loaded, missing, unexpected = dist_checkpointing.load(
                request, str(path), strict=StrictHandling.RETURN_ALL
            )
        except dist_checkpointing.core.CheckpointingException as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
        missing = {k for k in missing if not k.startswith(RNG)}
        if missing or unexpected:
            raise CheckpointError(
                f"{path} does not fit this model; only in the checkpoint: "
                f"{some(missing)}; only in the model: {some(unexpected)}"
            )
        for i, chunk in enumerate(state.chunks):
            unwrap_model(chunk).load_state_dict(
                loaded[model_key(i, len(state.chunks))], strict=True
            )
        with own_settings(state.optimizer):
            load_optimizer(state.optimizer, loaded["optimizer"])
        # Megatron adds the loaded position to the present one, which a rollback has.
        state.schedule.num_steps = 0
        state.schedule.load_state_dict(loaded["schedule"])
        state.progress = Progress(**loaded["progress"])
        state.place_schedule()
        if same_layout:
            set_rng_state(loaded[RNG])
        else:
            self.say(
                f"layout changed from {meta['layout']} to {state.layout}: random states start "
                "anew (they matter only with dropout and stochastic rounding)"
            )

    def _stage_at(self, steps: int) -> dict[str, Any]:
        """Which stage the last of so many steps is in, and where that begins."""
        assert self.place is not None
        span = self.place.of_last_step(steps).span
        return {"name": span.name, "first_step": span.first_step, "first_tokens": span.first_tokens}

    def _check_stage(self, path: Path, meta: dict[str, Any]) -> None:
        """A run goes on in the stage it stopped in, or at the start of the next."""
        steps = meta["progress"]["step"]
        if self.place is None:
            if "stage" in meta:
                raise CheckpointError(
                    f"{path} is of stage {meta['stage']['name']} of a run with stages, which this "
                    "recipe has not; give its recipe, or checkpoint.load in another run.dir"
                )
            return
        expected = self._stage_at(steps)
        if meta.get("stage") != expected:
            raise CheckpointError(
                f"{path} is of stage {meta.get('stage')}, but by this recipe its step {steps} is "
                f"of {expected}; restore the lengths of the stages before"
            )
        if steps < self.place.span.first_step:
            raise CheckpointError(
                f"{path} is of stage {expected['name']}, before stage {self.place.span.name}; to "
                f"go back to it write {path.name} into {self.folder / LATEST}"
            )

    def _finish(self, path: Path, meta: dict[str, Any]) -> None:
        """Mark the checkpoint complete, move `latest`, drop what retention does not keep."""

        def publish() -> None:
            write_sums(path, self._writer.sums)
            for file in path.iterdir():
                sync(file)
            write_meta(path, meta)
            sync(self.folder)
            write_atomically(self.folder / LATEST, path.name + "\n")
            self._retain(meta["progress"]["step"])

        on_first_rank(publish)
        self._saved(meta["progress"]["step"])

    def _retain(self, newest: int) -> None:
        """Keep the complete checkpoints the recipe asks for; drop others, and unfinished ones.

        Complete ones newer than `newest` are of a future that `checkpoint.allow_previous` went
        back from: they neither count nor go.
        """
        complete = complete_checkpoints(self.folder)
        past = [step for step in complete if step <= newest]
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        kept = set(past if keep_last is None else past[-keep_last:]) | (complete.keys() - set(past))
        kept |= {step for step in past if keep_every and step % keep_every == 0}
        ends = {span.end for span in self.place.spans} if self.place is not None else set()
        kept |= ends & set(past)
        steps = {path: step_of(path.name) for path in self.folder.iterdir()}
        # Other names are of users' own copies.
        dropped = [p for p, step in steps.items() if step is not None and step not in kept]
        for path in dropped:
            _discard(path)
        self._wait_for_removal()
        # To delete gigabytes takes as long as some steps.
        self._removal = threading.Thread(target=_remove, args=dropped)
        self._removal.start()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None


@contextlib.contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Inside, Python's collector passes over what is there and does not start by itself. Megatron
    starts it whenever it is asked for the optimizer's state, and before every fork, to go through
    all that lives as long as the run."""
    automatic = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()


def _clear(path: Path) -> None:
    """Make the empty folder of a new checkpoint."""
    _remove(path)
    path.mkdir(parents=True)


def _discard(path: Path) -> None:
    """Let a checkpoint count as incomplete, whatever is left of it."""
    (path / META).unlink(missing_ok=True)


def _remove(*paths: Path) -> None:
    """Remove checkpoints; a kill in the middle leaves an incomplete one."""
    for path in paths:
        _discard(path)
        shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """A checkpoint whose files are missing, cut or changed."""


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Mark a checkpoint complete. Its own checksum and that of the list of checksums are in it."""
    whole = meta | {_LISTED: sha256_file(path / INTEGRITY)}
    text = json.dumps(whole | {_OWN: sha256_json(whole)}, indent=1)
    write_atomically(path / META, text + "\n")


def _read_meta(path: Path) -> dict[str, Any]:
    """What `write_meta` wrote.

    Raises:
        _Damaged: it, or the list of checksums, is missing or changed.
    """
    if not (path.is_dir() and path.name.startswith("iter_")):
        raise _Damaged(f"{LATEST} names it, and there is no such checkpoint")
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
        own, listed = meta.pop(_OWN, None), meta.get(_LISTED)
        changed = (
            own != sha256_json(meta) if own or listed or set(meta) - {"stage"} != _BEFORE else False
        )
    except OSError as error:
        raise _Damaged(f"{META}: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise _Damaged(f"{META} is not as it was saved ({error})") from error
    if changed:
        raise _Damaged(f"{META} is not as it was saved: its SHA-256 differs")
    if listed and (not (path / INTEGRITY).exists() or sha256_file(path / INTEGRITY) != listed):
        raise _Damaged(f"{INTEGRITY} is missing or not as it was saved")
    return meta


def some(names: set[str]) -> str:
    """A few of the names, for a message."""
    shown = sorted(names)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(shown[:5]) + more if shown else "nothing"
