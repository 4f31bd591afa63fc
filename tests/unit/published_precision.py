"""The published NVFP4 recipe (arXiv 2604.12374, section 2.2 and table 3), written out."""

from model.pattern import parse_pattern
from recipes.compose import load_recipe

FAMILY = ("nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b")

# A layer's modules before the last 15 %.
PUBLISHED = {
    "mixer.in_proj": "nvfp4",
    "mixer.out_proj": "mxfp8",
    "self_attention.linear_qkv": "bf16",
    "self_attention.linear_proj": "bf16",
    "mlp.fc1_latent_proj": "bf16",
    "mlp.fc2_latent_proj": "bf16",
    "mlp.experts.linear_fc1": "nvfp4",
    "mlp.experts.linear_fc2": "nvfp4",
    "mlp.shared_experts.linear_fc1": "nvfp4",
    "mlp.shared_experts.linear_fc2": "nvfp4",
}
# First layer of the BF16 end: 8 of 52, 14 of 88, 16 of 108 layers.
FIRST_BF16 = {"nano_30b_a3b": 44, "super_120b_a12b": 74, "ultra_550b_a55b": 92}
# Modules of each kind of layer; Nano has no latent width.
INSIDE = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "E": (
        "mlp.fc1_latent_proj",
        "mlp.fc2_latent_proj",
        "mlp.experts.linear_fc1",
        "mlp.experts.linear_fc2",
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
    ),
}


def published(experiment: str) -> dict[str, str]:
    """Global name -> format, written out from the table and the pattern."""
    pattern = parse_pattern(load_recipe([f"experiment={experiment}"]).model.hybrid_layer_pattern)
    latent = experiment != "nano_30b_a3b"
    table = {}
    for i, symbol in enumerate(pattern.main):
        for module in INSIDE[symbol]:
            if latent or "latent" not in module:
                late = i >= FIRST_BF16[experiment]
                table[f"decoder.layers.{i}.{module}"] = "bf16" if late else PUBLISHED[module]
    if latent:
        table["mtp.layers.0.eh_proj"] = "bf16"
        for j, symbol in enumerate("*E"):
            for module in INSIDE[symbol]:
                table[f"mtp.layers.0.mtp_model_layer.layers.{j}.{module}"] = "bf16"
    return table
