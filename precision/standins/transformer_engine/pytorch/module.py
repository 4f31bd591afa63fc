"""What every module with weights shares: creation, attributes and checkpoint state."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .comm import group_size

InitMethod = Callable[[Tensor], Any]


def refuse(module: str, **arguments: Any) -> None:
    """Raise NotImplementedError for the first argument that asks for something.

    Args:
        module: name of the module, for the message.
        arguments: argument name -> value; falsy values ask for nothing.
    """
    for name, value in arguments.items():
        if value:
            raise NotImplementedError(
                f"the Transformer Engine stand-in's {module} does not implement {name}={value!r}"
            )


class WeightedModule(nn.Module):
    """Base of Linear, LayerNormLinear and GroupedLinear.

    Holds the attributes that Megatron-Core's wrappers read, creates weights under the
    model-parallel RNG tracker and marks them the way the real library does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        tp_size: int,
        parallel_mode: str | None,
        params_dtype: torch.dtype | None,
        device: torch.device | str,
        init_method: InitMethod | None,
        get_rng_state_tracker: Callable[[], Any] | None,
        rng_tracker_name: str | None,
        bias: bool,
        return_bias: bool,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = group_size(tp_group) if tp_group is not None else tp_size
        if parallel_mode not in (None, "column", "row"):
            raise ValueError(f"parallel_mode={parallel_mode!r}; use None, 'column' or 'row'")
        self.parallel_mode = parallel_mode
        if parallel_mode == "column":
            out_features //= self.tp_size
        elif parallel_mode == "row":
            in_features //= self.tp_size
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.device = device
        self.init_method = init_method or (lambda w: nn.init.normal_(w, mean=0.0, std=0.023))
        self.get_rng_state_tracker = get_rng_state_tracker
        self.rng_tracker_name = rng_tracker_name
        self.use_bias = bias
        self.return_bias = return_bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def add_weight(self, name: str) -> None:
        """Register parameter `name` of shape [out_features, in_features] and initialise it."""
        weight = nn.Parameter(
            torch.empty(
                self.out_features, self.in_features, dtype=self.params_dtype, device=self.device
            )
        )
        self.register_parameter(name, weight)
        self.set_partition(weight, dim=1 if self.parallel_mode == "row" else 0)
        if weight.device.type == "meta":
            return
        tracker = self.get_rng_state_tracker() if self.get_rng_state_tracker else None
        if tracker is None:
            fork = nullcontext()
        elif self.rng_tracker_name:
            fork = tracker.fork(self.rng_tracker_name)
        else:
            fork = tracker.fork()
        with fork, torch.no_grad():
            self.init_method(weight)

    def add_bias(self, name: str) -> None:
        """Register a zero bias of shape [out_features] as `name`."""
        bias = nn.Parameter(
            torch.zeros(self.out_features, dtype=self.params_dtype, device=self.device)
        )
        self.register_parameter(name, bias)
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.parallel_mode == "column":
            self.set_partition(bias, dim=0)

    @staticmethod
    def set_partition(param: Tensor, dim: int) -> None:
        """Mark a parameter as split along `dim` between tensor-parallel ranks."""
        param.tensor_model_parallel = True  # type: ignore[attr-defined]
        param.partition_dim = dim  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]

    def set_tensor_parallel_group(self, tp_group: torch.distributed.ProcessGroup | None) -> None:
        """Set the tensor-parallel group after construction."""
        self.tp_group = tp_group

    def get_extra_state(self) -> Tensor:
        """Quantization state of the module; empty, as the real library's without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Accept an empty state.

        Raises:
            NotImplementedError: the checkpoint holds FP8 scaling factors.
        """
        if state is not None and state.numel() > 0:
            raise NotImplementedError(
                "the checkpoint holds FP8 delayed-scaling state, which the Transformer Engine "
                "stand-in does not implement"
            )

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing to prepare: no quantized product runs here."""
