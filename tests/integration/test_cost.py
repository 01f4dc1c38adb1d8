"""What each method does, counted and not timed: forwards, norms, Gram matrices, factorisations, sorts, waiting."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.blocks.attention import SampleAttention
from lvlm_prune.callbacks import BlockwisePruning, PruneCallback
from lvlm_prune.data import CalibrationDataModule, TensorSource
from lvlm_prune.methods.pools import AsymmetricPool
from lvlm_prune.methods.saliency import AttentionSaliency
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from tests.conftest import GOLDEN, REPOSITORY

SAMPLES, LINEARS, SITES = 5, 7, 4  # q/k/v share a site, gate/up share one

# The operations that could cost more than the two forwards that no method can avoid.
OPERATIONS = {
    "aten::sort": "sorts",
    "aten::argsort": "sorts",
    "aten::topk": "nearest neighbours",
    "aten::linalg_cholesky_ex": "factorisations",
    "aten::_linalg_eigh": "eigenvalues",
    "aten::_linalg_svd": "singular values",
}

# What makes a GPU wait until all is done that was asked of it.
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


class Counting(TorchDispatchMode, PruneCallback):
    """Counts what happens between the start of a block, or of the survey, and its end."""

    def __init__(self):
        super().__init__()
        self.counts, self.blocks, self.survey, self.longest_sort = Counter(), [], Counter(), 0
        self.waiting = [0]  # before the first block, at each block

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        what = OPERATIONS.get(function._schema.name)
        if what is not None:
            self.counts[what] += 1
        by_mask = function._schema.name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if function._schema.name in WAITING or by_mask:
            self.waiting[-1] += 1
        if what == "sorts":
            self.longest_sort = max(self.longest_sort, arguments[0].numel())
        return function(*arguments, **(keywords or {}))

    def on_survey_start(self, trainer, pl_module):
        self.counts = Counter()

    def on_survey_end(self, trainer, pl_module):
        self.survey = self.counts

    def on_block_start(self, trainer, pl_module, block):
        self.counts = Counter()
        self.waiting.append(0)

    def on_block_end(self, trainer, pl_module, block):
        self.blocks.append(self.counts)


@pytest.fixture
def count(monkeypatch):
    """Run a method on the golden model and count."""

    def run(pruning, samples=SAMPLES):
        model = AutoModelForImageTextToText.from_pretrained(GOLDEN / "model", dtype=torch.float32)
        counting = Counting()

        def counted(method, what):
            def call(*arguments, **keywords):
                counting.counts[what] += 1
                return method(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for owner, name, what in (
                (ChannelNorm, "add", "norms"),
                (Gram, "add", "Grams"),
                (SampleAttention, "_stripes", "attention"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name), what))
            for module in ("lvlm_prune.methods.allocation.das", "lvlm_prune.methods.pools.amia"):
                patch.setattr(
                    f"{module}.diversity_terms",
                    counted(lvlm_prune.methods.diversity.diversity_terms, "diversities"),
                )
            partition = counted(lvlm_prune.methods.patterns.kth_lowest, "partitions")
            for module in ("lvlm_prune.methods.patterns", "lvlm_prune.methods.solvers.sparsegpt"):
                patch.setattr(f"{module}.kth_lowest", partition)
            patch.setattr(
                "lvlm_prune.methods.pools.amia.inner_products",
                counted(lvlm_prune.methods.products.inner_products, "kernels"),
            )
            for layer in model.get_decoder().layers:
                layer.mlp.down_proj.register_forward_hook(lambda *_: counting.counts.update(["forwards"]))
            with counting:
                source = TensorSource(str(GOLDEN / "calib.safetensors"))
                data = CalibrationDataModule(source, num_samples=samples)
                manifest = lvlm_prune.prune(model, data, pruning, callbacks=[counting])
        return counting, manifest

    return run


TWO_FORWARDS = {"forwards": 2 * SAMPLES, "partitions": LINEARS}
EXPECTED = {
    "wanda": {"norms": SITES * SAMPLES},
    "atv": {"norms": SITES * SAMPLES, "sorts": SAMPLES},
    "atv_attention": {"norms": SITES * SAMPLES, "sorts": SAMPLES, "attention": SAMPLES},
    "atv_diversity": {"norms": SITES * SAMPLES},
    "atv_2of4": {"norms": SITES * SAMPLES, "sorts": SAMPLES, "partitions": 0},
    "ria": {"norms": SITES * SAMPLES},
    "owl": {"norms": SITES * SAMPLES},
    "das": {"norms": SITES * SAMPLES},
    "ecoflap": {"norms": SITES * SAMPLES},
    "magnitude": {"forwards": 0},
    # One partition per 128 columns, of which down_proj has more.
    "sparsegpt": {"Grams": SITES * SAMPLES, "factorisations": SITES, "partitions": LINEARS + 1},
    "amia": {
        "norms": LINEARS * SAMPLES,
        "kernels": LINEARS * SAMPLES,
        "nearest neighbours": LINEARS * SAMPLES,
        "diversities": LINEARS * SAMPLES,
        "attention": SAMPLES,
    },
    "atv_sparsegpt": {
        "Grams": SITES * SAMPLES,
        "sorts": SAMPLES,
        "factorisations": SITES,
        "partitions": LINEARS + 1,
    },
    "mllm_pruner": {"norms": SITES * SAMPLES, "eigenvalues": SAMPLES, "attention": SAMPLES},
}
EXPECTED["tamp"] = EXPECTED["amia"]
SURVEYS = {
    "atv_attention": {"forwards": SAMPLES, "attention": SAMPLES},
    "atv_diversity": {"forwards": SAMPLES},
    "owl": {"forwards": SAMPLES},
    "das": {"forwards": SAMPLES, "diversities": LINEARS * SAMPLES},
    "tamp": {"forwards": SAMPLES, "diversities": LINEARS * SAMPLES},
    # Each Linear is moved there and back, and the blocks from its own on run again: two and a half of four on average.
    "ecoflap": {"forwards": SAMPLES + 2 * LINEARS * SAMPLES * 5 // 2},
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_what_a_block_costs(recipe, count):
    pruning = lvlm_prune.load_pruning(REPOSITORY / "configs" / "prune" / f"{recipe}.yaml")
    counting, manifest = count(pruning)
    assert len(counting.blocks) == 4
    for index, found in enumerate(counting.blocks):
        expected = Counter(TWO_FORWARDS | EXPECTED[recipe])
        if index == 3:  # nothing comes after the last block that its outputs would be needed for
            expected["forwards"] -= SAMPLES if expected["forwards"] else 0
        budgets = manifest["blocks"][index].get("visual_tokens", [])
        expected["Grams" if "Grams" in expected else "norms"] += SITES * sum(budget > 0 for budget in budgets)
        assert found == +expected, f"block {index}"
    blocks = len(counting.blocks)
    surveyed = Counter({what: blocks * number for what, number in SURVEYS.get(recipe, {}).items()})
    forwards = surveyed["forwards"] + sum(found["forwards"] for found in counting.blocks)
    assert manifest.cost()["block_forwards"] == forwards
    if recipe == "ecoflap":  # two of the first block tell beforehand how long it will take, and are not counted
        surveyed["forwards"] += 2
    assert counting.survey == surveyed
    # A ranking of one sample's visual tokens, never one of weights.
    assert counting.longest_sort < 64


def test_matching_the_total_of_drift_surveys_no_more_samples_than_asked_for(count):
    pool = AsymmetricPool(AttentionSaliency(), match_total="drift", match_samples=3)
    counting, manifest = count(BlockwisePruning(pool=pool))
    assert counting.survey["forwards"] == counting.survey["attention"] == 3 * 4
    assert manifest["survey"]["block_forwards"] == 3 * 4
    for found in counting.blocks[:3]:
        assert found["forwards"] == 2 * SAMPLES


@pytest.mark.parametrize("recipe", ["wanda", "atv", "atv_attention", "atv_diversity", "atv_2of4", "mllm_pruner"])
def test_no_sample_is_waited_for(recipe, count):
    """A GPU would run out of work at each. What a block waits for does not depend on the number of samples.

    At the first block the kinds of their tokens are looked for, once for the whole run.
    """
    waiting = []
    for samples in (3, SAMPLES):
        pruning = lvlm_prune.load_pruning(REPOSITORY / "configs" / "prune" / f"{recipe}.yaml")
        counting, _ = count(pruning, samples)
        waiting.append(counting.waiting[2:])
    few, many = waiting
    assert few == many
    assert len(few) == 3
