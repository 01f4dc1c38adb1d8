"""Explicit weights of the sets in a mixture: S = sum_d alpha_d S_d (MLLM-Pruner, Eq. 11)."""

from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import MixtureSource, TensorSource
from lvlm_prune.methods.pools import AMIAPool, AsymmetricPool, ContributionPool, MixedPool
from lvlm_prune.methods.scorers import Scorer, WandaScorer
from lvlm_prune.methods.statistics import ChannelNorm, Gram
from tests.conftest import GOLDEN, MODEL

SIZES = (6, 2)
ALPHAS = (0.3, 0.7)
POOLS = {
    "mixed": MixedPool,
    "candidates": lambda: AsymmetricPool(k=3),
    "weights": ContributionPool,
    "per linear": AMIAPool,
}


@pytest.fixture
def sets(tmp_path):
    """The 8 reference samples as two sets of unequal size."""
    tensors = load_file(GOLDEN / "calib.safetensors")
    sources = []
    for name, (start, end) in zip(("one", "other"), pairwise((0, 6, 8))):
        part = {
            f"s{number - start}.{key.split('.', 1)[1]}": value
            for key, value in tensors.items()
            if start <= (number := int(key.split(".")[0][1:])) < end
        }
        save_file(part, tmp_path / f"{name}.safetensors")
        sources.append(TensorSource(str(tmp_path / f"{name}.safetensors")))
    assert tuple(len(source) for source in sources) == SIZES
    return sources


class Spy(Scorer):
    """Keeps the statistics of the first block, whose input no pruning has changed."""

    def __init__(self, statistic):
        self.statistic, self.seen = statistic, []

    def score(self, weight, statistic):
        self.seen.append(statistic.value.clone())
        return weight.float().abs()


def statistics_of_block_0(source, pool, statistic):
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    spy = Spy(statistic)
    lvlm_prune.prune(model, source, BlockwisePruning(pool=pool, scorer=spy))
    # 7 Linears in each of 4 blocks; the small weight on which a scorer is tried comes before them.
    return spy.seen[-28:-21]


@pytest.mark.parametrize("statistic", [ChannelNorm, Gram])
@pytest.mark.parametrize("pool", POOLS)
def test_the_statistics_are_the_weighted_sum_of_the_means_of_the_sets(sets, pool, statistic):
    mixture = MixtureSource(sets, list(SIZES), weights=[10 * alpha for alpha in ALPHAS])
    weighted = statistics_of_block_0(mixture, POOLS[pool](), statistic)
    means = [
        [value / size for value in statistics_of_block_0(source, POOLS[pool](), statistic)]
        for source, size in zip(sets, SIZES)
    ]
    for found, one, other in zip(weighted, *means, strict=True):
        expected = ALPHAS[0] * one + ALPHAS[1] * other
        torch.testing.assert_close(found / sum(SIZES), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert not torch.allclose(found, SIZES[0] * one + SIZES[1] * other, rtol=1e-2)


def test_weights_by_share_change_nothing(sets):
    models = []
    for weights in (None, [3, 1]):
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        pruning = BlockwisePruning(scorer=WandaScorer(), sparsity=0.6)
        lvlm_prune.prune(model, MixtureSource(sets, list(SIZES), weights=weights), pruning)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(sets, run_cli, tmp_path):
    """The sets fall on the processes unevenly."""
    parts = [{"class_path": "lvlm_prune.data.TensorSource", "init_args": {"path": source.path}} for source in sets]
    mixture = {"sources": parts, "ratios": list(SIZES), "weights": list(ALPHAS)}
    data = {"num_samples": 7, "source": {"class_path": "lvlm_prune.data.MixtureSource", "init_args": mixture}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"path": str(MODEL)}, "data": data, "report": False}))
    assert main(["prune", f"--config={config}", f"--output={tmp_path / 'one'}"]) == 0
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    finished = run_cli("prune", f"--config={config}", *devices, f"--output={tmp_path / 'two'}")
    assert finished.returncode == 0, finished.stderr
    one, two = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two"))
    assert one == two
