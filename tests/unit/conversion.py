"""What the tests of conversion share: models of every shape, saved and loaded by Megatron."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.conversion.common import write_model
from model.hybrid import build_model, transformer_config
from recipes.compose import load_recipe
from recipes.schema import ConvertConfig, ModelConfig, ParallelConfig, Recipe

LENGTH, BATCH = 40, 2
BASE = {
    "hidden_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 80,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "mamba_num_groups": 2,
    "mamba_chunk_size": 16,
    "num_moe_experts": 8,
    "moe_router_topk": 3,
    "moe_ffn_hidden_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "moe_latent_size": 24,
    "moe_router_topk_scaling_factor": 2.5,
}


def model_of(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig(name="probe", **(BASE | fields))


def recipe_of(model: ModelConfig) -> Recipe:
    recipe = load_recipe(["experiment=tiny", "precision=fp32"])
    return replace(recipe, model=model)


def tokens_of(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.vocab_size, (BATCH, LENGTH), generator=generator)


def logits(network: torch.nn.Module, tokens: Tensor) -> Tensor:
    """[b, s, V] of the next token."""
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    with torch.no_grad():
        return network(tokens, positions, None)


def scramble(network: torch.nn.Module, seed: int) -> None:
    """Random values in every weight, so that two exchanged ones are seen."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if name.endswith("A_log"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2)
            elif tensor.dim() >= 2:
                tensor.copy_(noise(tensor) / tensor.shape[-1] ** 0.5)
            elif "norm" in name or name.endswith(".D"):
                tensor.copy_(1 + 0.2 * noise(tensor))
            else:
                tensor.copy_(0.5 * noise(tensor))
        for name, buffer in network.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * noise(buffer))


def save(network: Any, folder: Path, model: ModelConfig) -> None:
    """A checkpoint as Megatron writes it."""
    from megatron.core import dist_checkpointing, parallel_state

    folder.mkdir(parents=True, exist_ok=True)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = network.sharded_state_dict(metadata={"dp_cp_group": group})
    dist_checkpointing.save(state, str(folder), verify_integrity=True)
    write_model(model, folder)


def load(network: Any, folder: Path) -> None:
    """Into a model, through Megatron, nothing missing and nothing left over."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = network.sharded_state_dict(metadata={"dp_cp_group": group})
    state = {k: v for k, v in state.items() if "_extra_state" not in k}
    loaded, missing, unexpected = dist_checkpointing.load(
        state, str(folder), strict=StrictHandling.RETURN_ALL
    )
    missing = {k for k in missing if "_extra_state" not in k}
    assert not missing and not unexpected, (missing, unexpected)
    network.load_state_dict(loaded, strict=False)


def options(source: Path, target: Path, **changes: Any) -> ConvertConfig:
    return ConvertConfig(source=str(source), target=str(target), **changes)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found


def tensors_equal(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def build(model: ModelConfig, parallel: ParallelConfig | None = None, **ends: bool) -> Any:
    """This rank's part of the model, in FP32."""
    recipe = recipe_of(model)
    recipe = replace(recipe, parallel=parallel or recipe.parallel)
    config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
    return build_model(recipe, config, **ends).eval()
