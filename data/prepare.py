"""Text to tokens: `python -m data.prepare experiment=tiny`.

Writes each of `data.sources` as a Megatron .bin/.idx pair with a manifest, training the
tokenizer first if the recipe asks for one. Running it again does only what is missing.
"""

import dataclasses
import logging
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

from tqdm import tqdm

from data.files import locked, os_errors_as_data_errors, sha256_json
from data.manifest import Manifest, load_manifest, missing_reason, path_with, sizes_agree
from data.sources import InputFile, Source, check_unchanged, open_source
from data.tokenizer import (
    build_tokenizer,
    codec,
    identify,
    is_trained,
    tokenizer_sha256,
    train_bpe,
)
from data.workers import Encoded, encode_all
from recipes.errors import ConfigError, DataError
from recipes.schema import DataConfig, Recipe
from recipes.stages import stage_recipes

_SPACE = "free space or choose another folder (STRATA_DATA), then run again; nothing is lost"


def prepare(cfg: DataConfig) -> None:
    """Make every source of the recipe that is not there yet, and print what was done.

    Safe to call from several processes at once: one works, the others wait for it.

    Raises:
        ConfigError, DataError: what the user has to mend; finished pairs stay as they were.
    """
    if not cfg.sources:
        raise ConfigError(
            f"data.sources of data={cfg.name} is empty, so there is nothing to prepare; add "
            "sources, or point data.train at existing .bin/.idx files"
        )
    outputs = [s.output for s in cfg.sources]
    for output in outputs:
        if outputs.count(output) > 1:
            raise ConfigError(f"data.sources has output={output} twice; give each its own")
    if cfg.prepare_workers < 1:
        raise ConfigError(f"data.prepare_workers={cfg.prepare_workers} must be 1 or more")
    sources = [open_source(f"data.sources[{i}]", s) for i, s in enumerate(cfg.sources)]
    _train_tokenizer(cfg, sources)
    for source in sources:
        output = source.cfg.output
        with (
            os_errors_as_data_errors(f"{source.key}.output={output}", _SPACE),
            locked(path_with(output, ".lock")),
        ):
            print(_prepare_source(cfg, source), flush=True)


def ensure_prepared(cfg: DataConfig) -> None:
    """Before training: prepare what is missing if the recipe allows it, else say what to do.

    Every rank may call it; only one prepares.

    Raises:
        DataError: data is missing.
    """
    missing = {
        f"data.{split}[{i}].path={entry.path}": reason
        for split, blend in (("train", cfg.train), ("validation", cfg.validation))
        for i, entry in enumerate(blend)
        if (reason := missing_reason(entry.path)) is not None
    }
    if not missing:
        return
    if cfg.prepare_if_missing:
        prepare(cfg)
        missing = {k: r for k in missing if (r := missing_reason(k.split("=", 1)[1])) is not None}
    for key, reason in missing.items():
        raise DataError(
            f"{key}: {reason}; run: python -m data.prepare data={cfg.name} (or the same "
            "experiment=), or set data.prepare_if_missing=true"
        )


def _train_tokenizer(cfg: DataConfig, sources: list[Source]) -> None:
    tokenizer = cfg.tokenizer
    if tokenizer.train_vocab_size is None:
        return
    if tokenizer.library != "huggingface" or tokenizer.path is None:
        raise ConfigError(
            "data.tokenizer.train_vocab_size trains a huggingface tokenizer; set "
            "data.tokenizer.library=huggingface and data.tokenizer.path to its directory"
        )
    if is_trained(tokenizer):
        return
    trained_on = {entry.path for entry in cfg.train}
    chosen = [s for s in sources if s.cfg.output in trained_on] or sources[:1]
    path = path_with(tokenizer.path, "")
    with (
        os_errors_as_data_errors(f"data.tokenizer.path={tokenizer.path}", _SPACE),
        locked(path_with(tokenizer.path, ".lock")),
    ):
        if is_trained(tokenizer):  # by whoever held the lock
            return
        texts = _spread(chosen)
        first = next(texts, None)
        if first is None:
            raise DataError(f"{_empty(chosen[0])}, so there is nothing to train a tokenizer on")
        size = train_bpe(chain([first], texts), path, tokenizer.train_vocab_size)
    print(f"{tokenizer.path}: tokenizer trained, {size:,} tokens", flush=True)


def _spread(sources: list[Source]) -> Iterator[str]:
    """Every seventh document of all sources, then the ones after those, ..."""
    stride = 7
    files = [source.inputs([]) for source in sources]
    for start in range(stride):
        for source, inputs in zip(sources, files, strict=True):
            yield from islice(source.documents(inputs), start, None, stride)


