"""What chaining and pruning are held against: whole forwards of a model, without any of the package's machinery."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.blocks import Decoder, find_decoder, prunable_linears


def own_forward(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[int, Tensor], Tensor]:
    """(block to its input, the decoder's last hidden state) of the model's own forward."""
    decoder: Decoder = find_decoder(model)
    block_inputs: dict[int, Tensor] = {}
    last: list[Tensor] = []

    def note_input(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            name = list(inspect.signature(type(module).forward).parameters)[1]
            block_inputs[index] = (arguments[0] if arguments else keywords[name]).clone()

        return hook

    def note_output(module: nn.Module, _: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        last.append((output[0] if hidden is None else hidden).clone())

    handles = [
        layer.register_forward_pre_hook(note_input(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    handles.append(decoder.module.register_forward_hook(note_output))
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return block_inputs, last[0]


def halve(block: nn.Module) -> None:
    """Set the smaller half of every row of every matrix to zero, experts and routers included."""
    for parameter in block.parameters():
        if parameter.ndim >= 2:
            rows = parameter.data.view(-1, parameter.shape[-1])
            smallest = rows.abs().argsort(dim=1, stable=True)[:, : rows.shape[1] // 2]
            rows.scatter_(1, smallest, 0)


@torch.no_grad()
def prune_by_full_forwards(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Wanda at 50%: a whole forward of the model for each block and sample.

    Returns:
        Full name of each Linear that was called -> where its weight is zero afterwards.
    """
    decoder, masks = find_decoder(model), {}
    for path, block in zip(decoder.names, decoder.layers):
        norms: dict[str, Tensor] = {}

        linears = prunable_linears(block)
        hooks = [linear.register_forward_pre_hook(_add_to(norms, name)) for name, linear in linears.items()]
        for batch in batches:
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            if name not in norms:
                continue
            score = linear.weight.abs().double() * norms[name].sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            linear.weight.data.scatter_(1, lowest, 0.0)
            masks[f"{path}.{name}"] = linear.weight == 0
    return masks


def _add_to(norms: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
        norms[name] = norms.get(name, 0) + tokens.square().sum(0)

    return hook
