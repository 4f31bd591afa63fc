"""Initial weights that depend on the seed and on nothing else.

Megatron draws a rank's weights from that rank's random state, so that another layout of the
same model starts from other weights. Here every tensor of the whole model is drawn from
generators seeded with (seed, its name, number of the block of rows), on the CPU and in FP32:
any layout, number of ranks, device and params_dtype starts from the same weights. A rank draws
the blocks that its shard touches, one at a time.

The distributions are Megatron's: its own functions for matrices, the constants of its
MambaMixer for the rest.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

Law = Callable[..., Any]
"""Fills a tensor in place from `generator`."""

BLOCK = 1 << 22
"""Elements that one generator draws; a block is at least a row. Part of the definition of the
weights: another value gives others."""

_WORDS, _MARK = slice(24, 24 + 624 * 8), 1
"""Where torch.Generator.get_state has the words of the twister, of which the first is the seed."""

_CONSTANT = ("norm.weight", "layer_norm_weight", ".D", "expert_bias")
"""Ends of the names of what Megatron fills with ones and zeros."""

_OUTPUT = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight", "fc2_latent_proj.weight")
"""Matrices that write to the residual stream or to the latent."""

_INPUT = (
    "linear_qkv.weight",
    "linear_fc1.weight",
    "fc1_latent_proj.weight",
    "router.weight",
    "eh_proj.weight",
    "output_layer.weight",
)


@contextlib.contextmanager
def undrawn(config: Any) -> Iterator[None]:
    """Inside, Megatron's modules leave their matrices as they were allocated."""
    names = ("init_method", "output_layer_init_method", "embedding_init_method")
    laws = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, lambda weight: None)
    try:
        yield
    finally:
        for name, law in laws.items():
            setattr(config, name, law)


@torch.no_grad()
def draw_weights(model: Any, seed: int, d_conv: int) -> None:
    """Fill every parameter of one pipeline stage of a HybridModel, in place.

    Which parts of the whole model the rank holds, and under which name, its checkpoint says.

    Args:
        d_conv: width of Mamba's convolution.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = {k: v for k, v in model.sharded_state_dict().items() if "_extra_state" not in k}
    apply_factories(state)  # Mamba's in_proj and convolution become their parts
    drawn = 0
    for shard in _leaves(state):
        assert isinstance(shard, ShardedTensor) and shard.data is not None
        law = law_of(shard.key, model.config, d_conv)
        if law is not None:
            _fill(shard, law, seed)
        if not shard.key.endswith("expert_bias"):  # a buffer
            drawn += shard.data.numel()
    assert drawn == sum(p.numel() for p in model.parameters()), "a parameter has no shard"


def law_of(name: str, config: Any, d_conv: int) -> Law | None:
    """The distribution of a tensor by its name in the checkpoint; None: a constant.

    Sources: megatron.core TransformerConfig.__post_init__ and MambaMixer.__init__.
    """
    if name.endswith(_CONSTANT):
        return None
    if name.endswith(_OUTPUT):
        return config.output_layer_init_method
    if name.endswith("word_embeddings.weight"):
        return config.embedding_init_method
    if name.endswith(_INPUT) or ".in_proj.weight." in name:
        return config.init_method
    if ".conv1d.weight." in name:
        return partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
    if ".conv1d.bias." in name:
        return partial(torch.nn.init.uniform_, a=-1 / math.sqrt(d_conv), b=1 / math.sqrt(d_conv))
    law = _HEADS.get(name.rpartition(".")[2])
    assert law is not None, f"no initial distribution for {name}"
    return law


def _a_log(a: Tensor, generator: torch.Generator) -> None:
    """log A with A uniform in [1, 16)."""
    a.uniform_(1, 16, generator=generator).log_()


def _dt_bias(dt: Tensor, generator: torch.Generator) -> None:
    """The inverse of softplus at a step size log-uniform in [1e-3, 1e-1)."""
    dt.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
    dt.add_(torch.log(-torch.expm1(-dt)))


_HEADS: dict[str, Law] = {"A_log": _a_log, "dt_bias": _dt_bias}
"""What Mamba has one of for each head."""


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(value)
    else:
        yield tree


def _fill(shard: "ShardedTensor", law: Law, seed: int) -> None:
    """Draw the blocks of the global tensor that the shard touches and copy its part."""
    assert shard.data is not None
    # Experts are one tensor in the checkpoint and one each here.
    prepended = shard.prepend_axis_num
    name = f"{shard.key}{list(shard.global_offset[:prepended])}"
    shape, offset = shard.global_shape[prepended:], shard.global_offset[prepended:]
    rows = max(1, BLOCK // math.prod(shape[1:]))
    first, last = offset[0], offset[0] + shard.data.shape[0]
    others = [slice(o, o + n) for o, n in zip(offset[1:], shard.data.shape[1:], strict=True)]
    for block in range(first // rows, -(-last // rows)):
        start, end = block * rows, min((block + 1) * rows, shape[0])
        drawn = torch.empty(end - start, *shape[1:], dtype=torch.float32, device="cpu")
        law(drawn, generator=_generator(f"{seed} {name} {block}"))
        low, high = max(first, start), min(last, end)
        part = drawn[(slice(low - start, high - start), *others)]
        shard.data[low - first : high - first].copy_(part)


def _generator(key: str) -> torch.Generator:
    """A generator of the key: a Mersenne Twister whose whole state comes from 128 bits of its hash.

    PyTorch seeds it with 32 bits, too few: among the 1e5 blocks of a model like Super some two
    would be drawn alike. So numpy makes the state.
    """
    digest = hashlib.sha256(key.encode()).digest()
    seeds = np.random.SeedSequence(int.from_bytes(digest[:16], "little"))
    words = np.random.MT19937(seeds).state["state"]["key"]
    generator = torch.Generator().manual_seed(_MARK)
    state = generator.get_state()
    place = state[_WORDS].view(torch.int64)
    assert place[0] == _MARK, "this PyTorch keeps a generator's state in another way"
    place.copy_(torch.from_numpy(words.astype(np.int64)))
    return generator.set_state(state)
