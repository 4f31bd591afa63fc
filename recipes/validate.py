"""Rules of a recipe that need no knowledge of the model or the layout: precision, optimizer,
stage, checkpoints, guards, logging.

The rules of the model are in model/validate.py, those of the layout in parallel/layout.py;
`model.validate.validate_recipe` runs all of them.
"""

from dataclasses import replace
from math import lcm

from recipes.rules import above, at_least, fail, multiple, one_of, show, within
from recipes.schema import (
    BlendEntry,
    CheckpointConfig,
    CompareConfig,
    DataConfig,
    GuardConfig,
    LengthConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    PrecisionSwitch,
    Recipe,
    SensitivityConfig,
    StageConfig,
)
from recipes.stages import LONGEST_PATTERN, mix_shares, pattern

FORMATS = ("nvfp4", "mxfp8", "bf16", "fp32", "nvfp4_backward", "mxfp8_backward")
"""What a precision rule may ask for."""


def validate_run(recipe: Recipe, whole_schedule: bool = True) -> None:
    """Check everything but the model and the layout.

    Args:
        whole_schedule: the schedule of the learning rate is known: a stage may share it with
            others.

    Raises:
        ConfigError: the first rule that is broken.
    """
    one_of("device", recipe.device, ("auto", "cuda", "host"))
    # numpy, which shuffles the samples, takes 32-bit seeds; Megatron adds a rank's offset.
    within("run.seed", recipe.run.seed, 0, 2**31)
    at_least("cluster.threads_per_rank", recipe.cluster.threads_per_rank, 1, "cores / local ranks")
    _precision(recipe.precision)
    _stage(recipe.stage)
    _optimizer(recipe.optimizer)
    if whole_schedule:
        _schedule(recipe.optimizer, stage_tokens(recipe.stage))
    _checkpoint(recipe.checkpoint)
    _guard(recipe.guard, recipe.checkpoint, recipe.parallel)
    _logging(recipe.logging)
    _compare(recipe.compare)
    _sensitivity(recipe.sensitivity)
    _data(recipe.data)


def stage_tokens(stage: StageConfig) -> float:
    """Tokens of the stage, from whichever of train_steps and train_tokens is given."""
    if stage.train_tokens is not None:
        return stage.train_tokens
    assert stage.train_steps is not None, "validate the stage first"
    return float(pattern(stage).tokens(stage.train_steps))


def _precision(precision: PrecisionConfig) -> None:
    one_of("precision.params_dtype", precision.params_dtype, ("bf16", "fp32"))
    one_of("precision.evaluation", precision.evaluation, (None, "bf16", "mxfp8", "nvfp4"))
    for group in ("rules", "extra_rules", "switch.rules"):
        owner = precision.switch if group == "switch.rules" else precision
        for i, rule in enumerate(getattr(owner, group.rpartition(".")[2])):
            key = f"precision.{group}[{i}].format"
            one_of(key, rule.format, FORMATS)
            if rule.format == "fp32" and precision.params_dtype != "fp32":
                fail(
                    key,
                    "fp32",
                    f"cannot be had with precision.params_dtype={precision.params_dtype}",
                    "use bf16, which means not quantised, or params_dtype=fp32",
                )
    _switch(precision.switch)


def _switch(switch: PrecisionSwitch) -> None:
    key = "precision.switch"
    above(f"{key}.at_tokens", switch.at_tokens, 0, "no switch at a number of tokens")
    if switch.at_fraction is not None:
        within(f"{key}.at_fraction", switch.at_fraction, 0, 1)
    one_of(f"{key}.to", switch.to, (None, "bf16", "bf16_forward", "mxfp8", "nvfp4"))
    times = [t for t in (switch.at_tokens, switch.at_fraction) if t is not None]
    targets = [t for t in (switch.to, switch.rules) if t]
    if len(times) == 2:
        fail(
            f"{key}.at_tokens",
            switch.at_tokens,
            f"and {key}.at_fraction={show(switch.at_fraction)} both say when",
            "set one of them to null",
        )
    if len(targets) == 2:
        fail(
            f"{key}.to",
            switch.to,
            f"and {key}.rules both say what the formats become",
            "set to to null or leave rules empty",
        )
    if len(times) != len(targets):
        fail(
            f"{key}.to",
            switch.to,
            f"needs both a time ({key}.at_tokens or at_fraction) and a target (to or rules)",
            "give the missing one, or neither",
        )


