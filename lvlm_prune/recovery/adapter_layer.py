"""The masked LoRA Linear as a layer of PEFT, so that PEFT's own files, merging and unmerging serve it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from lvlm_prune.recovery.masked_lora import Gradient, masked_lora_linear


class SparseLoraLinear(LoraLinear):
    """PEFT's LoRA Linear, masked by the zeros of its base weight; merging leaves every zero exactly +0.0.

    Args:
        base_layer: The pruned Linear, whose zeros stay zeros.
        adapter_name: Name of the first adapter.
        config: A `LoraConfig`; see `sparse_lora_config`.
        kwargs: What PEFT hands on besides.

    Raises:
        ValueError: The configuration asks for a variant of LoRA (DoRA, bias, ...) that is not defined with a mask.
    """

    gradient: Gradient = "exact"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.lora_bias or config.fan_in_fan_out:
            raise ValueError("`lora_bias` and `fan_in_fan_out` are not defined for sparse LoRA")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        if self.lora_variant:
            raise ValueError(f"sparse LoRA has no variants, got {', '.join(map(str, self.lora_variant.values()))}")

    def prepare_to_train(self) -> None:
        """Adapters in float32, dropout on; the base stays in evaluation mode."""
        # PEFT gives adapters the dtype of their base, in which small steps would be rounded away.
        for part in (self.lora_A, self.lora_B):
            part.float()
        self.train()
        self.get_base_layer().eval()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update that merging adds, shape (out, in); +0.0 wherever the base weight is zero."""
        base: Any = self.get_base_layer()
        return super().get_delta_weight(adapter).masked_fill_(base.weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The Linear with the active adapter, shape (..., in) to (..., out).

        Raises:
            NotImplementedError: Several adapters are active, or a batch names one for each sample.
        """
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError("a batch with another adapter for each sample")
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise NotImplementedError(f"several active adapters: {', '.join(active)}")
        name, device = active[0], x.device.type
        base: Any = self.get_base_layer()
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else base.weight.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        dropout, inputs = self.lora_dropout[name], x.to(dtype)
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        drops = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        with torch.autocast(device, enabled=False):
            return masked_lora_linear(
                inputs,
                base.weight.to(dtype),
                bias,
                lora_a.weight,
                lora_b.weight,
                self.scaling[name],
                dropped=dropout(inputs) if drops else None,
                gradient=self.gradient,
            )


class StraightThroughSparseLoraLinear(SparseLoraLinear):
    """The same with gradients that leave the mask out: cheaper, and approximate."""

    gradient: Gradient = "straight_through"


def sparse_lora_class(gradient: Gradient) -> type[SparseLoraLinear]:
    """The layer with this kind of gradient."""
    return SparseLoraLinear if gradient == "exact" else StraightThroughSparseLoraLinear


def sparse_lora_config(gradient: Gradient = "exact", **options: Any) -> LoraConfig:
    """A `LoraConfig` of PEFT whose Linears are masked by the zeros of their base.

    PEFT does not write the registered class into the adapter's files; `load_sparse_adapter` registers it again.

    Args:
        gradient: `exact` or `straight_through`.
        options: As `LoraConfig` takes them.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 4, bias=False))
        >>> _ = base[0].weight.data.fill_diagonal_(0.0)
        >>> tuned = get_peft_model(base, sparse_lora_config(r=2, target_modules=["0"], init_lora_weights=False))
        >>> tuned.merge_and_unload()[0].weight.diagonal()
        tensor([0., 0., 0., 0.])
    """
    config = LoraConfig(**options)
    config._register_custom_module({nn.Linear: sparse_lora_class(gradient)})
    return config
