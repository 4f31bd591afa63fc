"""NVIDIA's modelopt quantises the linear layers of an export itself, in a process of its own.

    python -m tests.unit.modelopt_reference FOLDER

FOLDER/modelopt.json has the unpacked `wheels`, two safetensors files of the same weights, `plain`
and `quantised`, and `largest`: module -> largest activation. Each module is calibrated on inputs of
that size, as modelopt's users do, and what modelopt would write must be what is written, byte for
byte. Prints how many modules agree, or fails.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


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
    print(f"{len(task['largest'])} modules agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
