"""FusedAdam and the multi-tensor helpers, on PyTorch's own fused and foreach kernels."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .module import refuse

multi_tensor_scale_tensor = None
"""Absent: Megatron then takes the gradient norm as a number."""


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled (adam_w_mode) weight decay in one pass over each parameter.

    Mirrors `transformer_engine.pytorch.optimizers.FusedAdam` for FP32 parameters and moments:
    the state of a parameter is exp_avg and exp_avg_sq, the step count belongs to the group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        **unsupported: Any,
    ) -> None:
        refuse(
            "FusedAdam",
            amsgrad=amsgrad,
            without_bias_correction=not bias_correction,
            **unsupported,
        )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state_of(p) for p in params]
            count = torch.tensor(float(group["step"]), device=params[0].device)
            self._update(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [count] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return loss

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state


class FusedSGD(torch.optim.Optimizer):
    """Not used by the Nemotron 3 family."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "the Transformer Engine stand-in does not implement FusedSGD; use adam"
        )


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *args: Any
) -> Any:
    """Call a multi-tensor operation on its lists of tensors."""
    return op(0, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """L2 norm of all tensors together, [1], and of each, [n], if asked for."""
    norms = torch.stack([_norm(tensor) for tensor in tensor_lists[0]])
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else None


def _norm(tensor: Tensor, row: int = 4096) -> Tensor:
    """L2 norm of one tensor. PyTorch sums the squares of a long tensor on the CPU one after
    another, which in FP32 loses 3e-5 of the norm of two million; of rows it loses nothing."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // row * row
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, row), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.linalg.vector_norm(torch.cat([rows, rest.reshape(1)]))


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Write scale * source into each destination; lists are (sources, destinations)."""
    sources, destinations = tensor_lists
    if sources is not destinations:
        torch._foreach_copy_(list(destinations), list(sources))
    torch._foreach_mul_(list(destinations), scale)
