"""Pruning of one pathway: masks block by block through the loop of `prune`, for the tokens of one modality only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lvlm_prune.blocks import modality_of_tokens
from lvlm_prune.blocks.routing import Pathway, route, tokens_of
from lvlm_prune.callbacks.pruning import BlockwisePruning
from lvlm_prune.errors import InputError
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import batches_of
from lvlm_prune.methods.pools import MixedPool, Pool, TextOnlyPool, VisualOnlyPool
from lvlm_prune.methods.scorers import Scorer

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer

POOLS: dict[str, type[Pool]] = {"text": TextOnlyPool, "visual": VisualOnlyPool, "mixed": MixedPool}

_QUERY_KEY_VALUE = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "W_pack", "qkv", "c_attn"})
_FEED_FORWARD = frozenset({"mlp", "ffn", "feed_forward", "fc1", "fc2"})


def is_probed(name: str) -> bool:
    """Whether a Linear belongs to QKV or to the feed-forward network, the ones that the probe splits.

    Example:
        >>> [is_probed(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
        [True, False, True]
    """
    parts = name.split(".")
    return parts[-1] in _QUERY_KEY_VALUE or not _FEED_FORWARD.isdisjoint(parts)


class PathwayPruning(BlockwisePruning):
    """Prunes what the tokens of one modality go through; those of the others keep the dense weights.

    Args:
        pathway: Whose tokens go through pruned weights.
        pool: Which tokens calibrate: `text`, `visual` or `mixed`.
        sparsity: Share of each weight that goes.
        scorer: How important a weight is.
        visual: Modalities that count as visual in the pool.
    """

    section = "probing"

    def __init__(self, pathway: Pathway, pool: str, sparsity: float, scorer: Scorer, visual: list[str]) -> None:
        super().__init__(sparsity=sparsity, pool=POOLS[pool](), scorer=scorer, visual=visual, experts="keep")
        self.pathway, self.pool_name = pathway, pool
        self.pruned: dict[str, Tensor] = {}
        """Full name of each Linear done so far -> its pruned weight, on the CPU."""
        self._taken: list[Tensor] = []
        self._place = 0
        self._handles: list = []

    def plan(self, pl_module: LVLMModule) -> None:
        """Only QKV and feed-forward Linears.

        Raises:
            InputError: The decoder has none that are known by name.
        """
        super().plan(pl_module)
        self.shapes = {name: shape for name, shape in self.shapes.items() if is_probed(name)}
        if not self.shapes:
            raise InputError("model.path", pl_module.path, "no QKV or feed-forward Linears found by name")
        self.allocate()

    def on_prune_start(self, trainer: RunTrainer, pl_module: LVLMModule) -> None:
        """Note which tokens of each batch take the pruned pathway."""
        for batch in batches_of(trainer.run.samples.rows):
            assert batch.input_ids is not None
            modality = modality_of_tokens(pl_module.model.config, batch.input_ids, batch.attention_mask)
            self._taken.append(tokens_of(self.pathway, modality))

    def on_block_calibrated(self, trainer: RunTrainer, pl_module: LVLMModule, block: Block) -> None:
        """Prune as ever, but as a second pathway beside the dense weights."""
        dense = {name: block.linears[name].weight.detach().clone() for name in self._targets}
        super().on_block_calibrated(trainer, pl_module, block)
        for name in block.masks:
            linear, full_name = block.linears[name], self._targets[name]
            pruned = linear.weight.detach().clone()
            linear.weight.data.copy_(dense[name])
            self._handles.append(route(linear, pruned, lambda: self._taken[self._place], full_name))
            self.pruned[full_name] = pruned.cpu()

    def on_propagation_batch_end(self, trainer: RunTrainer, pl_module: LVLMModule, block: Block) -> None:
        """The next batch."""
        self._place += 1

    def on_block_end(self, trainer: RunTrainer, pl_module: LVLMModule, block: Block) -> None:
        """Leave the block as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._place = 0
