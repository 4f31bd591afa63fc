"""The training loop: read, step, check, report, validate, save."""

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.gemms import policy_of
from model.pattern import parse_pattern
from parallel import wire
from recipes.schema import Recipe
from recipes.stages import Place, Shape, Span, pattern, tokens_per_step
from train.checkpoint import Checkpointer
from train.guards import (
    EXIT_COMPLETE,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    BadStep,
    BadSteps,
    StopRequest,
)
from train.metrics import Reporter
from train.numerics import Numerics
from train.state import TrainState
from train.step import Routers, StepResult, reduce_losses, run_schedule
from train.telemetry import Telemetry


class Trainer:
    """Trains one stage of one run from wherever its state stands to its last step.

    Args:
        recipe: the validated recipe.
        state: model, optimizer, schedule and progress.
        routers: the model's routers, also wired in as finalize_model_grads_func.
        data: train and validation batches (`data.batches.Batches`).
        checkpointer: saves and loads the state.
        reporter: where records go.
        flops_per_token: training FLOPs of one token, for the FLOP/s figure; at each length of
            the stage, its own first.
        stop: notes stop signals; None: nothing stops it.
        place: the stage among those of its run; None: the run has no other.
        beat: called with the step's number for every micro batch; None: nobody watches.
    """

    def __init__(
        self,
        recipe: Recipe,
        state: TrainState,
        routers: Routers,
        data: Any,
        checkpointer: Checkpointer,
        reporter: Reporter,
        flops_per_token: Sequence[float],
        stop: StopRequest | None = None,
        place: Place | None = None,
        beat: Callable[[int], None] | None = None,
    ) -> None:
        self.recipe = recipe
        self.state = state
        self.routers = routers
        self.data = data
        self.checkpointer = checkpointer
        self.reporter = reporter
        self.flops_per_token = flops_per_token
        self.stop = stop or StopRequest()
        self.beat = beat or (lambda step: None)
        self.bad_steps = BadSteps(Path(recipe.run.dir), state.progress.step)
        self.numerics = Numerics(policy_of(recipe), state.chunks, Path(recipe.run.dir))
        self.telemetry = Telemetry(recipe, state.chunks, state.progress.step)
        self.place = place or Place([Span(recipe)])
        self.pattern = pattern(recipe.stage)
        self.last_step = self.place.span.end
        self.mtp_depths = parse_pattern(recipe.model.hybrid_layer_pattern).mtp_depths
        self.wire = wire.install()
        self.gradient_elements = gradient_elements(state.optimizer)
        self._batches: list[Iterator[dict[str, torch.Tensor]]] | None = None

    @property
    def stage_step(self) -> int:
        """Steps of the stage that are done."""
        return self.state.progress.step - self.place.span.first_step

    def _shape(self, stage_step: int) -> Shape:
        return self.pattern.shapes[self.pattern.at(stage_step)]

    def _num_microbatches(self, shape: Shape) -> int:
        """Of this rank."""
        return shape.global_batch_size // (shape.micro_batch_size * self.state.layout["dp"])

    def fit(self) -> int:
        """Train to the last step.

        Returns:
            The exit code: complete, stopped by a signal, or stopped by a bad step.
        """
        code = self._loop()
        self.checkpointer.wait()
        step = self.state.progress.step
        if step > 0 and step != self.checkpointer.last_saved:
            self._save()
        self.checkpointer.close()
        return code

    def _loop(self) -> int:
        stage, checkpoint = self.recipe.stage, self.recipe.checkpoint
        while self.state.progress.step < self.last_step:
            self.stop.error = self.data.damage()
            if self.stop.agreed():
                return EXIT_STOPPED
            started = time.perf_counter()
            result = self._step()
            seconds = time.perf_counter() - started
            if result.updated is False and not result.dropped:
                action = self._handle_bad_step(result)
                if action == "stop":
                    return EXIT_NON_FINITE
                if action == "rollback":
                    continue
            step = self.state.progress.step
            record = self._record(result, seconds)
            due = stage.eval_interval and step % stage.eval_interval == 0
            if self.data.has_validation and (due or step == self.last_step):
                loss = self.evaluate()
                if loss is not None:
                    record["validation_loss"] = loss
            self.reporter.step(record)
            self.checkpointer.poll()
            if checkpoint.save_interval and step % checkpoint.save_interval == 0:
                self._save()
        return EXIT_COMPLETE

    def _save(self) -> None:
        """Checkpoint, after the records it makes final are on the disk."""
        self.reporter.sync()
        self.checkpointer.save(self.state)

    def _step(self) -> StepResult:
        """Forward, backward and update on the next global batch."""
        learning_rate = self._learning_rate()
        if self.bad_steps.must_skip(self.state.progress.step + 1):
            self._advance()
            self._batches = None
            nothing = StepResult(loss=math.nan, grad_norm=math.nan, updated=False, dropped=True)
            nothing.learning_rate = learning_rate
            return nothing
        state = self.state
        if self._batches is None:
            self._batches = self._for_chunks(self.data.train_from(state.progress.step))
        biases = self.routers.biases()
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        shape = self._shape(self.stage_step)
        num_microbatches = self._num_microbatches(shape)
        step, tokens = state.progress.step + 1, state.progress.consumed_tokens
        of_stage = tokens - self.place.span.first_tokens
        self.wire.take()  # what was sent between two steps belongs to neither
        self.numerics.before_step(of_stage)
        with self.telemetry.watching(step, tokens + tokens_per_step(shape)):
            reports = self._run(self._batches, shape, forward_only=False)
        self.numerics.after_step(step, of_stage)
        result = reduce_losses(reports, self.routers, self.mtp_depths, num_microbatches)
        result.learning_rate = learning_rate
        # Asked before the update, which would write NaN into every weight.
        state.optimizer.prepare_grads()
        result.grad_norm = float(state.optimizer.get_grad_norm())
        if result.finite:
            self.checkpointer.before_update()
            _, _, zeros = state.optimizer.step()
            result.zero_grad_share = float(zeros) / self.gradient_elements
        else:
            result.updated = False
            self.routers.restore_biases(biases)
        result.wire, result.wire_seconds = wire.summary(self.wire.take())
        self._advance()
        return result

    def _advance(self, sign: int = 1) -> None:
        """Move the position by one step (or back)."""
        progress = self.state.progress
        shape = self._shape(self.stage_step if sign > 0 else self.stage_step - 1)
        progress.step += sign
        progress.consumed_samples += sign * shape.global_batch_size
        progress.consumed_tokens += sign * tokens_per_step(shape)
        self.state.schedule.step(increment=sign * tokens_per_step(shape))

    def evaluate(self) -> float | None:
        """Mean loss on the first held-out batches; None if a stop signal came meanwhile."""
        for chunk in self.state.chunks:
            chunk.eval()
        batches = self._for_chunks(self.data.validation())
        reports: list[torch.Tensor] = []
        stopped = False
        with torch.no_grad():
            for _ in range(self.recipe.stage.eval_steps):
                if self.stop.agreed():
                    stopped = True
                    break
                reports += self._run(batches, self.recipe.stage, forward_only=True)
        for chunk in self.state.chunks:
            chunk.train()
        loss = reduce_losses(reports, None, 0, 1).loss
        return None if stopped else loss

    def _for_chunks(self, batches: Iterator[Any]) -> list[Iterator[Any]]:
        """An iterator for each model chunk: every one of them asks for every micro batch, at
        times of its own."""
        return list(itertools.tee(self._watched(batches), len(self.state.chunks)))

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.beat(self.state.progress.step + 1)
            yield batch

    def _run(
        self,
        batches: list[Iterator[dict[str, torch.Tensor]]],
        shape: Shape,
        forward_only: bool,
    ) -> list[torch.Tensor]:
        """One pass of Megatron's schedule; [loss sum, tokens] of each micro batch."""
        count = self._num_microbatches(shape)
        return run_schedule(self.state.chunks, batches, count, shape, forward_only)

    def _handle_bad_step(self, result: StepResult) -> str:
        """Note a step that is not finite and do what the recipe says; returns what was done."""
        guard, progress = self.recipe.guard, self.state.progress
        action = guard.non_finite
        if self.bad_steps.survived >= guard.max_non_finite:
            action = "stop"
        if action == "rollback":
            self.checkpointer.wait()
            if self.checkpointer.last_saved is None:  # nothing to go back to yet
                action = "stop"
        writes = dist.get_rank() == 0
        bad = BadStep(
            step=progress.step,
            first_sample=self.data.first_sample(progress.step),
            loss=str(result.loss),
            grad_norm=str(result.grad_norm),
            action=action,
            documents=self.data.documents(progress.step) if writes else [],
        )
        self.bad_steps.add(bad, write=writes)
        self.reporter.say(
            f"step {bad.step}: loss {bad.loss}, gradient norm {bad.grad_norm}: {action}; "
            f"the documents of its batch are in {self.bad_steps.path}"
        )
        if action == "stop":
            self._advance(-1)  # so that a mended run goes on with this batch
        elif action == "rollback":
            self._roll_back()
        return action

    def _roll_back(self) -> None:
        loaded = self.checkpointer.load(self.state)
        assert loaded, "a rollback without a checkpoint is a stop"
        self.reporter.rewind(self.state.progress.step)
        self.telemetry.rewind(self.state.progress.step)
        self._batches = None

    def _record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        progress = self.state.progress
        which = self.pattern.at(self.stage_step - 1)
        tokens = tokens_per_step(self.pattern.shapes[which])
        record: dict[str, Any] = {
            "step": progress.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": progress.consumed_tokens,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": tokens * self.flops_per_token[which] / seconds,
            "seconds": seconds,
            "mtp_loss": result.mtp_losses,
            "load_balance_loss": result.load_balance_loss,
            "zero_grad_share": result.zero_grad_share,
            "max_violation": result.max_violation,
            "wire": result.wire,
            "wire_seconds": result.wire_seconds,
            "memory_gib": _peak_memory_gib(),
            "updated": result.updated,
        }
        if self.place.staged:
            record["stage"] = self.place.span.name
            record["stage_tokens"] = progress.consumed_tokens - self.place.span.first_tokens
        if self.place.staged or self.recipe.stage.mix:
            record["sequence_length"] = self.pattern.shapes[which].sequence_length
        experts = self.recipe.model.num_moe_experts
        if self.recipe.logging.expert_load and experts:
            record["expert_load"] = self.routers.expert_load(experts)
        if self.recipe.logging.log_params_hash:
            from train.hashes import parameters_hash

            self.state.gather_parameters()
            record["params_hash"] = parameters_hash(self.state.chunks)
        return record

    def _learning_rate(self) -> float:
        """Learning rate of the next step."""
        from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

        return float(get_canonical_lr_for_logging(self.state.optimizer.param_groups) or 0.0)


def _peak_memory_gib() -> float:
    """Peak memory of this process: the GPU's, or the resident set on a host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def gradient_elements(optimizer: Any) -> int:
    """Elements of the whole gradient, each counted once, as Megatron counts its zeros."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    own = sum(
        p.numel()
        for p in optimizer.get_parameters()
        if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)
    )
    total = torch.tensor([own], device=torch.cuda.current_device())
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return int(total.item())
