"""A run directory as a comparison reads it, and what it proves."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf.errors import OmegaConfBaseException

from model.gemms import policy_of
from precision.policy import Policy, is_quantized
from recipes.errors import ConfigError
from recipes.schema import LengthConfig, ModelConfig, OptimizerConfig, Recipe, StageConfig
from recipes.stages import saved_recipe, train_steps
from train.gaps import Series
from train.metrics import MetricsFile
from train.rundir import NOT_LEARNING, flat

DATA_ORDER = "data_order"

HASHES = {
    "initial_parameters": "initial weights",
    DATA_ORDER: "data order",
    "recipe_without_precision": "recipes",
}
"""Entry of identity.json -> what it proves equal, in words."""

MEASURED = ("step", "loss", "mtp_loss", "tokens", "seconds", "tokens_per_second")
"""What every line of metrics.jsonl has."""

SHOWN = 3
"""Things listed in a sentence before it says how many more there are."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind."""

    folder: Path
    config: dict[str, Any]
    """The resolved recipe, config.json."""
    records: list[dict[str, Any]]
    """metrics.jsonl: steps 1, 2, ... without a gap."""
    identity: dict[str, str] | None
    """identity.json; None: an older run."""
    applied: list[dict[str, Any]] | None
    """precision.json; None: an older run."""
    telemetry: list[dict[str, Any]]
    """precision.jsonl; empty if it was not asked for."""

    @property
    def precision(self) -> str:
        """Name of its precision recipe."""
        return str(self.config["precision"]["name"])

    def part(self, section: str) -> dict[str, Any]:
        """One section of its recipe; a key younger than the run had its default effect in it."""
        defaults: dict[str, Any] = asdict(getattr(Recipe(), section))
        return defaults | self.config[section]

    @property
    def seed(self) -> int:
        """Its run.seed."""
        return int(self.config["run"]["seed"])

    @cached_property
    def model(self) -> ModelConfig:
        """Its model."""
        return ModelConfig(**_known(ModelConfig, self.config["model"]))

    @cached_property
    def stage(self) -> StageConfig:
        """Its stage."""
        stage = StageConfig(**_known(StageConfig, self.config["stage"]))
        stage.mix = [LengthConfig(**length) for length in self.config["stage"].get("mix", [])]
        return stage

    @cached_property
    def optimizer(self) -> OptimizerConfig:
        """Its optimizer."""
        return OptimizerConfig(**_known(OptimizerConfig, self.config["optimizer"]))

    @cached_property
    def policy(self) -> Policy | None:
        """What its recipe asks for, worked out anew, whatever the run says that it was asked for;
        None: a recipe that is not read any more."""
        try:
            return policy_of(saved_recipe(self.config))
        except (ConfigError, OmegaConfBaseException):
            return None

    def wanted(self, step: int) -> dict[str, str]:
        """Module -> what it runs in during a step, counted from 1; only with a policy."""
        assert self.policy is not None
        before = self.records[: step - 1]
        return self.policy.wanted(before[-1]["tokens"] if before else 0)

    @property
    def mtp_depths(self) -> int:
        """Multi-token-prediction depths."""
        return len(self.records[0]["mtp_loss"]) if self.records else 0

    def series(self, key: str, depth: int | None = None) -> Series:
        """[steps of the stage] of one metric (of one MTP depth); NaN where there is none."""
        values = np.full(train_steps(self.stage), np.nan)
        for i, record in enumerate(self.records):
            value = record.get(key)
            value = value[depth] if depth is not None and value is not None else value
            values[i] = np.nan if value is None else value
        return values

    def bad_steps(self) -> list[int]:
        """Steps whose loss, held-out loss or gradient was not finite, with the one the run stopped
        at."""
        bad = [
            r["step"]
            for r in self.records
            if None in (r["loss"], *r["mtp_loss"], r.get("validation_loss", 0.0))
            or not r.get("updated", True)
        ]
        return bad + (
            [len(self.records) + 1] if len(self.records) < train_steps(self.stage) else []
        )

    def claims_quantized(self) -> bool:
        """Whether its recipe has a rule with a quantised format."""
        precision = self.config["precision"]
        switch = precision.get("switch") or {}
        rules = [*precision.get("rules", []), *precision.get("extra_rules", [])]
        rules += switch.get("rules") or []
        return any(is_quantized(f) for f in [r["format"] for r in rules] + [switch.get("to") or ""])


