"""Pools and saliencies in whole runs: processes, batches, attention implementations, modalities, what they cost."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.errors import RunError
from lvlm_prune.methods.pools import (
    AMIAPool,
    AsymmetricPool,
    AttendedPool,
    ContributionPool,
    MixedPool,
    Pool,
    RandomTokensPool,
)
from lvlm_prune.methods.saliency import AttentionSaliency, DiversitySaliency
from lvlm_prune.methods.tokens import Selection
from tests.conftest import GOLDEN, MODEL, REPOSITORY
from tests.families import Sample, make_inputs, tiny_model

RECIPES = ["amia", "attended", "mllm_pruner", "atv_attention", "atv_diversity", "random_tokens", "atv_text_retention"]
POOLS = {
    "amia": AMIAPool,
    "attended": AttendedPool,
    "random": lambda: RandomTokensPool(k=6),
    "contribution": ContributionPool,
    "attention": lambda: AsymmetricPool(AttentionSaliency(), match_total="drift"),
    "diversity": lambda: AsymmetricPool(DiversitySaliency(), match_total="drift"),
    "fixed": lambda: AsymmetricPool(k=3, text_retention=0.8),
}


def recipe_arguments(recipe):
    return [f"--config={REPOSITORY / 'configs' / 'prune' / f'{recipe}.yaml'}", "--pruning.record=true"]


def golden_model(**options):
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, **options)


def pruned_golden(pool, **options):
    model = golden_model(**options)
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    manifest = lvlm_prune.prune(model, source, BlockwisePruning(sparsity=0.5, pool=pool))
    return dict(model.named_parameters()), manifest


def share_of_different_masks(one, other):
    different = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    return different / sum(value.numel() for value in one.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_nothing(recipe, golden_arguments, tmp_path):
    for size in (1, 3):
        arguments = [*recipe_arguments(recipe), f"--data.batch_size={size}", "--data.num_samples=5"]
        arguments.append(f"--output={tmp_path / str(size)}")
        assert main([*golden_arguments, *arguments]) == 0
    one, three = (load_file(tmp_path / size / "statistics.safetensors") for size in ("1", "3"))
    assert one.keys() == three.keys()
    selections = [key for key in one if "sel." in key]
    assert selections or recipe in ("attended", "mllm_pruner", "random_tokens")
    for key, value in one.items():
        if key in selections:
            assert torch.equal(value, three[key]), key
        elif not key.startswith("image_mask."):
            torch.testing.assert_close(three[key], value, rtol=1e-4, atol=1e-6)


class OnesPool(Pool):
    """Weight one for every token, in one of the forms that a pool may answer in."""

    def __init__(self, form):
        self.form, self.per_linear = form, form == "per linear"
        self.needs = frozenset({"outputs"} if self.per_linear else ())
        self.counts = []

    def select(self, tokens, linear=None):
        ones = torch.ones(len(tokens.visual))
        if self.form != "candidates":
            return Selection(ones)
        self.counts.append(len(ones))
        return Selection(torch.zeros_like(ones), torch.arange(len(ones)))

    def cutoffs(self, sum_over_processes):
        counts, self.counts = self.counts, []
        return counts


@pytest.mark.parametrize(
    "pool",
    [
        OnesPool("weights"),
        OnesPool("candidates"),
        OnesPool("per linear"),
        RandomTokensPool(k=10_000),
        AsymmetricPool(k=10_000),
        AsymmetricPool(alpha=1e6),
    ],
    ids=["weights", "candidates", "per linear", "random of all", "asymmetric with all", "asymmetric, endless alpha"],
)
def test_a_pool_in_which_every_token_weighs_one_is_the_mixed_pool(pool):
    mixed, _ = pruned_golden(MixedPool())
    found, _ = pruned_golden(pool)
    assert share_of_different_masks(mixed, found) == 0


@pytest.mark.parametrize("name", ["amia", "attended", "contribution", "attention"])
def test_eager_attention_gives_the_masks_of_sdpa(name):
    fused, _ = pruned_golden(POOLS[name](), attn_implementation="sdpa")
    eager, _ = pruned_golden(POOLS[name](), attn_implementation="eager")
    assert share_of_different_masks(fused, eager) <= 1e-4


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("family", ["llava_next_mistral_window", "qwen2_audio"])
def test_images_and_sounds_and_samples_without(name, family):
    model = tiny_model(family)
    samples = [Sample(before=3, image=0, after=9), Sample(before=8, image=None, after=9), Sample(2, 1, 5)]
    inputs = [make_inputs(family, model, [sample]) for sample in samples]
    pruning = BlockwisePruning(pool=POOLS[name](), visual=["image", "audio"])
    manifest = lvlm_prune.prune(model, inputs, pruning)
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", POOLS)
def test_text_only_calibration(name):
    model = tiny_model("llava")
    inputs = [make_inputs("llava", model, [Sample(before=12, image=None, after=9)])]
    manifest = lvlm_prune.prune(model, inputs, BlockwisePruning(pool=POOLS[name]()))
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)


def test_cross_attention_is_one_clear_line_that_names_block_and_pool():
    model = tiny_model("mllama")
    inputs = [make_inputs("mllama", model, [Sample(before=3, image=0, after=9)])]
    with pytest.raises(RunError, match=r"AMIAPool needs the attention of block \d, which attends to other things"):
        lvlm_prune.prune(model, inputs, BlockwisePruning(pool=AMIAPool()))


def test_the_manifest_shows_both_totals_and_the_mean_budget():
    _, manifest = pruned_golden(AsymmetricPool(AttentionSaliency(), alpha=4.0, match_total="drift"))
    findings = manifest["survey"]["pool"]
    assert findings["visual_tokens"] == pytest.approx(findings["visual_tokens_of_drift"], abs=2)
    budgets = [count for block in manifest["blocks"] for count in block["visual_tokens"]]
    assert manifest["mean_visual_tokens"] == pytest.approx(sum(budgets) / 16)
    assert sum(budgets) > 0


def test_attention_is_read_only_for_pools_that_need_it(monkeypatch):
    def refuse(calls):
        raise AssertionError("nobody needs attention")

    monkeypatch.setattr("lvlm_prune.loop.activations.recorded_attention", refuse)
    for pool in (AsymmetricPool(), MixedPool(), AsymmetricPool(DiversitySaliency(), k=2), RandomTokensPool()):
        pruned_golden(pool)
    with pytest.raises(AssertionError):
        pruned_golden(AttendedPool())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["ContributionPool", "--pruning.pool.beta=1.5"], "error: --pruning.pool.beta 1.5: must lie between 0 and 1"),
        (["AsymmetricPool", "--pruning.pool.k=-2"], "error: --pruning.pool.k -2: must be 0 or larger"),
        (
            ["AsymmetricPool", "--pruning.pool.text_retention=7"],
            "error: --pruning.pool.text_retention 7: must lie between 0 and 1",
        ),
    ],
)
def test_bad_options_are_one_line(arguments, error, golden_arguments, tmp_path, capsys):
    pool = [f"--pruning.pool={arguments[0]}", *arguments[1:]]
    assert main([*golden_arguments, *pool, f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == error
