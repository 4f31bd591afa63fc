"""`python -m train.generate runs/mine --prompt "def "`: try a checkpoint.

The checkpoint is a run, one of its checkpoints, a merged or an imported one, or a Hugging Face
`nemotron_h` folder, which is converted into a temporary folder first. One rank, unquantised.
--speculate N drafts N tokens a pass with the multi-token-prediction block and checks them: the
same text as greedy decoding, in fewer passes; how many drafts of each depth were right is printed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import CheckpointError, ConfigError, StrataError
from recipes.schema import ConvertConfig, TokenizerConfig
from train.loaded import Loaded, with_model

if TYPE_CHECKING:
    from data.tokenizer import Codec

THINKING = "</think>"


def main() -> None:
    """Entry point."""
    chosen = _arguments()
    try:
        with ExitStack() as stack:
            checkpoint = _native(chosen.checkpoint, stack)
            code = with_model(checkpoint, lambda loaded: generate(loaded, checkpoint, chosen))
    except StrataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.generate")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the mass to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculate", type=int, default=0, metavar="N", help="drafts a pass")
    parser.add_argument("--thinking-budget", type=int, help=f"tokens before {THINKING} is put in")
    parser.add_argument("--json", type=Path, help="also write the texts here")
    return parser.parse_args()


def generate(loaded: Loaded, checkpoint: Path, chosen: argparse.Namespace) -> int:
    """Print the continuation of each prompt.

    Raises:
        ConfigError: options that do not fit each other or the model.
    """
    import torch
    from tqdm import tqdm

    from data.tokenizer import build_tokenizer, codec
    from model.conversion.tokenizer import stop_tokens
    from train.decoding import Limits, decode, sampler

    _check(loaded, chosen)
    named = _tokenizer(loaded, checkpoint, chosen.checkpoint)
    tokenizer = build_tokenizer(named)
    words = codec(tokenizer, control=True)
    ends = {tokenizer.eod}
    if named.library == "huggingface":
        ends |= stop_tokens(Path(str(named.path)))
    prompts = [words.encode(prompt).tolist() for prompt in chosen.prompt]
    if not all(prompts):
        raise ConfigError("--prompt is empty; give at least one token of text")
    device = torch.cuda.current_device()
    found: list[dict[str, Any]] = [{} for _ in prompts]
    with tqdm(desc="generating", total=chosen.tokens * len(prompts), unit="token") as bar:
        if chosen.speculate:
            for i, prompt in enumerate(prompts):
                text = torch.tensor(prompt, device=device)
                found[i] = _speculated(loaded, text, ends, chosen, bar.update)
        else:
            close = words.encode(THINKING).tolist()
            limits = Limits(chosen.tokens, ends, chosen.thinking_budget, close)
            choose = sampler(chosen.temperature, chosen.top_p, chosen.seed)
            for length in sorted({len(p) for p in prompts}):
                same = [i for i, p in enumerate(prompts) if len(p) == length]
                batch = torch.tensor([prompts[i] for i in same], device=device)
                new = decode(loaded.model, batch, choose, limits, bar.update)
                for i, tokens in zip(same, new, strict=True):
                    found[i] = {"tokens": tokens}
    _show(chosen, found, words)
    return 0


def _check(loaded: Loaded, chosen: argparse.Namespace) -> None:
    if chosen.speculate and (chosen.temperature or chosen.thinking_budget is not None):
        raise ConfigError(
            f"--speculate {chosen.speculate} decodes greedily and without a thinking budget; "
            "leave out --temperature and --thinking-budget"
        )
    if chosen.speculate and "/" not in loaded.recipe.model.hybrid_layer_pattern:
        raise ConfigError(
            f"--speculate {chosen.speculate} needs a multi-token-prediction block, which "
            f"{loaded.recipe.model.hybrid_layer_pattern} has not; leave it out"
        )
    if not 0 < chosen.top_p <= 1:
        raise ConfigError(f"--top-p {chosen.top_p} must be above 0 and at most 1")
    if not 0 <= chosen.temperature < inf or chosen.tokens < 1 or chosen.speculate < 0:
        raise ConfigError("--temperature and --speculate must be 0 or more, --tokens 1 or more")
    if chosen.thinking_budget is not None and chosen.thinking_budget < 0:
        raise ConfigError(f"--thinking-budget {chosen.thinking_budget} must be 0 or more")
    if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {chosen.json} is in no folder that exists; make it first")


def _speculated(
    loaded: Loaded, prompt: Any, ends: set[int], chosen: Any, advance: Callable[[int], object]
) -> dict[str, Any]:
    from train.speculative import speculate

    done = speculate(loaded.model, prompt, chosen.speculate, chosen.tokens, ends, advance)
    return {
        "tokens": done.tokens,
        "passes": done.passes,
        "tokens_per_pass": round(done.tokens_per_pass, 3),
        "acceptance": [
            round(right / drafts, 3) if drafts else None
            for right, drafts in zip(done.accepted, done.drafted, strict=True)
        ],
    }


def _show(chosen: argparse.Namespace, found: list[dict[str, Any]], words: "Codec") -> None:
    for prompt, result in zip(chosen.prompt, found, strict=True):
        result |= {"prompt": prompt, "text": words.decode(result["tokens"])}
        print(f"--- {prompt}{result['text']}")
        if "passes" in result:
            print(
                f"    {len(result['tokens'])} tokens in {result['passes']} passes "
                f"({result['tokens_per_pass']} a pass); drafts right, by depth: "
                f"{result['acceptance']}"
            )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


def _native(path: Path, stack: ExitStack) -> Path:
    """The checkpoint itself, or the one made of a Hugging Face folder."""
    from model.conversion.tokenizer import read_json

    if "model_type" not in read_json(path / "config.json"):
        return path
    from model.conversion.from_hf import from_hf

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.resolve().name
    return from_hf(ConvertConfig(source=str(path), target=str(folder)), print)


def _tokenizer(loaded: Loaded, checkpoint: Path, given: Path) -> TokenizerConfig:
    """Of the imported folder, or of the run; `given`: what the user named."""
    from model.conversion.common import HF_EXTRAS
    from model.conversion.torch_dist import find_checkpoint, saved_recipe

    imported = checkpoint / HF_EXTRAS
    if (imported / "tokenizer.json").exists():
        return TokenizerConfig(library="huggingface", path=str(imported))
    if "data" not in saved_recipe(find_checkpoint(checkpoint)):
        place = imported if given == checkpoint else given
        raise CheckpointError(f"{given} has no tokenizer; put tokenizer.json into {place}")
    return loaded.recipe.data.tokenizer


if __name__ == "__main__":
    main()
