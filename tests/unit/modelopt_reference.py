"""NVIDIA's modelopt quantises the linear layers of an export itself, in a process of its own.

    python -m tests.unit.modelopt_reference FOLDER

FOLDER/modelopt.json has the unpacked `wheels`, two safetensors files of the same weights, `plain`
and `quantised`, and `largest`: module -> largest activation. Each module is calibrated on inputs of
that size, as modelopt's users do, and what modelopt would write must be what is written, byte for
byte. Prints how many modules agree, or fails.

The same weights in the 1x16 blocks of training (precision/nvfp4.py) must differ from modelopt's
only as precision/README.md says: at ties, and in blocks that are all zeros or whose scale is too
small for E4M3.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from precision import nvfp4
from precision.formats import unpack_nibbles


def compare_with_training(weight: Tensor, codes: Tensor, scale: Tensor, name: str) -> None:
    """Compare modelopt's codes and block scales of a weight with those of training."""
    ours = nvfp4.pack(weight, nvfp4.ROWWISE)
    theirs, stored = scale.float().view_as(ours.scale), ours.scale.float()
    largest = weight.float().unflatten(1, (-1, nvfp4.BLOCK)).abs().amax(-1)
    empty, ordinary = largest == 0, stored > 0
    assert (theirs[empty] == 1).all() and (stored[empty] == 0).all(), name
    # Training's kernels round the scale to 0, and the block with it; modelopt keeps the smallest.
    assert (theirs[~ordinary & ~empty] == 2.0**-9).all(), name
    same = ordinary & (stored == theirs)
    assert same.sum() >= 0.99 * ordinary.sum(), name
    mine, other = (unpack_nibbles(c).unflatten(1, (-1, nvfp4.BLOCK)) for c in (ours.data, codes))
    off = ((mine & 7).int() - (other & 7).int()).abs()[same]
    assert off.max() <= 1 and (off > 0).float().mean() < 5e-3, name


def main(folder: Path) -> None:
    """Compare all modules."""
    task = json.loads((folder / "modelopt.json").read_text())
    sys.path += task["wheels"]
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import quant_utils

    plain, quantised = load_file(task["plain"]), load_file(task["quantised"])
    for name, largest in task["largest"].items():
        weight = plain[f"{name}.weight"]
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        x = torch.zeros(3, columns, dtype=weight.dtype)
        x[1, 5], x[2, 0] = -largest, largest / 3
        holder = mtq.quantize(
            torch.nn.Sequential(linear), mtq.NVFP4_DEFAULT_CFG, lambda model, x=x: model(x)
        )
        module = holder[0]
        scale = quant_utils.get_weight_scaling_factor(module)
        whole = quant_utils.get_weight_scaling_factor_2(module)
        assert quant_utils.get_quantization_format(module) == "nvfp4"
        made = {
            "weight": quant_utils.to_quantized_weight(weight.clone(), scale, "nvfp4", whole, 16),
            "weight_scale": scale,
            "weight_scale_2": whole,
            "input_scale": quant_utils.get_activation_scaling_factor(module),
        }
        for key, value in made.items():
            ours = quantised[f"{name}.{key}"]
            assert value.dtype == ours.dtype and value.numel() == ours.numel(), (name, key)
            bits = (t.reshape(-1).view(torch.uint8) for t in (value, ours))
            assert torch.equal(*bits), (name, key)
        compare_with_training(weight, made["weight"].view(torch.uint8), scale, name)
    print(f"{len(task['largest'])} modules agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