def _prepare_source(cfg: DataConfig, source: Source) -> str:
    """Write one pair unless it is up to date; returns one line about it."""
    output = source.cfg.output
    target = path_with(output, ".json")
    old = load_manifest(target)
    files = source.inputs(old.inputs if old else [])
    inputs = _inputs(cfg, source, files)
    if old is not None:
        changed = _changes(_inputs_of(old), inputs)
        if not changed and sizes_agree(output, old):
            return f"{output}: up to date, {_summary(old)}"
        print(f"{output}: rebuilding, {changed or 'its .bin/.idx are damaged'}", flush=True)

    from megatron.core.datasets.indexed_dataset import DType

    from data.writer import PairWriter, publish_merged

    tokenizer = build_tokenizer(cfg.tokenizer)
    identity = identify(cfg.tokenizer, tokenizer)
    dtype = DType.optimal_dtype(identity.vocab_size)
    digest = {"inputs": sha256_json(inputs)}
    writer = PairWriter(output, digest, dtype)
    published = publish_merged(output)
    if published is not None:
        return f"{output}: finished, {_summary(published)}"
    if writer.parts:
        print(f"{output}: continuing after {writer.documents} documents", flush=True)
    texts = islice(source.documents(files), writer.documents, None)
    encoded = _with_progress(
        encode_all(codec(tokenizer), texts, cfg.prepare_workers), source, files, writer.bytes
    )
    while writer.write_part(encoded, identity.eod):
        pass
    if not writer.parts:
        raise DataError(f"{_empty(source)}; nothing was written")
    check_unchanged(source.key, files)
    bin_file, idx_file = writer.merge()
    manifest = Manifest(
        source=inputs["source"],
        tokenizer=identity,
        inputs=files,
        documents=writer.documents,
        tokens=writer.tokens,
        bytes=writer.bytes,
        skipped=dict(source.skipped),
        dtype=dtype.__name__,
        bin=bin_file,
        idx=idx_file,
        versions=_versions(),
    )
    writer.publish(manifest)
    return f"{output}: written, {_summary(manifest)}"


def _with_progress(
    encoded: Iterator[Encoded], source: Source, files: list[InputFile], done: int
) -> Iterator[Encoded]:
    """Show megabytes of text on a terminal; logs get only the summary line."""
    with tqdm(
        desc=source.cfg.output,
        total=source.text_bytes(files),
        initial=done,
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for item in encoded:
            yield item
            bar.update(item[0])


def _inputs(cfg: DataConfig, source: Source, files: list[InputFile]) -> dict[str, Any]:
    """Everything that decides the tokens."""
    settings = dataclasses.asdict(source.cfg)
    del settings["output"]
    return {
        "source": settings | source.description(),
        "tokenizer": tokenizer_sha256(cfg.tokenizer),
        "files": {f.name: f.sha256 for f in files},
    }


def _inputs_of(manifest: Manifest) -> dict[str, Any]:
    return {
        "source": manifest.source,
        "tokenizer": manifest.tokenizer.sha256,
        "files": {f.name: f.sha256 for f in manifest.inputs},
    }


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two `_inputs`, in words; empty if nothing."""
    changes = [
        f"{key} was {old['source'].get(key)} and is {new['source'].get(key)}"
        for key in sorted(old["source"] | new["source"])
        if old["source"].get(key) != new["source"].get(key)
    ]
    if old["tokenizer"] != new["tokenizer"]:
        changes.append("another tokenizer")
    names = sorted(old["files"] | new["files"])
    files = [n for n in names if old["files"].get(n) != new["files"].get(n)]
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        changes.append(f"changed files: {', '.join(files[:3])}{more}")
    return "; ".join(changes)


def _empty(source: Source) -> str:
    left_out = ", ".join(f"{n} {why}" for why, n in sorted(source.skipped.items()))
    cap = source.cfg.max_megabytes
    hint = f" within max_megabytes={cap}" if cap is not None else ""
    found = f" (left out: {left_out})" if left_out else ""
    return f"{source.key}.dataset={source.cfg.dataset} has no document{hint}{found}"


def _summary(manifest: Manifest) -> str:
    skipped = "".join(f", {n} {why} left out" for why, n in sorted(manifest.skipped.items()))
    return (
        f"{manifest.documents:,} documents, {manifest.bytes / 1e6:,.1f} MB, "
        f"{manifest.tokens:,} tokens of {manifest.tokenizer.vocab_size:,}{skipped}"
    )


def _versions() -> dict[str, str]:
    packages = ("megatron-core", "datasets", "tokenizers", "transformers")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}


def main(recipe: Recipe) -> int:
    """Prepare the data of a recipe, of all its stages."""
    # Megatron and torch say at import which GPU parts are absent: no matter for text.
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    done: list[DataConfig] = []
    try:
        for one in stage_recipes(recipe):
            if one.data not in done:
                prepare(one.data)
                done.append(one.data)
    except KeyboardInterrupt:
        print("\ninterrupted; finished parts are kept, run the same command to continue")
        return 130
    return 0


if __name__ == "__main__":
    from recipes.compose import run_cli

    run_cli(main, "data.prepare", all_stages=True)
