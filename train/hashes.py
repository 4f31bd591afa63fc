"""Hashes that prove two runs equal, whatever their layout."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist


def parameters_hash(chunks: list[Any]) -> str:
    """SHA-256 over every parameter and router bias of every rank, by name; same on all ranks.

    Equal hashes mean equal bits, for one layout: the shards of another layout are other
    tensors.
    """
    own: dict[str, str] = {}
    for i, chunk in enumerate(chunks):
        tensors = list(chunk.named_parameters())
        tensors += [(n, b) for n, b in chunk.named_buffers() if n.endswith("expert_bias")]
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            own[f"{i}.{name}"] = hashlib.sha256(data.tobytes()).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole = hashlib.sha256()
    for rank, hashes in enumerate(everyone):
        for name in sorted(hashes):
            whole.update(f"{rank} {name} {hashes[name]}\n".encode())
    return whole.hexdigest()