def read_run(folder: Path) -> FinishedRun:
    """Read a run that is finished, or that ended because a loss or gradient was not finite.

    Raises:
        ConfigError: there is no run, it is damaged, or it is not finished.
        DataError: a line of its metrics is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        run = FinishedRun(
            folder=folder,
            config=config,
            records=MetricsFile(folder / "metrics.jsonl").read(),
            identity=_json(folder / "identity.json"),
            applied=(_json(folder / "precision.json") or {}).get("applied"),
            telemetry=MetricsFile(folder / "precision.jsonl").read(),
        )
        steps, done = train_steps(run.stage), len(run.records)
        # Whatever lacks these, or is no table at all, is damaged.
        found = [{key: r[key] for key in MEASURED}["step"] for r in run.records]
        dict(run.identity or {})
    except OSError as error:
        raise ConfigError(
            f"{folder} is not a run that can be compared ({error.filename}: {error.strerror}); "
            "name directories that `python -m train` has written"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} holds a damaged file ({type(error).__name__}: {error}); train it anew"
        ) from error
    if config.get("stages"):
        raise ConfigError(
            f"{folder} has stages ({', '.join(config['stages'])}), which cannot be compared; train "
            "one of them with run.stage=NAME"
        )
    if found != list(range(1, done + 1)):
        wrong = next(i for i, step in enumerate(found, start=1) if step != i)
        raise ConfigError(f"{folder}/metrics.jsonl lacks step {wrong}; train it anew")
    if done > steps or (done < steps and not _stopped_at(folder, done + 1)):
        raise ConfigError(
            f"{folder} has done {done} of {steps} steps; finish it with the command in its "
            "command.txt"
        )
    return run


def same_length(runs: Sequence[FinishedRun]) -> None:
    """Every step of every run ends at the same number of tokens.

    Raises:
        ConfigError: naming the runs that differ from the first.
    """
    first = runs[0]
    for run in runs[1:]:
        steps, wanted = train_steps(run.stage), train_steps(first.stage)
        if steps != wanted:
            raise ConfigError(
                f"{run.folder} has {steps} steps and {first.folder} {wanted}; compare runs of "
                "one length"
            )
        for one, other in zip(run.records, first.records, strict=False):
            if one["tokens"] != other["tokens"]:
                raise ConfigError(
                    f"{run.folder} has read {one['tokens']} tokens at step {one['step']} and "
                    f"{first.folder} {other['tokens']}; compare runs with one batch size"
                )
        if run.mtp_depths != first.mtp_depths and run.records and first.records:
            raise ConfigError(
                f"{run.folder} has {run.mtp_depths} MTP depths and {first.folder} "
                f"{first.mtp_depths}; compare models that predict the same tokens"
            )


def unpaired(arm: FinishedRun, base: FinishedRun) -> list[str]:
    """Why two runs may differ in more than precision, or in more than the model, in words; empty:
    hashes prove that they do not. Two models cannot have the same weights, and so not the same
    hashes of weights and recipe: they prove the data order, and every other key must be the same.
    """
    models = arm.part("model") != base.part("model")
    proofs = [DATA_ORDER] if models else list(HASHES)
    old = [str(r.folder) for r in (base, arm) if any(_hash(r, key) is None for key in proofs)]
    wrong = [HASHES[key] for key in proofs if _hash(arm, key) != _hash(base, key)]
    if old:
        have = "has" if len(old) == 1 else "have"
        reasons = [f"not proved: {_and(old)} {have} no identity.json with every hash"]
    elif wrong:
        reasons = [f"{_and(wrong)} {'differs' if wrong == [HASHES[DATA_ORDER]] else 'differ'}"]
    elif models:
        reasons = []
    else:
        return []
    keys = differing_keys(arm, base)
    if models:
        keys = [line for line in keys if not line.startswith("model.")]
        if arm.part("precision") != base.part("precision"):
            keys.append(f"precision {base.precision} -> {arm.precision}")
    return reasons + ([f"keys that differ: {shortened(keys)}"] if keys else [])


def same_data(arm: FinishedRun, base: FinishedRun) -> bool:
    """Whether both read the same text in the same order, by hash, or for older runs by recipe."""
    hashes = _hash(arm, DATA_ORDER), _hash(base, DATA_ORDER)
    if None not in hashes:
        return hashes[0] == hashes[1]
    return arm.seed == base.seed and arm.config.get("data") == base.config.get("data")


def seeds_of_one(arm: FinishedRun, base: FinishedRun) -> bool:
    """Whether two runs differ in nothing but the seed."""
    alike = arm.part("precision") == base.part("precision")
    return alike and all(line.startswith("run.seed ") for line in differing_keys(arm, base))


def differing_keys(arm: FinishedRun, base: FinishedRun) -> list[str]:
    """`key: old -> new` for every key outside precision that is not the same."""
    # A key that is younger than a run had its default effect in it.
    old, new = (flat(asdict(Recipe())) | flat(run.config) for run in (base, arm))
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == k or key.startswith(f"{k}.") for k in NOT_LEARNING)
    ]


def format_failures(run: FinishedRun) -> list[str]:
    """What is wrong with the formats a run computed in, or not proved about them."""
    claims = run.claims_quantized()
    if not run.applied:
        unproved = f"not proved: {run.folder} has no precision.json to show what it computed in"
        return [unproved] if claims else []
    modules = [(name, m) for entry in run.applied for name, m in entry["modules"].items()]
    wrong = [
        f"{name} in {m['ran']} instead of {m['wanted']}"
        for name, m in modules
        if m["ran"] != m["wanted"]
    ]
    failures = []
    if run.policy is not None:
        wrong += _off_policy(run, run.applied)
    else:
        failures.append(
            f"not proved: {run.folder}/config.json has no precision that can be read, so nothing "
            "says what its modules should have run in"
        )
    if wrong:
        failures.append(
            f"{run.folder}: modules ran in another format: {shortened(list(dict.fromkeys(wrong)))}"
        )
    if claims and not any(is_quantized(m["ran"]) for _, m in modules):
        failures.append(f"{run.folder}: precision={run.precision} quantised no module")
    return failures


def _off_policy(run: FinishedRun, applied: Sequence[dict[str, Any]]) -> list[str]:
    """Modules that did not run in what the recipe says, at each change and in the last step."""
    entries = [(entry["from_step"], entry["modules"]) for entry in applied]
    entries.append((max(1, len(run.records)), applied[-1]["modules"]))
    wrong = []
    for step, modules in entries:
        ran, wanted = {name: m["ran"] for name, m in modules.items()}, run.wanted(step)
        wrong += [
            f"{name} in {ran.get(name, 'nothing known')} instead of {wanted.get(name, 'nothing')}"
            for name in sorted(ran.keys() | wanted.keys())
            if ran.get(name) != wanted.get(name)
        ]
    return wrong


def must_differ(arm: FinishedRun, base: FinishedRun) -> bool:
    """Whether two runs were asked for other formats early enough for a loss to show it."""
    if arm.policy is None or base.policy is None:
        claims = arm.claims_quantized() or base.claims_quantized()
        return claims and arm.part("precision") != base.part("precision")

    def quantised(run: FinishedRun, step: int) -> dict[str, str]:
        return {name: form for name, form in run.wanted(step).items() if is_quantized(form)}

    # What only gradients feel in the last step, no loss shows.
    return any(quantised(arm, s) != quantised(base, s) for s in (1, max(1, len(arm.records) - 1)))


def same_losses(arm: FinishedRun, base: FinishedRun) -> bool:
    """Whether every step of both has exactly the same losses."""
    losses = [[(r["loss"], r["mtp_loss"]) for r in run.records] for run in (arm, base)]
    return losses[0] == losses[1] and bool(losses[0])


def shortened(items: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _hash(run: FinishedRun, key: str) -> str | None:
    return None if run.identity is None else run.identity.get(key)


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _known(section: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of the keys a section has today: an older run may have others."""
    names = {f.name for f in fields(section)}
    return {k: v for k, v in values.items() if k in names}


def _stopped_at(folder: Path, step: int) -> bool:
    """Whether the run ended at this step because its loss or gradient was not finite."""
    bad = _json(folder / "bad_steps.json") or []
    return any(b["step"] == step and b["action"] == "stop" for b in bad)
