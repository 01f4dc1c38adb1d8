"""`check_plugin` passes every plugin of the project."""

import pytest

from lvlm_prune.methods import Allocation, Pattern, Pool, Saliency, Scorer, Statistic
from lvlm_prune.methods.allocation import (
    CustomAllocation,
    DASAllocation,
    ECoFLaPAllocation,
    KLAllocation,
    OWLAllocation,
    UniformAllocation,
)
from lvlm_prune.methods.paired_statistics import ByModality, CrossGram
from lvlm_prune.methods.patterns import SemiStructured, SemiStructuredChoice, Unstructured
from lvlm_prune.methods.pools import (
    AMIAPool,
    AsymmetricPool,
    AttendedPool,
    ContributionPool,
    EarlyVisualPool,
    MixedPool,
    RandomTokensPool,
    TextOnlyPool,
    VisualOnlyPool,
)
from lvlm_prune.methods.saliency import AttentionSaliency, DiversitySaliency, DriftSaliency, RandomSaliency
from lvlm_prune.methods.scorers import MagnitudeScorer, MaskSolver, RIAScorer, SparseGPTScorer, WandaScorer
from lvlm_prune.methods.solvers import (
    ALPSSolver,
    DenseTargetSolver,
    RefitSolver,
    Solver,
    SparseGPTSolver,
    SparseSwapsSolver,
    VisualWeightSolver,
)
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from lvlm_prune.methods.testing import check_plugin

PLUGINS = [
    DriftSaliency(),
    AttentionSaliency(),
    DiversitySaliency(),
    DiversitySaliency("nearest"),
    RandomSaliency(seed=3),
    MixedPool(),
    TextOnlyPool(),
    VisualOnlyPool(),
    AMIAPool(),
    AMIAPool("positive", "paper"),
    AsymmetricPool(),
    AsymmetricPool(RandomSaliency(), alpha=0.5, rounding="released"),
    AsymmetricPool(DiversitySaliency(), k=3, text_retention=0.5),
    AsymmetricPool(AttentionSaliency(), match_total="drift"),
    AttendedPool(),
    ContributionPool(),
    ContributionPool(beta=1.0),
    RandomTokensPool(k=4),
    EarlyVisualPool(),
    MagnitudeScorer(),
    MagnitudeScorer("layer"),
    WandaScorer(),
    WandaScorer(variant=True),
    RIAScorer(),
    RIAScorer(group="layer"),
    SparseGPTScorer(),
    SparseGPTScorer(block_size=8),
    MaskSolver(WandaScorer()),
    SparseGPTSolver(),
    ALPSSolver(),
    ALPSSolver(schedule="paper"),
    RefitSolver(),
    RefitSolver(SparseGPTSolver()),
    SparseGPTSolver(keep_zeros=True),
    ALPSSolver(keep_zeros=True),
    RefitSolver(keep_zeros=True),
    SparseSwapsSolver(),
    SparseSwapsSolver(rounds=2, candidates=1),
    RefitSolver(SparseSwapsSolver()),
    DenseTargetSolver(),
    DenseTargetSolver(ALPSSolver(), share=0.5),
    VisualWeightSolver(),
    VisualWeightSolver(DenseTargetSolver(SparseGPTSolver()), visual_weight=0.5),
    ChannelNorm,
    Gram,
    CrossGram,
    ByModality,
    UniformAllocation(),
    DASAllocation(),
    DASAllocation("per_block", aggregate="avg"),
    OWLAllocation(),
    ECoFLaPAllocation(),
    KLAllocation(),
    KLAllocation(groups="kind", levels=[0.4, 0.7]),
    CustomAllocation({"*.q_proj": 0.4}),
    Unstructured(),
    SemiStructured(2, 4),
    SemiStructuredChoice([SemiStructured(2, 4), SemiStructured(1, 4)]),
]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: getattr(plugin, "__name__", type(plugin).__name__))
def test_every_plugin_keeps_its_contract(plugin):
    check_plugin(plugin)


def test_no_plugin_of_the_project_is_left_out():
    import lvlm_prune.methods.allocation as allocation
    import lvlm_prune.methods.paired_statistics as paired
    import lvlm_prune.methods.patterns as patterns
    import lvlm_prune.methods.pools as pools
    import lvlm_prune.methods.saliency as saliency
    import lvlm_prune.methods.scorers as scorers
    import lvlm_prune.methods.solvers as solvers
    import lvlm_prune.methods.statistics as statistics

    kinds = (Allocation, Pattern, Pool, Saliency, Scorer, Solver, Statistic)
    there = {
        value
        for module in (allocation, paired, patterns, pools, saliency, scorers, solvers, statistics)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kinds) and value not in kinds
    }
    assert there == {plugin if isinstance(plugin, type) else type(plugin) for plugin in PLUGINS}


@pytest.mark.parametrize("kind", [CrossGram, ChannelNorm])
def test_any_sum_can_be_kept_by_modality(kind):
    check_plugin(ByModality.of(kind))
