"""Every family is pruned as its own full forward says, in memory and streamed from its checkpoint."""

import pytest
import torch
from torch import Tensor, nn

from lvlm_prune import prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.checkpoints.versions import VERSION_5
from lvlm_prune.errors import InputError
from lvlm_prune.methods.pools import AsymmetricPool, MixedPool
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.full_forward import prune_by_full_forwards

TEXT_ONLY_REFUSED = {"paligemma"}


def calibration(family: str, model: nn.Module) -> list[dict[str, Tensor]]:
    samples = [Sample(3, 0, 5), Sample(2, 1, 9), Sample(6, 2, 2)]
    if family not in TEXT_ONLY_REFUSED:
        samples.append(Sample(4, None, 6))
    return [make_inputs(family, model, [sample]) for sample in samples]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_full_forward(family: str, tmp_path):
    model, reference = tiny_model(family), tiny_model(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    batches = calibration(family, model)
    expected = prune_by_full_forwards(reference, batches)
    method = BlockwisePruning(sparsity=0.5, pool=MixedPool(), experts="keep")
    manifest = prune(model, batches, method)
    assert set(expected) == {name for name, entry in manifest["linears"].items() if "note" not in entry}
    different = sum(int(((model.get_submodule(name).weight == 0) != mask).sum()) for name, mask in expected.items())
    total = sum(mask.numel() for mask in expected.values())
    assert different <= max(2, 1e-4 * total)

    method = BlockwisePruning(sparsity=0.5, pool=MixedPool(), experts="keep")
    streamed = prune(tmp_path / "dense", batches, method, tmp_path / "pruned", report=False)
    assert streamed["verified"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    reloaded, report = type(model).from_pretrained(tmp_path / "pruned", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reloaded.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_calibration_runs_in_every_family(family: str):
    """The block's output, in whatever form it comes, is told apart by modality; audio can count as visual."""
    model = tiny_model(family)
    visual = ["image", "video", "audio"]
    experts = "prune" if VERSION_5 else "keep"
    method = BlockwisePruning(pool=AsymmetricPool(alpha=1e4), visual=visual, experts=experts)
    manifest = prune(model, calibration(family, model), method)
    assert all(0 < block["mean_drift"] <= 2 for block in manifest["blocks"])
    if family not in TEXT_ONLY_REFUSED:
        assert all(block["visual_tokens"][-1] == 0 for block in manifest["blocks"] if len(block["visual_tokens"]) == 4)
    assert any(count > 0 for block in manifest["blocks"] for count in block["visual_tokens"])


@pytest.mark.skipif(VERSION_5, reason="transformers 5 keeps experts in stacks, which are pruned")
def test_transformers_4_does_not_prune_routed_experts():
    model = tiny_model("qwen3_omni_moe")
    with pytest.raises(InputError, match="use keep, or transformers 5"):
        prune(model, calibration("qwen3_omni_moe", model), BlockwisePruning(experts="prune"))
