"""Routed experts of mixture-of-experts blocks: stacks of matrices, each matrix seen as a Linear of its own.

    token ─► router ─► experts 3 and 7 ─► gate_up_proj[3] ─► activation ─► down_proj[3] ─┐
                                     └──► gate_up_proj[7] ─► activation ─► down_proj[7] ─┴─► weighted sum

transformers keeps all experts of a block in two parameters, (experts, out, in) or (experts, in, out), and computes them
in one of several ways (grouped, batched, one by one). What a router decided is seen where the stack is called; what
each matrix is fed is computed again from that, one expert at a time, whatever way the model itself takes.

A family needs no code here if its stack is called with `top_k_index`, as nearly all are. Llama 4 is known as well: it
hands every expert its own copy of all tokens, multiplied with a score that is zero for those that are not sent there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lvlm_prune.errors import RunError

_FIRST = ("gate_up_proj", "up_proj")
_LAST = "down_proj"
# Argument of a block that says which of two stacks, one for text and one for visual tokens, sees a token (Ernie 4.5).
_TYPES = "moe_mm_token_type_ids"


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of a stack of experts.

    Attributes:
        stack: The module that holds the stack.
        parameter: Path of the stack's parameter in the block, for example `mlp.experts.down_proj`.
        index: Number of the expert.
        transposed: Whether the parameter is (experts, in, out).
    """

    stack: nn.Module
    parameter: str
    index: int
    transposed: bool

    @property
    def name(self) -> str:
        """Its path in the block as if it were a Linear, for example `mlp.experts.7.down_proj`."""
        path, _, leaf = self.parameter.rpartition(".")
        return f"{path}.{self.index}.{leaf}".removeprefix(".")

    def parameter_of(self, name: str) -> str:
        """Path in the model of the stack's parameter, where the matrix' own path there is `name`."""
        return f"{name.removesuffix(self.name)}{self.parameter}"

    @property
    def weight(self) -> Tensor:
        """The matrix, a view of shape (out, in)."""
        return self.of(getattr(self.stack, self.parameter.rpartition(".")[2]).data)

    def of(self, parameter: Tensor) -> Tensor:
        """This expert's part of a tensor like the whole parameter, a view of shape (out, in)."""
        matrix = parameter[self.index]
        return matrix.T if self.transposed else matrix

    @property
    def out_features(self) -> int:
        """Number of rows of `weight`."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Number of columns of `weight`."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class RoutedCall:
    """What a stack of experts was called with.

    Attributes:
        hidden: Its tokens, (n, channels), or (experts * n, channels) where each expert has its own copy of all tokens.
        routes: Expert of each token and rank, (n, k); None where each expert has its own copy.
    """

    hidden: Tensor
    routes: Tensor | None


@dataclass(frozen=True)
class RoutedInput:
    """What one matrix was fed.

    Attributes:
        name: Path of the matrix in the block.
        inputs: Its tokens, (n, channels).
        tokens: Which of the tokens that were asked for these are, int64 of shape (n,).
    """

    name: str
    inputs: Tensor
    tokens: Tensor


class ExpertStack:
    """All routed experts of one module.

    Args:
        path: Path of the module in its block.
        module: The module.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.first = next(name for name in _FIRST if name in module._parameters)
        self.transposed = bool(getattr(module, "is_transposed", False)) or self._copies_tokens

    @property
    def _copies_tokens(self) -> bool:
        return "top_k_index" not in inspect.signature(type(self.module).forward).parameters

    def __len__(self) -> int:
        """Number of experts."""
        return len(getattr(self.module, _LAST))

    def matrices(self) -> Iterator[ExpertMatrix]:
        """Every matrix, the two of an expert together."""
        for index in range(len(self)):
            for leaf in (self.first, _LAST):
                yield ExpertMatrix(self.module, f"{self.path}.{leaf}".removeprefix("."), index, self.transposed)

    def call(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> RoutedCall:
        """What the module is called with, given the arguments of the call."""
        bound = inspect.signature(self.module.forward).bind(*arguments, **keywords).arguments
        hidden = bound["hidden_states"]
        return RoutedCall(hidden.reshape(-1, hidden.shape[-1]), bound.get("top_k_index"))

    @torch.no_grad()
    def inputs(self, call: RoutedCall, rows: Tensor) -> Iterator[RoutedInput]:
        """What each matrix was fed of some tokens, expert by expert; nothing for experts that got none of them.

        Args:
            call: What the stack was called with.
            rows: Which of its tokens, int64 of shape (m,).
        """
        first, last = getattr(self.module, self.first), getattr(self.module, _LAST)
        for index, tokens, hidden in self._dispatch(call, rows):
            up = linear(hidden.to(first.dtype), self._matrix(first, index), self._bias(self.first, index))
            for leaf, inputs in ((self.first, hidden), (_LAST, self._activate(up).to(last.dtype))):
                parameter = f"{self.path}.{leaf}".removeprefix(".")
                matrix = ExpertMatrix(self.module, parameter, index, self.transposed)
                yield RoutedInput(matrix.name, inputs, tokens)

    def _dispatch(self, call: RoutedCall, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, which of `rows` it got, what it got of them)."""
        if call.routes is None:
            copies = call.hidden.view(len(self), -1, call.hidden.shape[-1])[:, rows]
            for index, hidden in enumerate(copies):
                # A token that was not sent to the expert was multiplied with a score of zero.
                tokens = hidden.any(dim=-1).nonzero().flatten()
                if len(tokens):
                    yield index, tokens, hidden[tokens]
            return
        routes = call.routes[rows]
        order = routes.flatten().argsort(stable=True)
        counts = routes.flatten().clamp(max=len(self)).bincount(minlength=len(self) + 1).tolist()
        # What is routed to no expert has a number behind the last one.
        for index, chosen in enumerate(order.split(counts)[: len(self)]):
            if len(chosen):
                tokens = chosen // routes.shape[1]
                yield index, tokens, call.hidden[rows[tokens]]

    def _matrix(self, parameter: Tensor, index: int) -> Tensor:
        return parameter[index].T if self.transposed else parameter[index]

    def _bias(self, leaf: str, index: int) -> Tensor | None:
        bias = getattr(self.module, f"{leaf}_bias", None)
        return None if bias is None else bias[index]

    def _activate(self, up: Tensor) -> Tensor:
        module: Any = self.module
        if self.first == "up_proj":
            return module.act_fn(up)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(up)
        gate, up = up.chunk(2, dim=-1)
        return up * module.act_fn(gate)


def find_expert_stacks(block: nn.Module) -> list[ExpertStack]:
    """Every stack of routed experts of a block, in the order of its modules.

    A stack whose way of calling its experts is not known is left out: it is neither pruned nor changed.
    """
    return [ExpertStack(path, module) for path, module in block.named_modules() if _is_stack(module)]


def _is_stack(module: nn.Module) -> bool:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if _LAST not in own or not any(name in own for name in _FIRST):
        return False
    if any(own[name].ndim != 3 for name in (*_FIRST, _LAST) if name in own) or "gate_proj" in own:
        return False
    taken = inspect.signature(type(module).forward).parameters
    # Llama 4 hands every expert its own copy of all tokens.
    return "top_k_index" in taken or (list(taken) == ["self", "hidden_states"] and hasattr(module, "act_fn"))


def rows_in_call(
    stack: ExpertStack, call: RoutedCall, batch_shape: tuple[int, int], arguments: Mapping[str, Any], positions: Tensor
) -> Tensor:
    """Row of each decoder position among the tokens of a call; -1 for positions that the stack did not see.

    Args:
        stack: The stack.
        call: What it was called with.
        batch_shape: (B, S) of the batch.
        arguments: Arguments of the block.
        positions: Positions in the flattened batch, int64.

    Raises:
        RunError: The tokens of the call are not the decoder's own.
    """
    total = batch_shape[0] * batch_shape[1]
    seen = len(call.hidden) if call.routes is not None else len(call.hidden) // len(stack)
    if seen == total:
        return positions
    types = arguments.get(_TYPES)
    if types is not None and types.shape == batch_shape:
        types = types.to(positions.device, torch.bool).flatten()
        mask = types if "vision" in stack.path else ~types
        if int(mask.sum()) == seen:
            return torch.where(mask, mask.cumsum(0) - 1, -1)[positions]
    raise RunError(f"{stack.path} sees {seen} tokens where the decoder has {total}; use --pruning.experts keep")


def has_routed_experts(blocks: Iterable[nn.Module]) -> bool:
    """Whether any of some decoder blocks has routed experts, in stacks or as modules of their own."""
    return any("experts" in name.split(".") for block in blocks for name, _ in block.named_parameters())
