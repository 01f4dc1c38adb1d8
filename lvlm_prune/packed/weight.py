"""A packed weight in the place of a parameter.

Models do more with a weight than multiply by it: they ask for its dtype, index a stack of experts, hand it to a
function of torch. `PackedWeight` answers questions without unpacking, multiplies packed, and for anything else unpacks
for that one call. It cannot be changed: what would change the unpacked copy is refused, because the change would be
lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

from lvlm_prune.packed.format import MASK, SHAPE
from lvlm_prune.packed.kernels import PackedMatrix, packed_linear

_WAY_OUT = "a packed weight cannot be changed; call `model.dequantize()` first, or unpack with `lvlm-prune unpack`"


class ActsAsTensor:
    """What functions of torch make of a packed weight: `linear` multiplies packed, others get the dense tensor."""

    def dense(self) -> Tensor:
        """The weight unpacked, a new tensor."""
        raise NotImplementedError

    def single(self) -> PackedMatrix | None:
        """The packed matrix; None for a stack of several."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and args and not isinstance(args[0], ActsAsTensor):
            weight, bias = _weight_and_bias(*args[1:], **kwargs)
            matrix = weight.single() if isinstance(weight, ActsAsTensor) else None
            if matrix is not None and not isinstance(bias, ActsAsTensor):
                return packed_linear(args[0], matrix, bias)
        name = getattr(func, "__name__", "")
        changed = [kwargs.get("out")]
        if name.endswith("_") and not name.endswith("__"):
            changed += [*args[:1], *kwargs.values()]
        if any(isinstance(value, ActsAsTensor) for value in changed):
            raise TypeError(_WAY_OUT)
        args, kwargs = tree_map(_unpacked, (args, kwargs))
        return func(*args, **kwargs)


class PackedView(ActsAsTensor):
    """One matrix of a stack, as indexing gives it.

    Args:
        matrix: The packed matrix that is looked at.
    """

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix

    def dense(self) -> Tensor:
        return self.matrix.to_dense()

    def single(self) -> PackedMatrix:
        return self.matrix

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


class PackedWeight(ActsAsTensor, nn.Module):
    """The weight of a Linear, or a stack of the weights of experts, without its zeros.

    It is a module, so that it moves and is saved with the model it is in: its entries in a state dict are those of the
    bitmask form, see `format`.

    Args:
        shape: (rows, columns), or (matrices, rows, columns).
        dtype: Floating-point type of the weights.
        nbytes: What it will take; a planner of devices asks before there is anything.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int = 0) -> None:
        super().__init__()
        self._shape, self._dtype = tuple(shape), dtype
        self.matrices: list[PackedMatrix] = []
        # Keeps initializers away.
        self._is_hf_initialized = True
        placeholder = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        self.register_buffer("planned", placeholder, persistent=False)

    @classmethod
    def of(cls, matrices: Sequence[PackedMatrix], shape: Sequence[int]) -> PackedWeight:
        """A weight of one matrix, or of as many as the first number of `shape` says."""
        weight = cls(shape, matrices[0].dtype)
        weight.fill(matrices)
        return weight

    def fill(self, matrices: Sequence[PackedMatrix]) -> None:
        """Take the matrices; their tensors count as buffers of the module from now on."""
        self.matrices, self._dtype = list(matrices), matrices[0].dtype
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        for index, matrix in enumerate(self.matrices):
            for name, value in vars(matrix).items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name.strip('_')}_{index}", value, persistent=False)

    def dense(self) -> Tensor:
        dense = [matrix.to_dense() for matrix in self.matrices]
        return dense[0] if len(self._shape) == 2 else torch.stack(dense)

    def single(self) -> PackedMatrix | None:
        return self.matrices[0] if len(self._shape) == 2 else None

    @property
    def shape(self) -> torch.Size:
        """Shape (out, in) that the weight has unpacked."""
        return torch.Size(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, packed and unpacked."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed weight, on which its products run."""
        return self.matrices[0].device if self.matrices else torch.device("meta")

    @property
    def ndim(self) -> int:
        """Number of dimensions of the dense weight."""
        return len(self._shape)

    @property
    def requires_grad(self) -> bool:
        """False: a packed weight is never trained."""
        return False

    @property
    def grad(self) -> None:
        """None: a packed weight is never trained."""
        return

    def dim(self) -> int:
        """Number of dimensions of the dense weight."""
        return len(self._shape)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the dense weight, or one of its lengths."""
        return self.shape if dim is None else self._shape[dim]

    def numel(self) -> int:
        """Number of weights, zeros included."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: Any) -> Any:
        if self.ndim == 3 and (isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)):
            return PackedView(self.matrices[int(index)])
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return _attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad"):
            raise TypeError(_WAY_OUT)
        super().__setattr__(name, value)

    def __matmul__(self, other: Any) -> Tensor:
        return self.dense() @ other

    def __mul__(self, other: Any) -> Tensor:
        return self.dense() * other

    def __add__(self, other: Any) -> Tensor:
        return self.dense() + other

    def extra_repr(self) -> str:
        kept = sum(len(matrix.to_bitmask()[0]) for matrix in self.matrices)
        return f"{self._shape}, dtype={self._dtype}, sparsity={1 - kept / self.numel():.3f}"

    def bitmask(self) -> tuple[Tensor, Tensor]:
        """Kept weights (n,) and mask (..., rows, ceil(columns / 8)), as `format` has them."""
        values, masks = zip(*(matrix.to_bitmask() for matrix in self.matrices))
        return (values[0], masks[0]) if self.ndim == 2 else (torch.cat(values), torch.stack(masks))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        moved = []
        for matrix in self.matrices:
            values, mask = matrix.to_bitmask()
            fresh = fn(values)
            same = fresh.dtype == values.dtype and fresh.device == values.device
            shape = (matrix.shape[0], matrix.shape[1])
            moved.append(matrix if same else PackedMatrix.from_bitmask(fresh, fn(mask), shape))
        if moved:
            self.fill(moved)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.matrices:
            key = prefix.removesuffix(".")
            destination[key], destination[key + MASK] = self.bitmask()
            destination[key + SHAPE] = torch.tensor(self._shape, dtype=torch.int64)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The matrices come from `fill`, not from a state dict."""


def _weight_and_bias(weight: Any, bias: Any = None) -> tuple[Any, Any]:
    return weight, bias


def _unpacked(value: Any) -> Any:
    return value.dense() if isinstance(value, ActsAsTensor) else value


def _attribute(weight: ActsAsTensor, name: str) -> Any:
    """What a dense tensor has under a name; nothing that would change the copy it is asked of."""
    if name.startswith("_"):
        raise AttributeError(name)
    if name.endswith("_"):
        raise TypeError(_WAY_OUT)
    return getattr(weight.dense(), name)
