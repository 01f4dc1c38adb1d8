"""Packed checkpoints in transformers' `from_pretrained` and `save_pretrained`.

`import lvlm_prune` registers both classes as soon as transformers' quantizers are imported, see `registration`; this
module is imported in the middle of that, so what needs the rest of transformers is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lvlm_prune.packed.format import METHOD, VERSION, Format

if TYPE_CHECKING:
    import torch

    from lvlm_prune.packed.loading import PackedLoading


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        format_version: Version of the format on disk.
        format: `bitmask` or `coded`; what `save_pretrained` writes. What is read is seen by the tensors.

    Raises:
        ValueError: The version is not known.
    """

    def __init__(
        self,
        format_version: int = VERSION,
        format: str = "bitmask",
        quant_method: str = METHOD,
        **others: Any,
    ) -> None:
        if format_version != VERSION:
            problem = f"is packed in format version {format_version}, only version {VERSION} is known"
            raise ValueError(f"the checkpoint {problem}; update lvlm-prune")
        if format not in ("bitmask", "coded"):
            raise ValueError(f"`format` is {format!r}, not bitmask or coded")
        self.quant_method, self.format_version, self.format = quant_method, format_version, format

    def to_dict(self) -> dict[str, Any]:
        """What stands in `config.json` under `quantization_config`, as plain data."""
        return {"quant_method": METHOD, "format_version": self.format_version, "format": self.format}


class PackedQuantizer(HfQuantizer):
    """Puts packed modules in the place of Linears and stacks of experts, and fills them.

    transformers loads everything else; the packed tensors are read, checked and laid out by `loading`.
    """

    requires_calibration = False
    is_trainable = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("a model is packed by `lvlm-prune pack`, not while it is loaded")
        self.loading: PackedLoading | None = None
        self._conversions: Any = None  # the model's own, once it was saved

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A packed model is saved packed."""
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from lvlm_prune.packed.loading import PackedLoading

        self.loading = PackedLoading(model, checkpoint_files)
        self.loading.place_modules()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        assert self.loading is not None
        self.loading.fill_modules()
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """The state dict that `save_pretrained` writes, with packed tensors as the format has them."""
        from lvlm_prune.checkpoints.sources import without_converters
        from lvlm_prune.packed.saving import state_dict_to_save

        form: Format = getattr(self.quantization_config, "format", "bitmask")
        if self.loading is None:
            return state_dict_to_save(model, form, []), {}
        converted = self.loading.converted
        state = state_dict_to_save(model, form, converted, self.loading.unpacked)
        if self._conversions is None:
            self._conversions = getattr(model, "_weight_conversions", None)
        # transformers reverts what is left of these next, and would take parts of packed weights for weights.
        model._weight_conversions = without_converters(self._conversions, converted)
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Unpacked weights have the dtype that they are packed in, whatever `dtype` says."""
        from lvlm_prune.packed.dense import use_torch
        from lvlm_prune.packed.linear import unpack_modules

        unpack_modules(model)
        use_torch(model)
        if self._conversions is not None:
            model._weight_conversions = self._conversions
        return model
