"""Adam for a bfloat16 model: moments and a master copy of all weights in float32, in one flat tensor each."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class MasterAdam(Optimizer):
    """AdamW whose updates are not lost to bfloat16's 8 bits of precision.

    A bfloat16 weight does not change when 1/500 of it is added. So the updates are summed up in a float32 master copy,
    and the weights are its rounded image. Gradients are clipped to norm 1. Weight decay applies to matrices only.

    Args:
        parameters: What to train; may be of any floating dtype.
        lr: Learning rate.
        betas: Decay rates of the moments.
        weight_decay: Decoupled weight decay.
        max_norm: Norm to which the gradient of all parameters together is clipped.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        max_norm: float = 1.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "max_norm": max_norm})
        if len(self.param_groups) != 1:
            raise ValueError(f"`parameters` must be one group, got {len(self.param_groups)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        parameters: list[Parameter] = group["params"]
        state = self.state["flat"]  # type: ignore[index]
        if not state:
            state["step"] = 0
            state["master"] = _flatten(parameters)
            state["mean"], state["square"] = (torch.zeros_like(state["master"]) for _ in range(2))
            state["decay"] = _flatten([torch.full_like(p, float(p.ndim >= 2)) for p in parameters])
        gradient = _flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        gradient *= (group["max_norm"] / (gradient.norm() + 1e-6)).clamp(max=1.0)
        state["step"] += 1
        beta_mean, beta_square = group["betas"]
        state["mean"].lerp_(gradient, 1 - beta_mean)
        state["square"].mul_(beta_square).addcmul_(gradient, gradient, value=1 - beta_square)
        deviation = (state["square"] / (1 - beta_square ** state["step"])).sqrt_().add_(1e-8)
        state["master"].addcmul_(state["master"], state["decay"], value=-group["lr"] * group["weight_decay"])
        state["master"].addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - beta_mean ** state["step"]))
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.copy_(state["master"][start:end].view_as(parameter))
            start = end
        return loss


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])
