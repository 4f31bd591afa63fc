"""The operation-fuser API. Megatron imports the module and uses it only when
use_transformer_engine_op_fuser is set, which this stand-in refuses."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"the Transformer Engine stand-in has no fused operation {name}; "
        "keep use_transformer_engine_op_fuser off"
    )
