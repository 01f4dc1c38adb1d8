"""Vision towers: where their blocks are, and what the model calls them with.

    model(inputs) ─► patches ─► tower: block 0 ─► block 1 ─► ... ─► projector ─► decoder
                                 │
             each call recorded: its arguments go through the same mechanism as those of the decoder

A model may call a tower several times for one sample (images, then videos), not at all (text), and may have two towers,
or two lists of blocks in one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn

from lvlm_prune.blocks.capture import CaughtBatch, StopForward, named_arguments
from lvlm_prune.blocks.decoder import LIST_NAMES, Decoder, prunable_linears
from lvlm_prune.blocks.execution import BlockRunner

# What models of transformers call their vision towers.
_TOWERS = frozenset({"vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "video_tower"})


def find_towers(model: nn.Module, decoder: Decoder) -> list[Decoder]:
    """Every list of vision blocks of a transformers model, in the order of the modules; none for a model without any.

    Args:
        model: The model.
        decoder: Its language decoder, whose blocks are not among them.
    """
    found: list[Decoder] = []
    for path, module in model.named_modules():
        # Blocks of a block belong to it, as those of the decoder to the decoder.
        taken = (f"{decoder.name}.", *(f"{block}." for tower in found for block in tower.names))
        in_tower = not _TOWERS.isdisjoint(path.split(".")) and not f"{path}.".startswith(taken)
        for name in LIST_NAMES if in_tower else ():
            layers = getattr(module, name, None)
            if isinstance(layers, nn.ModuleList) and layers and all(prunable_linears(layer) for layer in layers):
                names = [f"{path}.{name}.{index}" for index in range(len(layers))]
                found.append(Decoder(module, layers, path, names))
    return found


class TowerRunner(BlockRunner):
    """Runs one list of vision blocks, block by block; see `BlockRunner`.

    Args:
        model: The whole model.
        decoder: Its language decoder.
        tower: The module that runs the vision blocks, and the blocks.
    """

    _options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: nn.Module, decoder: Decoder, tower: Decoder) -> None:
        super().__init__(tower.module, tower)
        self._whole, self._language = model, decoder

    @torch.no_grad()
    def catch_calls(self, inputs: Mapping[str, Any]) -> list[tuple[CaughtBatch, str]]:
        """Run the model up to its language decoder, and catch what the first block gets in each call of the tower.

        Args:
            inputs: Keyword arguments of the model's forward, on its device, for one sample.

        Returns:
            For each call the batch, and `image` or `video`; none for a sample of text.

        Raises:
            InputError: The tower works in a way that cannot be replayed.
        """
        caught = []
        for arguments, modality in self._calls(inputs):
            batch = self.catch(arguments)
            if not batch.glue and batch.history is None:
                # Only what happens between blocks would need the tower's own forward again.
                batch.decoder_arguments, batch.decoder_keywords = (), {}
            caught.append((batch, modality))
        return caught

    def _calls(self, inputs: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """Arguments of each call of the tower by name, and the modality that it sees."""
        calls: list[tuple[dict[str, Any], str]] = []

        def note(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            first, named = named_arguments(module, arguments, keywords)
            calls.append(({_first_name(module): first, **named}, "video" if inside else "image"))

        def stop(*_: Any) -> None:
            raise StopForward

        with ExitStack() as stack:
            inside = stack.enter_context(_calls_about_videos(self._whole))
            stack.callback(self.decoder.module.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(self._language.module.register_forward_pre_hook(stop).remove)
            with suppress(StopForward):
                self._whole(**inputs, use_cache=False)
        return calls


@contextmanager
def _calls_about_videos(model: nn.Module) -> Iterator[list[None]]:
    """A list that is not empty while the model encodes videos, by the method that transformers has for it."""
    inside: list[None] = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            inside.append(None)
            try:
                return method(*arguments, **keywords)
            finally:
                inside.pop()

        return noted

    with ExitStack() as stack:
        for module in model.modules():
            method = getattr(module, "get_video_features", None)
            if method is not None:
                module.__dict__["get_video_features"] = noting(method)
                stack.callback(module.__dict__.pop, "get_video_features")
        yield inside


def _first_name(module: nn.Module) -> str:
    """Name of the first argument of a module's forward."""
    return next(name for place, name in enumerate(signature(type(module).forward).parameters) if place == 1)
