"""Where the decoder blocks of a model are, and which Linears in a block may be pruned."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lvlm_prune.checkpoints.versions import tied_names
from lvlm_prune.errors import InputError

# What models of transformers call their lists of blocks.
LIST_NAMES = ("layers", "layer", "h", "blocks")
_DEPTH_NAMES = ("num_hidden_layers", "decoder_layers", "num_layers")

# Small projections that decide where a token goes. Zeros there change the route of tokens, not the cost of a block.
_ROUTING_NAMES = frozenset({"router", "indexer", "shared_expert_gate"})


@dataclass(frozen=True)
class Decoder:
    """The module whose forward loops over the blocks, and its blocks; of a language decoder, or of a vision tower.

    Attributes:
        module: The module whose `forward` runs the loop.
        layers: The blocks, in the order in which the loop runs them.
        name: Path of `module` in `model.named_modules()`.
        names: Path of each block, for example `model.language_model.layers.3`.
    """

    module: nn.Module
    layers: nn.ModuleList
    name: str
    names: list[str]


def find_decoder(model: nn.Module) -> Decoder:
    """The language decoder of a transformers model, recognised by its shape and not by its family.

    It is the first module, from `model.get_decoder()` downwards, that holds a `ModuleList` of as many blocks as the
    text configuration says.

    Raises:
        InputError: There is no such module, it does not read the prompt, or its blocks are at work elsewhere too.
    """
    text_config = _text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        problem = "an encoder reads its prompt; only decoders that read image and text themselves are pruned"
        raise InputError("model.path", type(model).__name__, problem)
    depth = next((value for name in _DEPTH_NAMES if (value := getattr(text_config, name, None))), None)
    for module, layers in _candidates(model, text_config):
        if len(layers) == depth:
            paths = {id(submodule): path for path, submodule in model.named_modules()}
            names = [paths[id(layer)] for layer in layers]
            _refuse_shared(model, names)
            return Decoder(module, layers, paths[id(module)], names)
    blocks = "decoder blocks" if depth is None else f"{depth} decoder blocks"
    raise InputError("model.path", type(model).__name__, f"no list of {blocks} found in this model")


def _refuse_shared(model: nn.Module, blocks: list[str]) -> None:
    """Raise if a part of the model that runs before the blocks has the same weights as they have."""

    def is_in_blocks(name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in blocks)

    for name, others in tied_names(model).items():
        elsewhere = next((other for other in others if not is_in_blocks(other)), None)
        if elsewhere is not None and is_in_blocks(name):
            problem = f"{elsewhere} is the same weight as {name}; such blocks are not pruned one after the other"
            raise InputError("model.path", type(model).__name__, problem)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise InputError("model.path", type(model).__name__, "not a transformers model: it has no configuration")
    return config.get_text_config(decoder=True)


def _candidates(model: nn.Module, text_config: Any) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """(module, list of blocks) pairs, the most likely first."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    root: nn.Module = model if get_decoder is None else get_decoder()
    for module in root.modules():
        # Below the root a vision tower may be as deep as the decoder: only a module of the text model's type counts.
        own_type = getattr(getattr(module, "config", None), "model_type", None)
        if module is not root and own_type != text_config.model_type:
            continue
        for list_name in LIST_NAMES:
            layers = getattr(module, list_name, None)
            if isinstance(layers, nn.ModuleList):
                yield module, layers


def prunable_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of a block by its path in the block, except the ones that route tokens.

    Left out are Linears with `router`, `indexer` or `shared_expert_gate` in their path, subclasses of Linear that are
    routers, and a `gate` beside `experts`.

    Example:
        >>> block = nn.ModuleDict({"up_proj": nn.Linear(4, 8), "router": nn.Linear(4, 2)})
        >>> list(prunable_linears(block))
        ['up_proj']
    """
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and not _routes_tokens(block, path, module)
    }


def _routes_tokens(block: nn.Module, path: str, linear: nn.Linear) -> bool:
    parent, _, leaf = path.rpartition(".")
    return (
        not _ROUTING_NAMES.isdisjoint(path.split("."))
        or "Router" in type(linear).__name__
        or (leaf == "gate" and hasattr(block.get_submodule(parent), "experts"))
    )
