"""Catch what a decoder hands to its blocks, without running a block.

    model(inputs) ─► vision tower, embeddings ─► decoder.forward:  block 0   block 1   block 2 ...   norm
                                                                      │         │         │
                                              stubs in their place: record the arguments, return the input

One forward with every block stubbed to the identity costs the vision tower and the embeddings, and the blocks may be on
the meta device. It tells, for each block, the arguments of its call. Three things need more than that:

- *Glue*: the decoder itself changes the hidden states between two blocks (DeepStack adds visual features there). It
  shows as a block that is given something else than what the block before it returned.
- *Carried outputs*: a block returns more than hidden states, and the decoder hands the rest to a later block. The stubs
  return a `CarriedOutput` in place of each, and find it again among later arguments.
- *History*: the decoder computes arguments from the outputs of earlier blocks. A second forward whose stubs return NaN
  shows the arguments that it reaches.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_prune.blocks.decoder import Decoder
from lvlm_prune.blocks.nested import distinct_nbytes, has_nan, map_tensors
from lvlm_prune.checkpoints.versions import CACHE_NAMES
from lvlm_prune.errors import InputError

# A recorded cache would be appended to at every replay of a block, which would then attend to old keys.
_WITHOUT_CACHE = {**dict.fromkeys(CACHE_NAMES), "use_cache": False}

# How many outputs after the hidden states a block may return; None stands for a bare tensor.
_FORMS = (None, 0, 1, 2, 3)


@dataclass(frozen=True)
class CarriedOutput:
    """Stands, among the arguments of a block, for an extra output of an earlier one (0 is the first after `hidden`)."""

    block: int
    index: int


@dataclass(frozen=True)
class BlankEmbeddings:
    """Stands for the embeddings that a decoder was called with, where only their shape still matters."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class CaughtBatch:
    """One batch on its way through the decoder.

    Attributes:
        hidden: Input of the block whose turn it is, (B, S, D) in the model's dtype; a few decoders carry several
            residual streams, (streams, B, S, D), and vision towers see (images, patches, D), or (patches, D). Once all
            blocks have run: output of the last one.
        arguments: Block to its arguments by name. Blocks that the decoder skips for this batch are absent.
        glue: Blocks after which the decoder itself changes the hidden states.
        decoder_arguments: Positional arguments of the decoder's own call.
        decoder_keywords: Keyword arguments of the decoder's own call, without a cache.
        extra_outputs: How many outputs after the hidden states a block returns; None where it returns a bare tensor.
        input_ids: Token ids (B, S), if the inputs had them.
        attention_mask: Mask of the inputs as given (1 for tokens, 0 for padding), if they had one.
        last_takers: Block to those of its extra outputs that later blocks take, and the last block that does.
        carried: Block to the values of these outputs, from when it has run until the last taker has.
        history: Block to its output, where the decoder computes later arguments from them; else None.
    """

    hidden: Tensor
    arguments: dict[int, dict[str, Any]]
    glue: frozenset[int]
    decoder_arguments: tuple[Any, ...]
    decoder_keywords: dict[str, Any]
    extra_outputs: int | None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    last_takers: dict[int, dict[int, int]] = field(default_factory=dict)
    carried: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    history: dict[int, Tensor] | None = None

    def to(self, device: torch.device | str) -> "CaughtBatch":
        """A copy with every tensor on `device`; what blocks share stays shared."""
        memo: dict[int, Any] = {}
        moved = {name: map_tensors(value, lambda tensor: tensor.to(device), memo) for name, value in vars(self).items()}
        return replace(self, **moved)

    def fork(self) -> "CaughtBatch":
        """A copy that goes its own way through the decoder; this batch stays where it is. Tensors are shared.

        Running one leaves no trace in the other, also where blocks hand keys and values to later blocks.
        """
        memo: dict[int, Any] = {}
        forked = {name: map_tensors(value, lambda tensor: tensor, memo) for name, value in vars(self).items()}
        return replace(self, **forked)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(samples, positions); what a vision tower sees without token ids belongs to one sample."""
        if self.input_ids is None:
            return 1, self.hidden.shape[:-1].numel()
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in this batch; memory that several of them share counts once."""
        return distinct_nbytes(list(vars(self).values()))

    @property
    def last_block(self) -> int:
        """The last block that the decoder calls for this batch."""
        return max(self.arguments)

    @property
    def needs_token_embedding(self) -> bool:
        """Whether the decoder's own forward looks tokens up, rather than being given their embeddings."""
        return self.decoder_keywords.get("inputs_embeds") is None


@dataclass
class ForwardRecord:
    """What one forward with stubbed blocks showed; the fields are those of `CaughtBatch`."""

    hidden: Tensor | None = None
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    glue: set[int] = field(default_factory=set)
    decoder_arguments: tuple[Any, ...] = ()
    decoder_keywords: dict[str, Any] = field(default_factory=dict)


def last_takers(arguments: dict[int, dict[str, Any]]) -> dict[int, dict[int, int]]:
    """Block to extra output to the last block among whose arguments it is."""
    takers: dict[int, dict[int, int]] = defaultdict(dict)
    for block in sorted(arguments):
        for value in arguments[block].values():
            if isinstance(value, CarriedOutput):
                takers[value.block][value.index] = block
    return dict(takers)


class StopForward(Exception):
    """Ends a forward as soon as there is nothing more to learn from it."""