def _stage(stage: StageConfig) -> None:
    for name in ("sequence_length", "global_batch_size", "micro_batch_size", "eval_steps"):
        at_least(f"stage.{name}", getattr(stage, name), 1)
    at_least("stage.eval_interval", stage.eval_interval, 1, "only at the end")
    _mix(stage)
    steps, tokens = stage.train_steps, stage.train_tokens
    if steps is None and tokens is None:
        fail(
            "stage.train_steps",
            None,
            "and stage.train_tokens=null leave the length of the stage open",
            "give one of them",
        )
    if steps is not None and tokens is not None:
        fail(
            "stage.train_steps",
            steps,
            f"and stage.train_tokens={show(tokens)} both fix the length of the stage",
            "set one of them to null",
        )
    if steps is not None:
        at_least("stage.train_steps", steps, 1)
    if tokens is not None:
        at_least("stage.train_tokens", tokens, stage.global_batch_size * stage.sequence_length)


def _mix(stage: StageConfig) -> None:
    for i, length in enumerate(stage.mix):
        key = f"stage.mix[{i}]"
        within(f"{key}.share", length.share, 0, 1)
        above(f"{key}.share", length.share, 0)
        for name in ("sequence_length", "global_batch_size", "micro_batch_size"):
            at_least(f"{key}.{name}", getattr(length, name), 1)
        _blend(f"{key}.train", length.train)
    if not stage.mix:
        return
    shares = mix_shares(stage)
    if shares[0] <= 0:
        fail(
            "stage.mix",
            [length.share for length in stage.mix],
            "leaves no steps for stage.sequence_length",
            "give shares whose sum is below 1",
        )
    steps = lcm(*(share.denominator for share in shares))
    if steps > LONGEST_PATTERN:
        fail(
            "stage.mix",
            [length.share for length in stage.mix],
            f"are shares whose order repeats only after {steps} steps",
            f"round them so that it repeats within {LONGEST_PATTERN}, as 0.125 or 0.08",
        )


