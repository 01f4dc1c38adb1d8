"""A Linear whose weight is packed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lvlm_prune.packed.kernels import packed_linear
from lvlm_prune.packed.weight import PackedWeight


class PackedLinear(nn.Linear):
    """`y = x W^T + b`, with W stored without its zeros.

    A Linear in all but its weight, so that what looks for Linears finds it. The gradient goes to the input and to the
    bias; adapters beside it can be trained, it cannot.

    Args:
        linear: What it takes the place of; its bias is taken over.
        nbytes: What the packed weight will take.
    """

    def __init__(self, linear: nn.Linear, nbytes: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.add_module("weight", PackedWeight(tuple(linear.weight.shape), linear.weight.dtype, nbytes))
        self.train(linear.training)
        # Keeps initializers away.
        self._is_hf_initialized = True

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, of shape (out_features, in_features) when unpacked."""
        return self._modules["weight"]  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """A packed weight is read, never initialized."""

    def forward(self, x: Tensor) -> Tensor:
        """Args: x of shape (..., in). Returns: shape (..., out)."""
        return packed_linear(x, self.packed.matrices[0], self.bias)

    def dense(self) -> nn.Linear:
        """The same Linear with its weight unpacked."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.packed.dense())
        linear.bias = self.bias
        return linear.train(self.training)


def unpack_modules(model: nn.Module, chosen: Callable[[PackedWeight], bool] = lambda weight: True) -> list[str]:
    """Replace packed weights of a model by dense parameters of the same dtype, in place, one at a time.

    Args:
        model: A model some of whose weights are packed; changed in place.
        chosen: Which of them; all by default.

    Returns:
        Names of the parameters that are dense now.
    """
    unpacked = []
    for name, weight in list(model.named_modules()):
        if not isinstance(weight, PackedWeight) or not chosen(weight):
            continue
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        if isinstance(parent, PackedLinear):
            _set_child(model, path, parent.dense())
        else:
            delattr(parent, leaf)
            parent.register_parameter(leaf, nn.Parameter(weight.dense()))
        unpacked.append(name)
    return unpacked


def _set_child(model: nn.Module, name: str, child: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, child)