class UnexpectedForm(Exception):
    """The decoder took something else than the hidden states out of what a stub returned."""


@contextmanager
def stubbed(layers: nn.ModuleList, stub_for: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of each block by `stub_for(index)`; afterwards put back what was there, patches included."""
    originals = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = stub_for(index)
        yield
    finally:
        for layer, original in zip(layers, originals):
            if original is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = original


def named_arguments(layer: nn.Module, arguments: tuple, keywords: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """(hidden states, every other argument by name and without a cache) of a call of `layer`."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    named = {**dict(zip(names, arguments)), **keywords}
    hidden = named.pop(names[0])
    return hidden, without_cache(named)


def without_cache(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` with every cache argument that occurs in them switched off."""
    return {**keywords, **{name: value for name, value in _WITHOUT_CACHE.items() if name in keywords}}


def block_return(extra_outputs: int | None, block: int, hidden: Tensor) -> Any:
    """What a stub returns: in the form of the true block, with `hidden` as hidden states."""
    if extra_outputs is None:
        return hidden
    return (hidden, *(CarriedOutput(block, index) for index in range(extra_outputs)))


def record(
    model: nn.Module, decoder: Decoder, inputs: Mapping[str, Any], extra_outputs: int | None, poison: bool = False
) -> ForwardRecord:
    """One forward of `model` with every block stubbed.

    Args:
        model: The model.
        decoder: Its decoder.
        inputs: Keyword arguments of the model's forward.
        extra_outputs: Form of the stubs' return value.
        poison: Stubs return NaN in place of their input.

    Raises:
        UnexpectedForm: The decoder does not unpack this form to the hidden states.
        InputError: The decoder calls no block, or not in order.
    """
    recording = ForwardRecord()
    returned: dict[int, tuple[Tensor, int]] = {}

    def note_glue(hidden: Any) -> None:
        if not returned:
            return
        previous, (output, version) = next(reversed(returned.items()))
        if not isinstance(hidden, Tensor) or hidden.ndim != output.ndim:
            raise UnexpectedForm
        # Another tensor, or the same one changed in place.
        if hidden is not output or hidden._version != version:
            recording.glue.add(previous)

    def stub_for(block: int) -> Callable[..., Any]:
        def stub(*arguments: Any, **keywords: Any) -> Any:
            hidden, named = named_arguments(decoder.layers[block], arguments, keywords)
            if returned and block <= max(returned):
                name = decoder.names[block]
                again = "a second time" if block in returned else "out of order"
                raise InputError("model.path", type(model).__name__, f"its decoder calls {name} {again}")
            note_glue(hidden)
            if recording.hidden is None:
                # The decoder may go on to change this very tensor in place.
                recording.hidden = hidden.clone()
            recording.arguments[block] = named
            output = torch.full_like(hidden, torch.nan) if poison else hidden
            returned[block] = (output, output._version)
            return block_return(extra_outputs, block, output)

        return stub

    def note_decoder_call(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        recording.decoder_arguments = arguments
        recording.decoder_keywords = without_cache(keywords)
        if isinstance(embeddings := keywords.get("inputs_embeds"), Tensor):
            # The decoder may scale them in place; a replay starts from what they are now.
            recording.decoder_keywords["inputs_embeds"] = embeddings.clone()

    def stop(*_: Any) -> None:
        # What comes after the decoder (lm_head) may be on the meta device.
        raise StopForward

    handles = [
        decoder.module.register_forward_pre_hook(note_decoder_call, with_kwargs=True),
        decoder.module.register_forward_hook(stop),
    ]
    try:
        with stubbed(decoder.layers, stub_for):
            model(**inputs)
    except StopForward:
        pass
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        if recording.arguments:
            raise UnexpectedForm(str(error)) from error
        raise
    except RuntimeError:
        # Behind the last block there is nothing to learn but that no block is called again; a norm may be on meta.
        if len(decoder.layers) - 1 not in returned:
            raise
    finally:
        for handle in handles:
            handle.remove()
    if not recording.arguments:
        raise InputError("model.path", type(model).__name__, "its forward calls none of its decoder blocks")
    return recording


def record_first(model: nn.Module, decoder: Decoder, inputs: Mapping[str, Any]) -> tuple[int | None, ForwardRecord]:
    """Find out how the blocks return: the first form that the decoder unpacks to the hidden states.

    Returns:
        The form (None for a bare tensor, n for a tuple of the hidden states and n more) and the recording made with it.

    Raises:
        InputError: No form fits.
    """
    first_error: UnexpectedForm | None = None
    for form in _FORMS:
        try:
            return form, record(model, decoder, inputs, form)
        except UnexpectedForm as error:
            first_error = first_error or error
    raise InputError(
        "model.path", type(model).__name__, "its decoder takes an unknown kind of output from its blocks"
    ) from first_error


def reads_history(
    model: nn.Module, decoder: Decoder, inputs: Mapping[str, Any], form: int | None, clean: ForwardRecord
) -> bool:
    """Whether the decoder computes arguments from the outputs of earlier blocks; `clean` is a recording without NaN."""
    poisoned = record(model, decoder, inputs, form, poison=True).arguments
    first_block = min(poisoned)
    return any(
        has_nan(value) and not has_nan(clean.arguments[block].get(name))
        for block, arguments in poisoned.items()
        if block > first_block
        for name, value in arguments.items()
    )
