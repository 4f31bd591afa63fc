"""Quantizer factories for Transformer Engine's CustomRecipe: the forward product not quantised,
both gradients in a block format. Megatron finds them by their dotted names (precision/apply.py).

Of each operand Transformer Engine keeps a row-wise copy, which the forward product reads, and a
column-wise one, which the gradients read (of the output's gradient they read both); a
HybridQuantizer gives the two different formats. The row-wise copy is left as it is.
"""

from typing import Any

from recipes.errors import ConfigError


def nvfp4_backward(role: Any) -> Any:
    """NVFP4 gradients with the transforms and roundings of NVFP4BlockScaling, whose switches
    come from the environment (precision.apply.set_environment).

    Args:
        role: Transformer Engine's QuantizerRole, of which `tensor_type` is read.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import NVFP4BlockScaling

    recipe = NVFP4BlockScaling()
    kinds = {"weight": recipe.fp4_quant_fwd_weight, "grad_output": recipe.fp4_quant_bwd_grad}
    kind = kinds.get(getattr(role, "tensor_type", ""), recipe.fp4_quant_fwd_inp)
    quantizer = te.NVFP4Quantizer(
        with_rht=kind.random_hadamard_transform,
        with_post_rht_amax=kind.random_hadamard_transform,
        with_2d_quantization=kind.fp4_2d_quantization,
        stochastic_rounding=kind.stochastic_rounding,
    )
    return _backward_only(role, quantizer)


def mxfp8_backward(role: Any) -> Any:
    """MXFP8 gradients (E4M3); `role` as in `nvfp4_backward`."""
    import transformer_engine.pytorch as te

    return _backward_only(role, te.MXFP8Quantizer(fp8_dtype=te.DType.kFloat8E4M3))


def _backward_only(role: Any, quantizer: Any) -> Any:
    import transformer_engine.pytorch as te

    if getattr(role, "tensor_type", "") == "grad_output":
        return quantizer
    return te.HybridQuantizer(
        rowwise_quantizer=te.IdentityQuantizer(), columnwise_quantizer=quantizer
    )


def check_library(key: str) -> None:
    """Check that Transformer Engine has what these factories need, before a run depends on it.

    Raises:
        ConfigError: it does not; `key` is the key of the recipe that asks for them.
    """
    import transformer_engine
    import transformer_engine.pytorch as te

    needed = ("NVFP4Quantizer", "MXFP8Quantizer", "HybridQuantizer", "IdentityQuantizer", "DType")
    missing = [name for name in needed if not hasattr(te, name)]
    if missing:
        raise ConfigError(
            f"{key} needs {', '.join(missing)} of transformer_engine.pytorch, which "
            f"{transformer_engine.__version__} at {transformer_engine.__path__[0]} does not have "
            "(the library has them from 2.20 on); use bf16, mxfp8 or nvfp4 for all three products"
        )
