"""The baseline of the speed benchmark: Hugging Face's Nemotron-H in a plain PyTorch loop.

    python -m tests.benchmarks.hf_loop --shape small --dtype bf16 --steps 5

prints one JSON object with the training speed in tokens/s. What is measured is what a user gets
from transformers alone, with every choice in its favour where there is one:

- transformers' own choice of kernels: chunked scan in PyTorch, `grouped_mm` experts, SDPA
  attention (`--experts eager` is the loop over experts);
- AdamW with PyTorch's fused kernel on parameters of the training dtype. In bf16 there is no
  FP32 master copy, unlike in Megatron-Core's optimizer, which makes the baseline faster;
- no load-balancing loss and no update of the expert bias, which transformers does not have;
- no multi-token prediction: transformers reads those config fields but has no such module.
  Compare with a model whose MTP is off, or count its cost separately.

The clamp of dt at 0.001 is lifted: transformers 5.23 applies it in training, contrary to its own
`time_step_limit`, to Megatron-Core and to NVIDIA's code. This must run in a process without our
stand-ins, which transformers would take for the real mamba_ssm.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "hybrid_override_pattern": "MEMEM*EME",
    "hidden_size": 128,
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 32,
    "mamba_head_dim": 8,
    "ssm_state_size": 32,
    "n_groups": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 64,
}
SMALL: dict[str, Any] = {
    "hybrid_override_pattern": "MEMEMEM*EMEMEM*EME",
    "hidden_size": 512,
    "vocab_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 32,
    "ssm_state_size": 64,
    "n_groups": 4,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 384,
    "moe_shared_expert_intermediate_size": 768,
    "moe_latent_size": 256,
}
SHAPES = {"tiny": TINY, "small": SMALL}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What all Nemotron 3 models have in common.
COMMON: dict[str, Any] = {
    "conv_kernel": 4,
    "chunk_size": 128,
    "layer_norm_epsilon": 1e-5,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1048576,
    "use_cache": False,
}


def build_hf(shape: dict[str, Any], dtype: torch.dtype, experts: str | None = None) -> nn.Module:
    """A `NemotronHForCausalLM` with random weights, ready for training.

    shape: fields of `NemotronHConfig`, over `COMMON`. dtype: of parameters and activations; the
    router bias stays FP32, as `from_pretrained` keeps it. experts: transformers' name of how
    experts are computed (`eager`, `grouped_mm`, `batched_mm`); None leaves the choice to it.
    """
    _refuse_stand_ins()
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.models.nemotron_h import modeling_nemotron_h as hf

    # It warns that mamba_ssm is missing: that it is missing is what we measure.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = NemotronHConfig(**(COMMON | shape))
    if experts is not None:
        config._experts_implementation = experts
    model = NemotronHForCausalLM(config).to(dtype)
    for module in model.modules():
        if isinstance(module, hf.NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, float("inf"))
        if isinstance(module, hf.NemotronHTopkRouter):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    return model.train()


def _refuse_stand_ins() -> None:
    for name in ("mamba_ssm", "causal_conv1d", "transformer_engine"):
        if getattr(sys.modules.get(name), "__strata_standin__", False):
            raise RuntimeError(
                f"{name} is our stand-in here: transformers would use it for the baseline. "
                "Run the baseline in a process of its own, before any stand-in is installed."
            )


def train_hf(
    model: nn.Module,
    batches: Sequence[Tensor],
    steps: int,
    *,
    learning_rate: float = 3e-4,
    clip: float = 1.0,
    warmup: int = 2,
) -> float:
    """Train and return tokens per second, from the median step so that a hiccup does not count.

    batches: token ids [batch, sequence], used in turn. The first `warmup` steps come on top of
    `steps` and are not timed: they allocate the optimizer's state.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    seconds_per_token = []
    for tokens_bs in itertools.islice(itertools.cycle(batches), warmup + steps):
        start = time.perf_counter()
        loss = model(input_ids=tokens_bs, labels=tokens_bs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds_per_token.append((time.perf_counter() - start) / tokens_bs.numel())
    return 1 / statistics.median(seconds_per_token[warmup:])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hf_loop")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--experts", help="eager, grouped_mm or batched_mm (default: transformers')"
    )
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_hf(SHAPES[options.shape], DTYPES[options.dtype], options.experts)
    config: Any = model.config
    size = (options.batch, options.seq)
    batches = [torch.randint(config.vocab_size, size) for _ in range(4)]
    speed = train_hf(model, batches, options.steps)
    result = vars(options) | {
        "experts": config._experts_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": round(speed, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
