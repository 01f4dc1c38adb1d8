"""Weights that come when they are needed and go when they are not.

disk   ████████████████████████████████████████  all of the checkpoint
memory ██ non-block weights: towers, embeddings  ──► released once all batches are caught
          ▓▓ block 0 ──► released
            ░▓▓ block 1 ──► released ...       ░ read in the background while block 0 is in work
"""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lvlm_prune.blocks.decoder import Decoder
from lvlm_prune.checkpoints.allocator import give_back_freed
from lvlm_prune.checkpoints.checkpoint import CheckpointFolder
from lvlm_prune.checkpoints.completeness import refuse_incomplete
from lvlm_prune.checkpoints.prefetch import Prefetch, prefetch
from lvlm_prune.checkpoints.sizes import shape_error
from lvlm_prune.checkpoints.skeleton import NEEDS_ORIGINAL
from lvlm_prune.checkpoints.sources import WeightSource, find_sources
from lvlm_prune.checkpoints.versions import tied_names
from lvlm_prune.errors import InputError

# As compressed-tensors, GPTQ, AWQ, bitsandbytes, ModelOpt, Quanto and FP8 checkpoints have them beside a weight.
_OF_QUANTIZATION = re.compile(
    r"(.+?)\.(?:(?:weight[._])?(?:scales?(?:_inv|_\d)?|zero_points?|zeros?|absmax|nested_absmax|quant_map"
    r"|nested_quant_map|quant_state\.\w+|_scale|_shift|packed|shape|g_idx|format)"
    r"|(?:input|output)(?:_|\.)(?:scale|zero_point)|q(?:weight|zeros)|scales|g_idx|SCB)"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Weights(ABC):
    """Brings the parts of a model into memory.

    Non-block weights are what catching a batch needs besides blocks: vision tower, projector, embeddings, final norm.
    """

    @abstractmethod
    def of(self, blocks: Decoder) -> "Weights":
        """The same weights, with the blocks of a vision tower as `blocks`; they stay among the non-block weights."""

    @abstractmethod
    def load_non_block_weights(self, folder: CheckpointFolder | None = None) -> None:
        """Bring the non-block weights into memory.

        Args:
            folder: Another folder of the same layout to read it from.
        """

    @abstractmethod
    def release_non_block_weights(self, keep_token_embedding: bool = False) -> None:
        """Let go of what only catching needs: everything outside the decoder, and the token embedding.

        Args:
            keep_token_embedding: Keep the embedding, for batches whose `needs_token_embedding` is true.
        """

    def load_output_embedding(self) -> None:  # noqa: B027
        """Bring the output embedding (`lm_head`) into memory; only losses need it."""

    def release_output_embedding(self) -> None:  # noqa: B027
        """Let go of the output embedding."""

    @contextmanager
    def output_embedding(self) -> Iterator[None]:
        """The output embedding is in memory within, and not beside blocks that pass by: it is as large as several."""
        self.load_output_embedding()
        try:
            yield
        finally:
            self.release_output_embedding()

    @abstractmethod
    def load_block(self, i: int, folder: CheckpointFolder | None = None) -> None:
        """Bring block `i` into memory.

        Args:
            i: Index of the block.
            folder: Another folder of the same layout to read it from.
        """

    def prefetch_block(self, i: int) -> None:  # noqa: B027
        """Begin to read block `i` in the background, for the next `load_block`."""

    @abstractmethod
    def release_block(self, i: int) -> None:
        """Let go of block `i`."""


class ResidentWeights(Weights):
    """Weights of a model that is in memory as a whole: nothing to bring, nothing to let go."""

    def of(self, blocks: Decoder) -> "ResidentWeights":
        return self

    def load_non_block_weights(self, folder: CheckpointFolder | None = None) -> None:
        if folder is not None:
            raise ValueError("a model in memory does not read weights from a folder")

    def release_non_block_weights(self, keep_token_embedding: bool = False) -> None:
        pass

    def load_block(self, i: int, folder: CheckpointFolder | None = None) -> None:
        if folder is not None:
            raise ValueError("a model in memory does not read its blocks from a folder")

    def release_block(self, i: int) -> None:
        pass


class StreamedWeights(Weights):
    """Weights read from a checkpoint folder, one block at a time.

    The output embedding (`lm_head`) is loaded only when asked for. Buffers that no checkpoint holds (rotary tables)
    stay in memory.

    Args:
        model: Skeleton of the model, its parameters on the meta device.
        decoder: Its decoder.
        folder: The checkpoint.
        device: Where loaded weights go.

    Raises:
        InputError: The checkpoint lacks a tensor, or has one that is quantized or whose shape does not fit the
            configuration. Parts of vision towers that are missing as a whole raise when a forward really uses them.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: Decoder, folder: CheckpointFolder, device: torch.device | str = "cpu"
    ) -> None:
        self._model = model
        self._folder = folder
        self._device = device
        self._sources = find_sources(model, folder)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._provider = _providers(model, self._sources, self._dtypes)
        self._take_blocks(decoder)
        in_blocks = {name for names in self._block_names for name in names}
        unused = _path_of_output_embedding(model)
        self._non_block_names = [
            name for name in self._dtypes if name not in in_blocks and not (unused and name.startswith(f"{unused}."))
        ]
        output = _path_of(model, model.get_output_embeddings())
        self._output_names = [name for name in self._dtypes if output and name.startswith(f"{output}.")]
        self._refuse_unfit([*in_blocks, *self._non_block_names, *self._output_names])
        refuse_incomplete(model, folder, self._provider)

    def _take_blocks(self, decoder: Decoder) -> None:
        self._block_names: list[list[str]] = [
            [name for name in self._dtypes if name.startswith(f"{path}.")] for path in decoder.names
        ]
        self._decoder_path = f"{decoder.name}." if decoder.name else ""
        self._coming: tuple[int, Prefetch] | None = None

    def of(self, blocks: Decoder) -> "StreamedWeights":
        other = copy(self)
        other._take_blocks(blocks)
        return other

    def at(self, folder: CheckpointFolder) -> "StreamedWeights":
        """The same weights, read from another folder of the same layout."""
        other = copy(self)
        other._folder, other._coming = folder, None
        return other

    def is_stored_as_used(self, name: str) -> bool:
        """Whether a parameter in memory has the very bytes that are on disk."""
        source = self._sources[self._provider[name]]
        return source.converter is None and self.stored_dtype(name) == self._dtypes[next(iter(source.shapes))]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype on disk of a parameter of the model."""
        return self._folder[self._sources[self._provider[name]].key].torch_dtype

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter of the model."""
        return name in self._provider

    def keys_of(self, name: str) -> list[str]:
        """Names on disk of all tensors that a parameter of the model is made from."""
        return [key for keys in self._sources[self._provider[name]].keys.values() for key in keys]

    def keys_beyond(self) -> list[str]:
        """Names on disk that only their number tells from those of a block, of decoder or tower, that the model has.

        Its `config.json` counts fewer blocks than there are, or they are for something else (prediction of tokens
        further ahead).
        """
        used = self._used_keys()
        kinds = {_NUMBER.sub("#", key) for key in used if _NUMBER.search(key)}
        return [key for key in self._folder if key not in used and _NUMBER.sub("#", key) in kinds]

    def keys_of_quantization(self) -> list[str]:
        """Names on disk, of no tensor of the model, that quantization leaves beside a weight: scales, zero points."""
        used = self._used_keys()
        modules = {key.rpartition(".")[0] for key in used}
        return [
            key
            for key in self._folder
            if key not in used and (found := _OF_QUANTIZATION.fullmatch(key)) is not None and found[1] in modules
        ]

    def keys_beside_blocks(self) -> list[str]:
        """Names on disk of what a forward needs outside the blocks, and of vectors in them: norms, biases."""
        beside = {key for name in (*self._non_block_names, *self._output_names) for key in self._keys_if_any(name)}
        within = {key for names in self._block_names for name in names for key in self._keys_if_any(name)}
        vectors = {key for key in within if len(self._folder[key].shape) < 2}
        return [key for key in self._folder if key in beside or key in vectors]

    def _keys_if_any(self, name: str) -> list[str]:
        return self.keys_of(name) if self.has(name) else []

    def _used_keys(self) -> set[str]:
        return {key for source in self._sources.values() for keys in source.keys.values() for key in keys}

    def stored(self, name: str, folder: CheckpointFolder | None = None) -> Tensor:
        """A parameter of the model as the checkpoint has it: in the model's shape, in the dtype on disk, on the CPU.

        Args:
            name: Path in the model.
            folder: Another folder of the same layout to read it from.
        """
        provider = self._provider[name]
        source = self._sources[provider]
        folder = folder or self._folder
        return source.load(self._model, folder, "cpu", folder[source.key].torch_dtype)[provider]

    def to_disk(self, tensors: dict[str, Tensor], folder: CheckpointFolder | None = None) -> dict[str, Tensor]:
        """What to write so that parameters of the model take new values.

        Args:
            tensors: Path in the model to new value, in the model's shape.
            folder: Another folder of the same layout, for the values of what shares a tensor on disk with one of these.

        Returns:
            Name on disk to tensor, in the shape and dtype on disk, as `CheckpointFolder.write` takes them. One
            parameter may be several tensors there, several parameters may be one.

        Raises:
            RunError: A parameter is stored in a form that cannot be written.
        """
        made_from: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            provider = self._provider[name]
            made_from[id(self._sources[provider])][provider] = tensor
        written: dict[str, Tensor] = {}
        for group in made_from.values():
            source = self._sources[next(iter(group))]
            written |= source.store(self._model, folder or self._folder, group)
        return written

    def load_non_block_weights(self, folder: CheckpointFolder | None = None) -> None:
        self._load(self._non_block_names, folder or self._folder)
        for name, buffer in list(self._model.named_buffers(remove_duplicate=False)):
            if buffer.device.type != "meta":
                self._set(name, buffer.to(self._device))

    def release_non_block_weights(self, keep_token_embedding: bool = False) -> None:
        embedding = _path_of(self._model, _input_embedding(self._model))
        in_blocks = {name for names in self._block_names for name in names}
        for name in self._non_block_names:
            is_embedding = embedding is not None and name.startswith(f"{embedding}.")
            is_between_blocks = name.startswith(self._decoder_path) and name not in in_blocks
            needed = keep_token_embedding if is_embedding else is_between_blocks
            if not needed:
                self._release(name)
        give_back_freed()

    def load_output_embedding(self) -> None:
        self._load(self._output_names, self._folder)

    def release_output_embedding(self) -> None:
        for name in self._output_names:
            self._release(name)

    def load_block(self, i: int, folder: CheckpointFolder | None = None) -> None:
        coming, self._coming = self._coming, None
        if coming is not None and folder is None and coming[0] == i:
            self._take(coming[1].take())
            return
        if coming is not None:
            coming[1].drop()
        self._load(self._block_names[i], folder or self._folder)

    def prefetch_block(self, i: int) -> None:
        self._coming = (i, prefetch(self._read(self._block_names[i], self._folder, "cpu"), self._device))

    def release_block(self, i: int) -> None:
        for name in self._block_names[i]:
            self._release(name)
        give_back_freed()

    def _load(self, names: list[str], folder: CheckpointFolder) -> None:
        for name, tensor in self._read(names, folder, self._device):
            self._set(name, tensor)

    def _take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Set tensors that were read onto the CPU, one copy at a time."""
        while tensors:
            name, tensor = tensors.pop()
            self._set(name, tensor.to(self._device))

    def _read(
        self, names: list[str], folder: CheckpointFolder, device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        made_from: dict[int, list[str]] = defaultdict(list)
        for name in names:
            if name in self._provider:
                made_from[id(self._sources[self._provider[name]])].append(name)
        for group in made_from.values():
            source = self._sources[self._provider[group[0]]]
            dtype = self._dtypes[next(iter(source.shapes))]
            tensors = source.load(self._model, folder, device, dtype)
            for name in group:
                yield name, tensors[self._provider[name]]

    def _release(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        parameter = self._model.get_submodule(path)._parameters.get(leaf)
        # Buffers stay: those that the checkpoint does not hold could not be brought back.
        if parameter is not None:
            self._set(name, torch.empty_like(parameter, device="meta"))

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def _refuse_quantized(self, name: str, source: WeightSource) -> None:
        for key in (key for keys in source.keys.values() for key in keys):
            stored = self._folder[key].torch_dtype
            if self._dtypes[name].is_floating_point and (not stored.is_floating_point or stored.itemsize == 1):
                problem = f"the weights are quantized ({key} is {self._folder[key].dtype}); {NEEDS_ORIGINAL}"
                raise InputError("model.path", self._folder.path, problem)

    def _refuse_unfit(self, names: list[str]) -> None:
        """Raise for the first tensor whose shape is not the one that the configuration asks for."""
        expected = self._model.state_dict()
        for name in names:
            if name not in self._provider:
                continue
            source = self._sources[self._provider[name]]
            self._refuse_quantized(name, source)
            shape, stored = tuple(expected[name].shape), source.shapes[self._provider[name]]
            if shape != stored:
                raise shape_error(self._folder, source.key, stored, shape)


def _providers(model: PreTrainedModel, sources: dict[str, WeightSource], names: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of the model that the checkpoint provides to the name that it provides it under.

    They differ for tied parameters, of which a checkpoint holds one.
    """
    partners, providers = tied_names(model), {}
    for name in names:
        provider = next((candidate for candidate in (name, *partners.get(name, [])) if candidate in sources), None)
        if provider is not None:
            providers[name] = provider
    return providers


def _path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Path of `module` in `model`; None for no module, or one that is not in it."""
    return next((path for path, candidate in model.named_modules() if candidate is module), None)


def _path_of_output_embedding(model: PreTrainedModel) -> str | None:
    output = model.get_output_embeddings()
    return None if output is None or output is _input_embedding(model) else _path_of(model, output)


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
