"""The modality probe: what text and visual tokens ask of the dense model (arXiv 2603.16001, section 3.2 and Fig. 1).

on_survey_batch_end   statistics of text and of visual tokens, drift, diversity of outputs, block inputs for the map
on_survey_block_end   a mask from each modality alone, and how much the two overlap
on_survey_end         the map in two dimensions; everything into trainer.run.record
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lvlm_prune.blocks.remaining import RemainingDecoderBlocks
from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.loop import Block
from lvlm_prune.loop.activations import Activations
from lvlm_prune.methods.diversity import modality_diversity
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.pools import TextOnlyPool, VisualOnlyPool
from lvlm_prune.methods.pools.contribution import scaled_to_one, singular_contributions
from lvlm_prune.methods.scorers import Scorer, WandaScorer
from lvlm_prune.methods.tokens import Tokens
from lvlm_prune.plugins import lazy_default, mounted, own_instance
from lvlm_prune.pruning.calibration import BlockCalibration
from lvlm_prune.pruning.faults import faults_end_the_run, refuse_faulty
from lvlm_prune.pruning.options import outside_of_shares, refuse_modalities

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.run import RunTrainer

_RANKS = 101
"""Points of a contribution curve: from the token that contributes most to the one that does least, in percent."""


class ModalityProbe(PruneCallback):
    """Says what `lvlm-prune probe` looks at, and looks at the dense model.

    Args:
        pathways: Whose tokens go through pruned weights: `text`, `visual`.
        pools: Which tokens calibrate: `text`, `visual`, `mixed`.
        sparsities: Share of each weight that goes, strictly between 0 and 1.
        scorer: How important a weight is.
        visual: Modalities that count as visual in pools.
        map_tokens: Tokens of each modality on the map, at each of three blocks; 0 draws no map.
        curve_samples: Samples of each data set whose attention is decomposed for the contribution curves, at the middle
            block; 0 draws none.
        images: Pictures of the embedded benchmark that score each cell.
        texts: Its questions without a picture.

    Raises:
        InputError: A value is out of range, or there is nothing to do.
    """

    wants_survey = True

    def __init__(
        self,
        pathways: list[Literal["text", "visual"]] = ["text", "visual"],  # noqa: B006
        pools: list[Literal["text", "visual", "mixed"]] = ["text", "visual", "mixed"],  # noqa: B006
        sparsities: list[float] = [0.5, 0.6],  # noqa: B006
        scorer: Scorer = lazy_default(WandaScorer),
        visual: list[str] = ["image", "video"],  # noqa: B006
        map_tokens: int = 300,
        curve_samples: int = 8,
        images: int = 150,
        texts: int = 400,
    ) -> None:
        for option, values, known in (
            ("pathways", pathways, ("text", "visual")),
            ("pools", pools, ("text", "visual", "mixed")),
        ):
            for value in values:
                if value not in known:
                    raise InputError(f"probing.{option}", value, f"must be one of {', '.join(known)}")
        for sparsity in sparsities:
            if not 0 < sparsity < 1:
                raise InputError("probing.sparsities", sparsity, outside_of_shares(sparsity))
        if not sparsities:
            raise InputError("probing.sparsities", "[]", "needs at least one sparsity")
        counts = {"map_tokens": map_tokens, "curve_samples": curve_samples, "images": images, "texts": texts}
        for option, number in counts.items():
            if number < 0:
                raise InputError(f"probing.{option}", number, "must not be negative")
        if images + texts == 0:
            raise InputError("probing.images", images, "with --probing.texts 0 leaves no question")
        refuse_modalities(visual, "probing.visual")
        scorer = own_instance(scorer)
        with mounted(probing=self):
            refuse_faulty(scorer=scorer)
        if scorer.statistic is None:
            raise InputError(
                "probing.scorer", type(scorer).__name__, "uses no calibration tokens, so pools do not matter"
            )
        self.scorer, self.visual = scorer, list(visual)
        with mounted(probing=self):
            scorer.check(Unstructured())
        self.pathways, self.pools, self.sparsities = list(pathways), list(pools), list(sparsities)
        self.map_tokens, self.curve_samples, self.images, self.texts = map_tokens, curve_samples, images, texts
        self.survey_needs = frozenset({"outputs"}) | ({"attention_map"} if curve_samples else frozenset())
        self.targets: dict[str, str] = {}
        """Full name of each Linear that the probe splits -> itself; the run fills it."""
        self.set_of_sample: dict[int, str] = {}
        """Number of each calibration sample -> name of its data set; the run fills it."""

    def on_survey_start(self, trainer: RunTrainer, pl_module: LVLMModule) -> None:
        """Choose the blocks of the map and of the curves.

        Raises:
            InputError: No sample has visual tokens, or none has text.
        """
        tokens = trainer.run.record["calibration"]["tokens"]
        if not any(tokens.get(name) for name in self.visual) or not tokens.get("text"):
            source = trainer.run.record["calibration"]["source"]["class_path"]
            raise InputError("data.source", source, "the probe compares text and visual tokens; there is only one kind")
        last = len(pl_module.runner) - 1
        self._map_blocks = sorted({0, (last + 1) // 2, last}) if self.map_tokens else []
        self._curve_block = (last + 1) // 2
        samples = trainer.run.record["calibration"]["num_samples"]
        self._per_sample = -(-self.map_tokens // samples)
        by_set: dict[str, list[int]] = defaultdict(list)
        for sample in sorted(self.set_of_sample):
            by_set[self.set_of_sample[sample]].append(sample)
        self._curve_of = {sample: name for name, members in by_set.items() for sample in members[: self.curve_samples]}
        self._vectors: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self._problem = ""
        self._found_blocks: list[dict[str, Any]] = []
        self._found_linears: dict[str, dict[str, Any]] = {}

    def on_survey_block_start(
        self, trainer: RunTrainer, pl_module: LVLMModule, block: Block, tail: RemainingDecoderBlocks
    ) -> None:
        """Begin the sums of text and visual tokens over a block anew."""
        targets = {name: full_name for name in block.linears if (full_name := f"{block.name}.{name}") in self.targets}
        statistic = self.scorer.statistic
        assert statistic is not None
        self._calibrations = {
            name: BlockCalibration(block.index, targets, pool, statistic, record=False)
            for name, pool in (("text", TextOnlyPool()), ("visual", VisualOnlyPool()))
        }
        self._drift: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._diversity: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))

    @faults_end_the_run()
    def on_survey_batch_end(
        self, trainer: RunTrainer, pl_module: LVLMModule, block: Block, sample: Activations
    ) -> None:
        """Add the tokens of one sample to the sums of the block, each modality by itself."""
        tokens = sample.tokens(self.visual, {"outputs"}, asked_by="the probe")
        for calibration in self._calibrations.values():
            calibration.add(sample, tokens)
        moved = 1 - cosine_similarity(tokens.hidden_in.float(), tokens.hidden_out.float(), dim=-1)
        for name, which in (("text", tokens.text), ("visual", tokens.visual)):
            _add(self._drift[name], moved[which].double().sum().item(), int(which.sum()))
        for name, outputs in tokens.outputs.items():
            if len(outputs) == len(tokens.modality):
                score, terms = modality_diversity(outputs, tokens.modality)
                for term, value in (terms | {"score": score}).items():
                    _add(self._diversity[name][term], value, 1)
        if block.index in self._map_blocks:
            self._take_for_map(tokens, block.index)
        if block.index == self._curve_block and tokens.sample in self._curve_of:
            self._take_for_curves(sample, tokens.sample)

    def _take_for_map(self, tokens: Tokens, block: int) -> None:
        for name, which in (("text", tokens.text), ("visual", tokens.visual)):
            places = which.nonzero().flatten()
            if len(places):
                even = torch.linspace(0, len(places) - 1, min(self._per_sample, len(places)), device=places.device)
                self._vectors[block, name].append(tokens.hidden_in[places[even.long()]].float().cpu())

    def _take_for_curves(self, sample: Activations, number: int) -> None:
        try:
            attention = sample.tokens(self.visual, {"attention_map"}, asked_by="the probe").attention_map
        except RunError as error:
            self._problem = str(error)
            return
        assert attention is not None
        received = scaled_to_one(attention.double().mean(0))
        singular = scaled_to_one(singular_contributions(attention))
        self._curves[self._curve_of[number]].append((_by_rank(received), _by_rank(singular)))

    @faults_end_the_run()
    def on_survey_block_end(self, trainer: RunTrainer, pl_module: LVLMModule, block: Block) -> None:
        """Sum over processes, make both masks, compare them."""
        devices = {name: linear.weight.device for name, linear in block.linears.items()}
        for calibration in self._calibrations.values():
            calibration.finish(trainer.run.processes, devices)
        for name, linear in block.linears.items():
            full_name = f"{block.name}.{name}"
            if full_name not in self.targets:
                continue
            of_text, of_visual = (self._calibrations[kind].statistic_of(name) for kind in ("text", "visual"))
            if of_text is None or of_visual is None:
                continue
            overlap = {}
            for sparsity in self.sparsities:
                one, other = (
                    self.scorer.prune(linear.weight, statistic, sparsity, Unstructured())[1]
                    for statistic in (of_text, of_visual)
                )
                overlap[f"{sparsity:g}"] = ((one & other).sum() / (one | other).sum()).item()
            self._found_linears[full_name] = {"block": block.index, "iou": overlap}
        self._found_blocks.append({"index": block.index, "name": block.name} | self._summed(trainer))

    def _summed(self, trainer: RunTrainer) -> dict[str, Any]:
        drift: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        diversity: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        parts = trainer.run.processes.gather(
            (dict(self._drift), {name: dict(terms) for name, terms in self._diversity.items()})
        )
        for drifts, diversities in parts:
            for name, pair in drifts.items():
                _add(drift[name], *pair)
            for name, terms in diversities.items():
                for term, pair in terms.items():
                    _add(diversity[name][term], *pair)
        return {
            "drift": {name: total / count for name, (total, count) in drift.items() if count},
            "diversity": {
                name: {term: total / count for term, (total, count) in terms.items()}
                for name, terms in diversity.items()
            },
        }

    def on_survey_end(self, trainer: RunTrainer, pl_module: LVLMModule) -> None:
        """Everything found, into the manifest; the map is computed by the main process."""
        vectors: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        curves: dict[str, list] = defaultdict(list)
        for own_vectors, own_curves in trainer.run.processes.gather((dict(self._vectors), dict(self._curves))):
            for key, rows in own_vectors.items():
                vectors[key] += rows
            for name, pairs in own_curves.items():
                curves[name] += pairs
        manifest = trainer.run.record
        manifest["blocks"], manifest["linears"] = self._found_blocks, self._found_linears
        manifest["map"] = (
            {
                str(block): token_map({kind: torch.cat(vectors[block, kind]) for kind in ("text", "visual")})
                for block in self._map_blocks
            }
            if trainer.run.processes.is_main
            else {}
        )
        manifest["contributions"] = {
            "block": self._curve_block,
            "sets": {
                name: {
                    "samples": len(pairs),
                    "received": np.mean([received for received, _ in pairs], axis=0).round(5).tolist(),
                    "singular": np.mean([singular for _, singular in pairs], axis=0).round(5).tolist(),
                }
                for name, pairs in curves.items()
            },
        } | ({"problem": self._problem} if self._problem else {})


def token_map(vectors: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """Block inputs in two dimensions by t-SNE, the same for the same vectors.

    Args:
        vectors: Modality -> float32 of shape (n, D).

    Returns:
        Modality -> places, two numbers each.
    """
    from sklearn.manifold import TSNE

    together = torch.cat(list(vectors.values())).numpy()
    perplexity = min(30.0, (len(together) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(together)
    ends = np.cumsum([len(part) for part in vectors.values()])[:-1]
    return {name: part.round(3).astype(float).tolist() for name, part in zip(vectors, np.split(places, ends))}


def _by_rank(values: Tensor) -> np.ndarray:
    """Values from the largest to the smallest, at 101 evenly spaced ranks."""
    ordered = values.sort(descending=True).values.cpu().numpy()
    return np.interp(np.linspace(0, 1, _RANKS), np.linspace(0, 1, len(ordered)), ordered)


def _add(pair: list[float], total: float, count: float) -> None:
    pair[0] += total
    pair[1] += count
