"""NVFP4 weights of an export, in the format NVIDIA's modelopt writes.

A matrix [rows, columns] `X.weight` becomes `X.weight` (uint8 [rows, columns / 2], two E2M1 codes a
byte, the first in the low nibble), `X.weight_scale` (E4M3 [rows, columns / 16]) and
`X.weight_scale_2` (FP32, one number): x ~ E2M1 * weight_scale * weight_scale_2. Which modules, the
precision policy says: those of format nvfp4 in training. Without a calibration only weights are
quantised (modelopt's W4A16_NVFP4). With one (modelopt's NVFP4) there is `X.input_scale` too, one
FP32 number: the largest activation of the module / (6 * 448). The experts of a layer share theirs.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
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

WEIGHTS, BOTH = "W4A16_NVFP4", "NVFP4"
"""Algorithms of modelopt: 4-bit weights with activations as they are, or in 4 bits too."""
_SMALLEST_SCALE = 2.0**-9


class Quantizer:
    """Writes some tensors of an export in NVFP4.

    Args:
        policy: name of a recipe of the group `precision`; None: everything stays as it is.
        model: what is exported.
        calibration: file of `python -m train.calibrate`; None: activations stay as they are.

    Raises:
        ConfigError: there is no such policy, or none of the model's modules is in nvfp4 in it; or
            the calibration is of another policy or model.
    """

    def __init__(
        self, policy: str | None, model: ModelConfig, calibration: str | None = None
    ) -> None:
        self._modules: frozenset[str] = frozenset()
        self._activations: dict[str, float] | None = None
        self.algorithm = WEIGHTS if calibration is None else BOTH
        if policy is None:
            if calibration is not None:
                rule = "scales what is quantised, and nothing is"
                fail("convert.calibration", calibration, rule, "set convert.quantize")
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
        if calibration is not None:
            self._activations = _calibrated(calibration, policy, self._modules)

    def __bool__(self) -> bool:
        return bool(self._modules)

    def covers(self, pair: Pair) -> bool:
        """Whether the tensors of a pair are quantised."""
        return _module(pair) in self._modules

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
            if self._activations is not None:
                found.append(
                    (f"{spec.name.removesuffix('.weight')}.input_scale", torch.float32, ())
                )
        return found

    def tensors(self, pair: Pair, values: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """The values of `entries`."""
        for value in values:
            if self.covers(pair):
                yield from pack(value)
                if self._activations is not None:
                    yield torch.tensor(self._activations[_module(pair)] / UNIT)
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
                "quant_algo": self.algorithm,
                "kv_cache_quant_algo": None,
                "group_size": _BLOCK,
                "exclude_modules": sorted(excluded),
            },
        }

    def hf_config(self, plan: Sequence[Pair]) -> dict[str, Any]:
        """The same as config.json's quantization_config."""
        said = self.config(plan)
        form = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": _BLOCK}
        group: dict[str, Any] = {"weights": form, "targets": ["Linear"]}
        if self._activations is not None:
            group = {"input_activations": form} | group
        return {
            "config_groups": {"group_0": group},
            "ignore": said["quantization"]["exclude_modules"],
            "quant_algo": self.algorithm,
            "producer": said["producer"],
            "quant_method": "modelopt",
        }


def _module(pair: Pair) -> str:
    """The module a pair's weight is of, by the name policies have for it; empty for a vector."""
    module, weight, _ = pair.native[0].name.partition(".weight")
    return module.replace(".experts.experts.", ".experts.") if weight else ""


def _calibrated(file: str, policy: str, modules: Collection[str]) -> dict[str, float]:
    """Module -> its largest activation.

    Raises:
        ConfigError: it cannot be read, or is of another policy or model.
    """
    remedy = f"write it with python -m train.calibrate CHECKPOINT FILE --policy {policy}"
    try:
        said = json.loads(Path(file).read_text())
        found = {str(name): float(value) for name, value in said["activations"].items()}
        other = said["policy"]
    except OSError as error:
        fail("convert.calibration", file, f"cannot be read: {error.strerror}", remedy)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail("convert.calibration", file, f"is no calibration ({error!r})", remedy)
    if other != policy:
        fail("convert.calibration", file, f"is of the policy {other}, not {policy}", remedy)
    if found.keys() != modules:
        shown = listed(sorted(found.keys() ^ set(modules))[:3])
        fail("convert.calibration", file, f"is of another model: they differ in {shown}", remedy)
    silent = [name for name, value in found.items() if not 0 < value < math.inf]
    if silent:
        rule = f"has no scale for {listed(silent[:3])}, whose activations were 0 or not finite"
        fail("convert.calibration", file, rule, "read more batches, or mend the run")
    return found


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