def lengths_apart(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with each of its lengths as the only one, by the key of the length."""
    stage = recipe.stage
    found = {"stage": replace(recipe, stage=replace(stage, mix=[]))}
    for i, length in enumerate(stage.mix):
        own = _as_stage(stage, length)
        found[f"stage.mix[{i}]"] = replace(recipe, stage=own)
    return found


def _as_stage(stage: StageConfig, length: LengthConfig) -> StageConfig:
    return replace(
        stage,
        mix=[],
        sequence_length=length.sequence_length,
        global_batch_size=length.global_batch_size,
        micro_batch_size=length.micro_batch_size,
    )


def _optimizer(optimizer: OptimizerConfig) -> None:
    one_of("optimizer.optimizer", optimizer.optimizer, ("adam",))
    above("optimizer.lr", optimizer.lr, 0)
    within("optimizer.min_lr", optimizer.min_lr, 0, optimizer.lr, closed=True)
    for name in ("adam_beta1", "adam_beta2"):
        within(f"optimizer.{name}", getattr(optimizer, name), 0, 1)
    above("optimizer.adam_eps", optimizer.adam_eps, 0)
    at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    at_least("optimizer.clip_grad", optimizer.clip_grad, 0)
    one_of(
        "optimizer.lr_decay_style",
        optimizer.lr_decay_style,
        ("WSD", "cosine", "linear", "constant"),
    )
    one_of(
        "optimizer.lr_wsd_decay_style",
        optimizer.lr_wsd_decay_style,
        ("minus_sqrt", "linear", "cosine", "exponential"),
    )
    for name in ("lr_warmup_fraction", "lr_wsd_decay_fraction"):
        within(f"optimizer.{name}", getattr(optimizer, name), 0, 1, closed=True)
    at_least("optimizer.lr_warmup_tokens", optimizer.lr_warmup_tokens, 0, "lr_warmup_fraction")
    at_least(
        "optimizer.lr_wsd_decay_tokens",
        optimizer.lr_wsd_decay_tokens,
        0,
        "lr_wsd_decay_fraction",
    )
    above("optimizer.lr_schedule_tokens", optimizer.lr_schedule_tokens, 0, "the whole stage")


def _schedule(optimizer: OptimizerConfig, tokens: float) -> None:
    """Warmup and decay fit into the schedule."""
    schedule = optimizer.lr_schedule_tokens or tokens
    warmup_key, warmup = "optimizer.lr_warmup_tokens", optimizer.lr_warmup_tokens
    if warmup is None:
        warmup_key, warmup = "optimizer.lr_warmup_fraction", optimizer.lr_warmup_fraction * schedule
    decay = 0.0
    if optimizer.lr_decay_style == "WSD":
        decay = optimizer.lr_wsd_decay_tokens or 0.0
        if optimizer.lr_wsd_decay_tokens is None:
            decay = optimizer.lr_wsd_decay_fraction * schedule
    # Megatron needs a step after the warmup, so equality is a mistake without a decay.
    if warmup + decay > schedule or warmup >= schedule:
        shown = warmup if warmup_key.endswith("tokens") else optimizer.lr_warmup_fraction
        fail(
            warmup_key,
            shown,
            f"makes warmup ({warmup:g}) and decay ({decay:g} tokens) longer than the schedule "
            f"({schedule:g} tokens)",
            "shorten lr_warmup_* or lr_wsd_decay_*, or lengthen optimizer.lr_schedule_tokens",
        )


def _checkpoint(checkpoint: CheckpointConfig) -> None:
    at_least("checkpoint.save_interval", checkpoint.save_interval, 1, "only at the end")
    at_least("checkpoint.keep_last", checkpoint.keep_last, 1, "all")
    at_least("checkpoint.keep_every", checkpoint.keep_every, 1, "only the newest")
    if checkpoint.keep_every is not None and checkpoint.save_interval is not None:
        multiple(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            "checkpoint.save_interval",
            checkpoint.save_interval,
        )


def _guard(guard: GuardConfig, checkpoint: CheckpointConfig, parallel: ParallelConfig) -> None:
    one_of("guard.non_finite", guard.non_finite, ("stop", "skip", "rollback"))
    at_least("guard.max_non_finite", guard.max_non_finite, 1)
    if guard.non_finite == "rollback" and checkpoint.save_interval is None:
        fail(
            "guard.non_finite",
            guard.non_finite,
            "has nothing to go back to while checkpoint.save_interval=null",
            "set checkpoint.save_interval, or use stop or skip",
        )
    limit = guard.progress_timeout_minutes
    if limit is not None:
        above("guard.progress_timeout_minutes", limit, 0)
        if limit >= parallel.timeout_minutes:
            fail(
                "guard.progress_timeout_minutes",
                limit,
                "is not less than "
                f"parallel.timeout_minutes={show(parallel.timeout_minutes)}, after which "
                "collectives end the run before the stacks are written",
                "raise parallel.timeout_minutes",
            )


def _logging(logging: LoggingConfig) -> None:
    one_of("logging.wandb", logging.wandb, ("disabled", "offline", "online"))
    at_least("logging.precision_interval", logging.precision_interval, 1, "never")


def _compare(compare: CompareConfig) -> None:
    """What a comparison compares; that it compares anything is asked by train.compare."""
    at_least("compare.seeds", compare.seeds, 1)
    above("compare.budget", compare.budget, 0)
    given = [name for name in ("precisions", "models", "runs") if getattr(compare, name)]
    for name in given:
        values: list[str] = getattr(compare, name)
        key = f"compare.{name}"
        if len(values) == 1:
            fail(key, values, "leaves nothing to compare", "name two or more, the baseline first")
        if len(set(values)) < len(values):
            remedy = (
                "name each once" if name == "runs" else "name each once, or raise compare.seeds"
            )
            fail(key, values, "names the same twice", remedy)
    if len(given) > 1:
        one, other = given[:2]
        fail(
            f"compare.{one}",
            getattr(compare, one),
            f"and compare.{other}={show(getattr(compare, other))} both say what to compare",
            "give one of them (the other as []): precisions or models to train, or runs that are "
            "finished",
        )


def _sensitivity(sensitivity: SensitivityConfig) -> None:
    above("sensitivity.budget", sensitivity.budget, 0)
    one_of("sensitivity.measure", sensitivity.measure, ("alone", "protected"))
    at_least("sensitivity.batches", sensitivity.batches, 1)


def _data(data: DataConfig) -> None:
    """Only what can be said without looking at files; data/ checks those."""
    one_of(
        "data.tokenizer.library",
        data.tokenizer.library,
        ("huggingface", "tiktoken", "byte-level"),
    )
    at_least("data.prepare_workers", data.prepare_workers, 1)
    for blend in ("train", "validation"):
        _blend(f"data.{blend}", getattr(data, blend))
    for i, source in enumerate(data.sources):
        above(f"data.sources[{i}].max_megabytes", source.max_megabytes, 0, "all of it")


def _blend(key: str, blend: list[BlendEntry]) -> None:
    for i, entry in enumerate(blend):
        above(f"{key}[{i}].weight", entry.weight, 0)
