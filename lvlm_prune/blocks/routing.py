"""Two pathways through a Linear, chosen token by token.

                    ┌─ W  x ─┐
    token x ────────┤        ├── where(token takes the pruned pathway, W' x, W x)
                    └─ W' x ─┘

Both products see all tokens, and outputs are chosen afterwards: with W' = W the result is bit for bit the Linear's own.
Everything else of the model is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from torch.utils.hooks import RemovableHandle

from lvlm_prune.blocks import modality_of_tokens
from lvlm_prune.errors import RunError
from lvlm_prune.methods.modality import IMAGE, TEXT, VIDEO

Pathway = Literal["text", "visual"]

_CODES = {"text": (TEXT,), "visual": (IMAGE, VIDEO)}


def tokens_of(pathway: Pathway, modality: Tensor) -> Tensor:
    """Which tokens take a pathway, bool of the shape of `modality` (codes as in `lvlm_prune.blocks`).

    Example:
        >>> tokens_of("visual", torch.tensor([[0, 1, -1, 2]], dtype=torch.int8))
        tensor([[False,  True, False,  True]])
    """
    return torch.isin(modality, torch.tensor(_CODES[pathway], dtype=modality.dtype, device=modality.device))


def route(linear: nn.Linear, pruned: Tensor, taken: Callable[[], Tensor], name: str) -> RemovableHandle:
    """Give a Linear a second pathway, until the handle is removed.

    Args:
        linear: The Linear; its own weight is the pathway of all other tokens.
        pruned: Weight of the second pathway, of the same shape.
        taken: Says at each call which of the tokens of the batch take the second pathway, bool of shape (B, S).
        name: Name of the Linear, for the error.

    Raises:
        RunError: At a call: the Linear does not see the tokens of the batch one by one.
    """

    weight = [pruned]

    def choose(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = arguments[0]
        weight[0] = weight[0].to(inputs.device)  # a model may be moved after its Linears were given a second pathway
        takes = taken().to(inputs.device)
        if takes.numel() != inputs.shape[:-1].numel():
            raise RunError(f"{name} does not see the tokens of the decoder one by one, so none can be routed")
        if not takes.any():
            return output
        second = apply_linear(inputs, weight[0], linear.bias)
        return torch.where(takes.reshape(inputs.shape[:-1])[..., None], second, output)

    return linear.register_forward_hook(choose)


@contextmanager
def routed(model: nn.Module, pruned: Mapping[str, Tensor], pathway: Pathway) -> Iterator[None]:
    """A whole model whose Linears have a second pathway, also while it generates; as before when the context ends.

    Args:
        model: A transformers model, called with `input_ids`.
        pruned: Full name of each Linear -> weight of the second pathway, brought to the Linear's device and dtype.
        pathway: Whose tokens take it.

    Raises:
        RunError: At a call: there are no `input_ids` to tell modalities by.
    """
    current: dict[str, Tensor] = {}

    def note(module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        input_ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if input_ids is None:
            raise RunError("the probe needs `input_ids`: they say which tokens are visual")
        current["taken"] = tokens_of(pathway, modality_of_tokens(module.config, input_ids))

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        for name, weight in pruned.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            stack.callback(route(linear, weight.to(linear.weight), lambda: current["taken"], name).remove)
        yield
