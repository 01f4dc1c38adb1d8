"""Run a model's decoder one block at a time, exactly as the model's own forward does."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lvlm_prune.blocks.capture import (
    BlankEmbeddings,
    CarriedOutput,
    CaughtBatch,
    ForwardRecord,
    StopForward,
    UnexpectedForm,
    block_return,
    last_takers,
    named_arguments,
    reads_history,
    record,
    record_first,
    stubbed,
)
from lvlm_prune.blocks.decoder import Decoder, find_decoder
from lvlm_prune.blocks.modality import with_image_positions
from lvlm_prune.blocks.nested import contents_restored, has_nan
from lvlm_prune.errors import InputError

Target = Literal["language", "vision"]


@dataclass(frozen=True)
class Part:
    """Blocks that are pruned one after the other, each from the outputs of those before it.

    Args:
        target: What they belong to: the language decoder, or a vision tower.
        runner: Runs the blocks of this part.
        first: Number of the first one among all blocks of the run.
    """

    target: Target
    runner: "BlockRunner"
    first: int = 0

    @property
    def numbers(self) -> range:
        """Numbers of these blocks among all blocks of the run."""
        return range(self.first, self.first + len(self.runner))


class BlockRunner:
    """Runs the decoder of `model` block by block.

    Between two blocks it does what the decoder does there, by the decoder's own code: the result of chaining all blocks
    is the model's own forward bit for bit, also when blocks are changed on the way. Nothing here knows a model family.

    For each batch the blocks must be run in order, from the first to the last: some hand keys and values to later ones.
    Gradients are off but in `run_with_gradients`.

    Attributes:
        forwards: How often a block has run so far, whichever.

    Args:
        model: A transformers model in eval mode. Its blocks may be on the meta device while batches are caught.
        decoder: Its decoder; found where it is not given.

    Raises:
        InputError: The model has no decoder that can be recognised.

    Example:
        A batch all the way through the decoder::

            runner = BlockRunner(model)
            batch = runner.catch(inputs)
            for i in range(len(runner)):
                output = runner.run(i, batch)   # as often as needed, for example under hooks
                runner.advance(i, batch)        # batch.hidden is now the input of block i + 1
            last_hidden_state = runner.finish(batch)
    """

    # What every forward of `model` is called with.
    _options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def __init__(self, model: nn.Module, decoder: Decoder | None = None) -> None:
        self.model = model
        self.decoder = decoder or find_decoder(model)
        # Learned from the first batch, for this model only: another model of the same class may differ.
        self._form: int | None = None
        self._end_is_known = False
        self._reads_history: bool | None = None
        self.forwards = 0

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def block(self, i: int) -> nn.Module:
        """The module of block `i`, counted from 0."""
        return self.decoder.layers[i]

    def name(self, i: int) -> str:
        """Path of block `i` in the model, for example `model.language_model.layers.3`."""
        return self.decoder.names[i]

    @torch.no_grad()
    def catch(self, inputs: Mapping[str, Any]) -> CaughtBatch:
        """Run everything before block 0 and record what the decoder would hand to each block.

        Args:
            inputs: Keyword arguments of the model's forward, on the model's device: `input_ids` (B, S), usually
                `attention_mask` (B, S), and what the modalities need.

        Raises:
            InputError: The decoder works in a way that cannot be replayed, or on another number of positions than there
                are token ids.
        """
        inputs = {**inputs, **self._options}
        # Version counters, by which changes in place are noticed, do not exist in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            recording = self._record(inputs)
            if self._reads_history is None:
                self._reads_history = reads_history(self.model, self.decoder, inputs, self._form, recording)
        assert recording.hidden is not None
        positions = recording.hidden.shape[-2]
        input_ids, attention_mask = with_image_positions(self.model.config, inputs, positions)
        batch = CaughtBatch(
            hidden=recording.hidden,
            arguments=recording.arguments,
            glue=frozenset(recording.glue),
            decoder_arguments=recording.decoder_arguments,
            decoder_keywords=recording.decoder_keywords,
            extra_outputs=self._form,
            input_ids=input_ids,
            attention_mask=attention_mask,
            last_takers=last_takers(recording.arguments),
            history={} if self._reads_history else None,
        )
        self._check_positions(batch)
        if not batch.glue and batch.history is None:
            _drop_embeddings(batch)
        return batch

    def _record(self, inputs: Mapping[str, Any]) -> ForwardRecord:
        if self._reads_history is not None:
            try:
                return record(self.model, self.decoder, inputs, self._form)
            except UnexpectedForm:
                pass
        self._form, recording = record_first(self.model, self.decoder, inputs)
        return recording

    def _check_positions(self, batch: CaughtBatch) -> None:
        if batch.input_ids is None:
            return
        tokens = batch.input_ids.shape[-1]
        # Where decoders carry several residual streams, these are one dimension more, in front or behind the positions.
        if tokens not in batch.hidden.shape[:-1]:
            positions = batch.hidden.shape[-2]
            raise InputError(
                "model.path",
                type(self.model).__name__,
                f"its decoder sees {positions} positions for {tokens} token ids: the inputs need one placeholder token "
                "per visual token",
            )

    def calls(self, i: int, batch: CaughtBatch) -> bool:
        """Whether the decoder calls block `i` for this batch (Mllama skips cross-attention blocks for text)."""
        return i in batch.arguments

    @torch.no_grad()
    def run(self, i: int, batch: CaughtBatch) -> Tensor:
        """Output of block `i` for `batch.hidden`, of the same shape. The batch does not move on.

        Where the decoder skips this block, the output is `batch.hidden` itself.
        """
        return self._run(i, batch)

    @torch.enable_grad()
    def run_with_gradients(self, i: int, batch: CaughtBatch) -> Tensor:
        """The same as `run`, for backward to whatever in block `i` requires gradients."""
        return self._run(i, batch)

    def _run(self, i: int, batch: CaughtBatch) -> Tensor:
        if not self.calls(i, batch):
            return batch.hidden
        # What the block leaves behind for later blocks must not be there when it runs again.
        with contents_restored(batch.arguments[i]):
            return _hidden_of(self._call(i, batch))

    def _call(self, i: int, batch: CaughtBatch) -> Any:
        """All that block `i` returns."""
        arguments = {
            name: batch.carried[value.block][value.index] if isinstance(value, CarriedOutput) else value
            for name, value in batch.arguments[i].items()
        }
        self.forwards += 1
        return self.decoder.layers[i](batch.hidden, **arguments)

    @torch.no_grad()
    def advance(self, i: int, batch: CaughtBatch) -> Tensor:
        """Run block `i` and move the batch on: `batch.hidden` becomes the input of the next block.

        What the decoder does between the two blocks is done by the decoder's own code. After the last block
        `batch.hidden` is that block's output.

        Returns:
            The block's own output, before the decoder does anything to it; where the decoder skips this block,
            `batch.hidden`.
        """
        if not self.calls(i, batch):
            return batch.hidden
        returned = self._call(i, batch)
        if i in batch.last_takers:
            batch.carried[i] = {index: returned[1 + index] for index in batch.last_takers[i]}
        output = _hidden_of(returned)
        if batch.history is not None:
            batch.history[i] = output
        is_last = i == batch.last_block
        between = not is_last and (i in batch.glue or batch.history is not None)
        batch.hidden = self._through_decoder(i, batch, output) if between else output
        batch.carried = {
            block: kept for block, kept in batch.carried.items() if max(batch.last_takers[block].values()) > i
        }
        return output

    def _through_decoder(self, i: int, batch: CaughtBatch, output: Tensor) -> Tensor:
        """Input of the next block after `i`, given the output of block `i`."""
        earlier = batch.history or {}
        reached: list[Tensor] = []

        def stub_for(block: int) -> Callable[..., Any]:
            def stub(*arguments: Any, **keywords: Any) -> Any:
                hidden, named = named_arguments(self.decoder.layers[block], arguments, keywords)
                if block > i:
                    reached.append(hidden)
                    if batch.history is not None:
                        batch.arguments[block] = named
                    raise StopForward
                # The decoder may change what it is given in place, and earlier outputs are needed as they were.
                passed = output if block == i else earlier.get(block)
                return block_return(batch.extra_outputs, block, hidden if passed is None else passed.clone())

            return stub

        with suppress(StopForward):
            self._decoder_forward(batch, stub_for)
        return reached[0]

    @torch.no_grad()
    def finish(self, batch: CaughtBatch) -> Tensor:
        """The decoder's `last_hidden_state` (B, S, D), final norm and all, of a batch that all blocks have run.

        Raises:
            InputError: The decoder reads its embeddings again behind the last block, and they are gone.
        """
        earlier = batch.history or {}
        last_block = batch.last_block

        def stub_for(block: int) -> Callable[..., Any]:
            def stub(*arguments: Any, **keywords: Any) -> Any:
                hidden, _ = named_arguments(self.decoder.layers[block], arguments, keywords)
                passed = batch.hidden if block == last_block else earlier.get(block)
                return block_return(batch.extra_outputs, block, hidden if passed is None else passed.clone())

            return stub

        output = self._decoder_forward(batch, stub_for)
        last_hidden_state = getattr(output, "last_hidden_state", None)
        last = output[0] if last_hidden_state is None else last_hidden_state
        if not self._end_is_known:  # asked once: a GPU would be waited for
            self._end_is_known = True
            if has_nan(last) and not has_nan(batch.hidden):
                problem = "its decoder reads its embeddings again behind the last block"
                raise InputError("model.path", type(self.model).__name__, problem)
        return last

    def _decoder_forward(self, batch: CaughtBatch, stub_for: Callable[[int], Callable[..., Any]]) -> Any:
        keywords = dict(batch.decoder_keywords)
        embeddings = keywords.get("inputs_embeds")
        if isinstance(embeddings, BlankEmbeddings):
            keywords["inputs_embeds"] = batch.hidden.new_full(embeddings.shape, torch.nan, dtype=embeddings.dtype)
        elif embeddings is not None:
            # A decoder that scales or adds to its embeddings in place must find them unchanged the next time.
            keywords["inputs_embeds"] = embeddings.clone()
        with stubbed(self.decoder.layers, stub_for):
            return self.decoder.module(*batch.decoder_arguments, **keywords)


def _hidden_of(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, (tuple, list)) else returned


def _drop_embeddings(batch: CaughtBatch) -> None:
    """Keep only the shape of the decoder's embeddings, which would double the size of the batch.

    Without glue and history, the decoder's own forward is needed only for what comes after the last block, and that
    depends on the last block's output alone.
    """
    embeddings = batch.decoder_keywords.get("inputs_embeds")
    if isinstance(embeddings, Tensor):
        batch.decoder_keywords["inputs_embeds"] = BlankEmbeddings(tuple(embeddings.shape), embeddings.dtype)
