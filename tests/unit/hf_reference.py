"""Hugging Face's Nemotron-H in a process of its own, without our stand-ins.

    python -m tests.unit.hf_reference JOBS.json

Each job of the list names a folder. With `make` (fields of NemotronHConfig) the folder is made
first, from random weights. Then it is loaded in FP32, with the clamp of dt lifted, which
transformers 5.23 applies and neither Megatron nor NVIDIA's own code does; logits of `tokens`
(`stock`: before) and `generate` greedy tokens go to `reference.pt` in the folder.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

SPREAD = 3.0
"""Weights are so many times as large as transformers makes them: every part must matter."""


def _lift_clamp(model: nn.Module) -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, float("inf"))


def _make(folder: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(len(str(fields)))
    model = NemotronHForCausalLM(NemotronHConfig(**fields))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
            elif name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias")):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif tensor.dim() >= 2:
                tensor.mul_(SPREAD)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in biases:
            buffer.data = biases[name]
    model.save_pretrained(folder)


def _reference(folder: Path, tokens: list[list[int]], generate: int) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    mtp = [k for k in info["unexpected_keys"] if not k.startswith("mtp.")]
    assert not (mtp or info["missing_keys"] or info["mismatched_keys"]), info
    ids = torch.tensor(tokens)
    result = {}
    with torch.no_grad():
        result["stock"] = model.eval()(ids, use_cache=False).logits
        _lift_clamp(model)
        result["logits"] = model(ids, use_cache=False).logits
        if generate:
            result["generated"] = model.generate(
                ids[:, :8],
                attention_mask=torch.ones(len(ids), 8),
                max_new_tokens=generate,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
    return result


def main(jobs_file: str) -> None:
    """Do the jobs of a file."""
    stand_ins = ("mamba_ssm", "causal_conv1d", "transformer_engine")
    assert not any(hasattr(sys.modules.get(n), "__strata_standin__") for n in stand_ins)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for job in json.loads(Path(jobs_file).read_text()):
        folder = Path(job["folder"])
        if "make" in job:
            _make(folder, job["make"], getattr(torch, job.get("dtype", "float32")))
        if "tokens" in job:
            result = _reference(folder, job["tokens"], job.get("generate", 0))
            torch.save(result, folder / "reference.pt")


if __name__ == "__main__":
    main(sys.argv[1])
