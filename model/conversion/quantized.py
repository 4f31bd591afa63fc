"""NVFP4 weights of an export, in the format NVIDIA's modelopt writes.

A matrix [rows, columns] `X.weight` becomes `X.weight` (uint8 [rows, columns / 2], two E2M1 codes a
byte, the first in the low nibble), `X.weight_scale` (E4M3 [rows, columns / 16]) and
`X.weight_scale_2` (FP32, one number): x ~ E2M1 * weight_scale * weight_scale_2. Which modules, the
precision policy says: those of format nvfp4 in training. Only weights are quantised
(modelopt's W4A16_NVFP4): scales of activations need calibration, which is not done.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.conversion.table import Pair, Shape
from model.gemms import model_gemms
from model.pattern import parse_pattern
from precision.formats import E2M1, E4M3, cast, encode, pack_nibbles
from precision.nvfp4 import BLOCK as _BLOCK
from precision.nvfp4 import UNIT
from precision.policy import resolve
from recipes.compose import choices, load_recipe
from recipes.rules import fail, listed
from recipes.schema import ModelConfig, ParallelConfig

type Entry = tuple[str, torch.dtype, Shape]

ALGORITHM = "W4A16_NVFP4"
"""Of modelopt: 4-bit weights, activations as they are."""
_SMALLEST_SCALE = 2.0**-9


class Quantizer:
    """Writes some tensors of an export in NVFP4.

    Args:
        policy: name of a recipe of the group `precision`; None: everything stays as it is.
        model: what is exported.

    Raises:
        ConfigError: there is no such policy, or none of the model's modules is in nvfp4 in it.
    """

    def __init__(self, policy: str | None, model: ModelConfig) -> None:
        self._modules: frozenset[str] = frozenset()
        if policy is None:
            return
        if policy not in choices("precision"):
            shown = listed(choices("precision"))
            fail("convert.quantize", policy, "is no precision policy", f"use {shown}")
        # The policy is read as a run reads it; of that recipe nothing else is used.
        precision = load_recipe(["experiment=tiny", f"precision={policy}"]).precision
        gemms = model_gemms(model, ParallelConfig())
        layers = parse_pattern(model.hybrid_layer_pattern).num_layers
        decided = resolve(precision, gemms, layers, 1.0).start
        wanted = [d.gemm for d in decided if d.format == "nvfp4"]
        for gemm in wanted:
            if gemm.rows % _BLOCK or gemm.columns % _BLOCK:
                rule = f"would quantise {gemm.name} of {gemm.rows} x {gemm.columns}"
                remedy = "a side is no multiple of 16: use a policy that leaves it out"
                fail("convert.quantize", policy, rule, remedy)
        self._modules = frozenset(gemm.name for gemm in wanted)
        if not self._modules:
            fail("convert.quantize", policy, "has no module in nvfp4", "use another policy")

    def __bool__(self) -> bool:
        return bool(self._modules)

    def covers(self, pair: Pair) -> bool:
        """Whether the tensors of a pair are quantised."""
        module, weight, _ = pair.native[0].name.partition(".weight")
        return bool(weight) and module.replace(".experts.experts.", ".experts.") in self._modules

    def entries(self, pair: Pair, dtype: torch.dtype) -> list[Entry]:
        """Name, dtype and shape of everything a pair is written as."""
        if not self.covers(pair):
            return [(spec.name, dtype, spec.shape) for spec in pair.hf]
        found: list[Entry] = []
        for spec in pair.hf:
            rows, columns = spec.shape
            found += [
                (spec.name, torch.uint8, (rows, columns // 2)),
                (f"{spec.name}_scale", torch.float8_e4m3fn, (rows, columns // _BLOCK)),
                (f"{spec.name}_scale_2", torch.float32, ()),
            ]
        return found

    def tensors(self, pair: Pair, values: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """The values of `entries`."""
        for value in values:
            if self.covers(pair):
                yield from pack(value)
            else:
                yield value.to(dtype)

    def config(self, plan: Sequence[Pair]) -> dict[str, Any]:
        """modelopt's hf_quant_config.json."""
        matrices = [
            (spec.name.removesuffix(".weight"), self.covers(pair))
            for pair in plan
            for spec in pair.hf
            if spec.name.endswith(".weight") and len(spec.shape) >= 2
        ]
        quantised = {_experts(name) for name, covered in matrices if covered}
        excluded = {
            _experts(name, whole=_experts(name) not in quantised)
            for name, covered in matrices
            if not covered and not name.endswith("embeddings")
        }
        return {
            "producer": {"name": "strata", "version": "0.1.0"},
            "quantization": {
                "quant_algo": ALGORITHM,
                "kv_cache_quant_algo": None,
                "group_size": _BLOCK,
                "exclude_modules": sorted(excluded),
            },
        }

    def hf_config(self, plan: Sequence[Pair]) -> dict[str, Any]:
        """The same as config.json's quantization_config."""
        said = self.config(plan)
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _BLOCK}
        return {
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": said["quantization"]["exclude_modules"],
            "quant_algo": ALGORITHM,
            "producer": said["producer"],
            "quant_method": "modelopt",
        }


def _experts(name: str, whole: bool = True) -> str:
    """One pattern for the experts of a layer, which readers hold in one module, or else for one
    projection of theirs; other names as they are."""
    pattern = r"\.experts\.\d+\..*" if whole else r"\.experts\.\d+"
    return re.sub(pattern, ".experts*" if whole else ".experts.*", name)


def pack(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and the tensor's scale of a matrix, in modelopt's order of operations
    (`NVFP4QTensor.quantize`), which rounds some quotients otherwise than Transformer Engine."""
    blocks = value.float().unflatten(-1, (-1, _BLOCK)) + 0.0  # no negative zeros
    largest = blocks.abs().amax(-1)
    whole = largest.max() / UNIT
    scale = torch.where(largest == 0, 1.0, largest / (E2M1.largest * whole))
    # A block far smaller than the tensor's largest keeps the smallest scale there is, not 0.
    scale = scale.clamp(_SMALLEST_SCALE, E4M3.largest).to(torch.float8_e4m3fn)
    # NaN: of zeros over zero in a matrix of zeros, or of a NaN, which is in the scales already.
    values = (blocks / (scale.float() * whole)[..., None]).nan_to_num_(0.0)
    return pack_nibbles(encode(cast(values, E2M1), E2M1).flatten(-2)), scale, whole
