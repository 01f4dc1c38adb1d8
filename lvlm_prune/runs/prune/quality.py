"""What pruning cost, on a few samples that it did not see: perplexity, and how far the answers moved.

dense checkpoint  ─► blocks one at a time ─► hidden states behind the last norm ─┐ a few megabytes each
sparse checkpoint ─► blocks one at a time ─► hidden states behind the last norm ─┤
                                                 output embedding, alone in memory ┴─► perplexity, KL(dense ‖ pruned)

Never more is in memory than while calibration samples are caught: a block and the next one, or the output embedding,
which is as large as the token embedding, and the logits of a few positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from lvlm_prune.blocks import StreamedWeights
from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.data import CalibrationBatch, CalibrationDataModule, fingerprint
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.errors import first_line
from lvlm_prune.loop.block_loop import waiting_sample
from lvlm_prune.loop.catching import catch_batch, taken_batches
from lvlm_prune.module import LVLMModule

# Bytes of the logits of a few positions, in float32; four such tensors are held at once.
_LOGITS_BYTES = 2**24


class SampleQuality:
    """Measures sparse checkpoints against the dense one that they were made from, which runs once.

    Args:
        model: The dense model, opened from a folder.
        samples: What to measure on.
        is_held_back: Whether these samples neither calibrated nor trained anything.
        device: Where blocks run.
    """

    def __init__(
        self,
        model: LVLMModule,
        samples: CalibrationDataModule,
        is_held_back: bool,
        device: torch.device | str,
    ) -> None:
        self._model, self._device = model, device
        self._samples, self.is_held_back = samples, is_held_back
        self._dense: tuple[Mapping[int, Tensor], Mapping[int, Tensor]] | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the samples that are measured on: other samples give other numbers."""
        return fingerprint(one for batch in self._batches() for one in batch.digests)

    def __call__(self, written: CheckpointFolder) -> dict[str, Any]:
        """Measure.

        Args:
            written: The sparse checkpoint, whose blocks are all written.

        Returns:
            `samples` and text `tokens` that were predicted; whether the samples were `held_back` from calibration;
            `perplexity` and `dense_perplexity` of these tokens, null where infinite; `kl`: mean KL(dense ‖ pruned) per
            token in nats; `agreement`: share of the tokens at which the most likely one is the dense model's. Where it
            cannot be measured only `not_measured`, the reason.
        """
        weights = self._model.weights(torch.device(self._device))
        assert isinstance(weights, StreamedWeights)
        try:
            self._dense = self._dense or self._answers(weights)
            dense, targets = self._dense
            pruned, _ = self._answers(weights.at(written))
            if lost := len(dense.keys() - pruned.keys()):
                return {"not_measured": f"the pruned model does not take {lost} of {len(dense)} samples"}
            with weights.output_embedding():
                return self._compared(dense, pruned, targets)
        except Exception as error:  # of a model's own code too: the checkpoint is whole without these numbers
            weights.release_block(0)
            weights.release_non_block_weights()
            return {"not_measured": first_line(error)}

    def _batches(self) -> Iterator[CalibrationBatch]:
        model = self._model
        return self._samples.calibration_batches(model.processor, batch_size=1, limits=ModelLimits.of(model.model))

    @torch.no_grad()
    def _answers(self, weights: StreamedWeights) -> tuple[Mapping[int, Tensor], Mapping[int, Tensor]]:
        """Number of each sample -> hidden states (n, D) behind the last norm, and the tokens (n,) that follow."""
        model, rows = self._model, []
        weights.load_non_block_weights()
        device = torch.device(self._device)
        for _, caught in taken_batches(
            model, self._samples, self._batches(), lambda one: catch_batch(model, one, device)
        ):
            rows += caught
        weights.release_non_block_weights(any(row.batch.needs_token_embedding for row in rows))
        weights.load_block(0)
        tail = RemainingDecoderBlocks(model.runner, weights, [waiting_sample(row) for row in rows], 0)
        found = tail.answers()
        weights.release_block(0)
        return found, tail.targets()

    @torch.no_grad()
    def _compared(
        self, dense: Mapping[int, Tensor], pruned: Mapping[int, Tensor], targets: Mapping[int, Tensor]
    ) -> dict[str, Any]:
        sums = torch.zeros(4, dtype=torch.float64)
        for number, following in targets.items():
            vocabulary = self._logits(dense[number][:1]).shape[-1] if len(following) else 1
            size = max(_LOGITS_BYTES // (4 * vocabulary), 1)
            parts = (one.split(size) for one in (dense[number], pruned[number], following))
            for before, after, tokens in zip(*parts):
                expected, found = self._logits(before), self._logits(after)
                if expected.isnan().any():
                    return {"not_measured": "logits of the dense model are NaN"}
                losses = [cross_entropy(one, tokens, reduction="sum") for one in (expected, found)]
                apart = kl_div(
                    found.log_softmax(dim=-1), expected.log_softmax(dim=-1), reduction="sum", log_target=True
                )
                # The largest of NaN is the first of them, which is no answer.
                same = ((expected.argmax(dim=-1) == found.argmax(dim=-1)) & ~found.isnan().any(dim=-1)).sum()
                sums += torch.stack([*losses, apart, same]).double().cpu()
        count = sum(map(len, targets.values()))
        if not count:
            return {"not_measured": "the samples have no text tokens to predict"}
        before, after, apart, same = (sums / count).tolist()
        return {
            "samples": len(targets),
            "tokens": count,
            "held_back": self.is_held_back,
            "dense_perplexity": _perplexity(before),
            "perplexity": _perplexity(after),
            "kl": apart if math.isfinite(apart) else None,
            "agreement": same,
        }

    def _logits(self, hidden: Tensor) -> Tensor:
        return logits_behind(self._model.model, hidden)


def logits_behind(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits as the model's own forward makes them: float32 of shape (n, V).

    Args:
        model: A transformers model with an output embedding, which is in memory.
        hidden: Hidden states behind the last norm, shape (n, D).

    Raises:
        ValueError: The model has no output embedding.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding")
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    logits: Tensor = head(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if math.isfinite(loss) and loss < 700 else None
