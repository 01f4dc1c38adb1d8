"""Routed experts are pruned one by one, from the tokens that were sent to each."""

import fnmatch
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.families.tiny_config import tiny_model
from benchmarks.families.visual_inputs import image_samples, text_samples
from lvlm_prune import prune
from lvlm_prune.api import InputsSource
from lvlm_prune.blocks import find_expert_stacks
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule
from lvlm_prune.errors import InputError
from lvlm_prune.methods.allocation import DASAllocation
from lvlm_prune.methods.pools import AMIAPool, AsymmetricPool, MixedPool
from lvlm_prune.methods.scorers import MagnitudeScorer, SparseGPTScorer
from lvlm_prune.methods.statistics import Gram
from tests.full_forward import compute_experts_one_by_one, prune_by_full_forwards, tensors_of, zeros

# Stacks as (experts, out, in); as (experts, in, out); in copies of all tokens; without a gate; one for each modality.
KINDS = ["qwen3_vl_moe", "aria", "llama4", "nemotron_h_omni", "ernie4_5_vl_moe"]


def calibration(model: nn.Module) -> list[dict[str, Tensor]]:
    return [*image_samples(model), *text_samples(2)]


def method(**options) -> BlockwisePruning:
    return BlockwisePruning(**{"sparsity": 0.5, "pool": MixedPool(), "min_expert_tokens": 1, **options})


@pytest.mark.parametrize("family", KINDS)
def test_masks_are_those_of_the_full_forward(family: str, tmp_path):
    model, reference = (compute_experts_one_by_one(tiny_model(family)) for _ in range(2))
    model.save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    batches = calibration(model)
    expected = prune_by_full_forwards(reference, batches, experts=True)
    manifest = prune(model, batches, method())
    entries = manifest["linears"]
    rare = {name for name, entry in entries.items() if entry.get("scored_by") == "magnitude"}
    assert set(expected) == {name for name, entry in entries.items() if "note" not in entry} - rare
    assert sum(".experts." in name for name in expected) >= 8
    different = sum(int((zeros(model, name) != mask).sum()) for name, mask in expected.items())
    assert different <= max(4, 1e-4 * sum(mask.numel() for mask in expected.values()))
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)

    streamed = prune(tmp_path / "dense", batches, method(), tmp_path / "pruned", report=False)
    assert streamed["verified"]["sparsity"] == pytest.approx(manifest["sparsity"]["achieved"])
    reloaded = compute_experts_one_by_one(type(model).from_pretrained(tmp_path / "pruned"))
    wrong = sum(int((reloaded.state_dict()[name] != weight).sum()) for name, weight in model.state_dict().items())
    # Streamed blocks compute their experts in groups, whose sums round otherwise.
    assert wrong <= max(4, 1e-3 * sum(mask.numel() for mask in expected.values()))


def test_keep_leaves_the_experts_as_they_are():
    model, reference = tiny_model("qwen3_vl_moe"), tiny_model("qwen3_vl_moe")
    manifest = prune(model, calibration(model), method(experts="keep"))
    assert not any(".experts." in name for name in manifest["linears"])
    before = dict(reference.named_parameters())
    stacks = [name for name in before if ".experts." in name]
    assert stacks
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in stacks)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_padding_counts_for_no_expert(family: str):
    """The masks of a padded batch are those of its samples one by one."""
    alone, together = (compute_experts_one_by_one(tiny_model(family)) for _ in range(2))
    samples = image_samples(alone)[:1] * 2
    longer = {
        name: torch.cat([value, value[:, -1:].repeat(1, 4)], dim=1)
        if value.shape[:2] == samples[0]["input_ids"].shape
        else value
        for name, value in samples[1].items()
    }
    singles = [samples[0], longer]
    first = prune(alone, singles, method())
    second = prune(together, CalibrationDataModule(InputsSource(singles), batch_size=2), method())
    assert first["linears"].keys() == second["linears"].keys()
    different = sum(int((zeros(alone, name) != zeros(together, name)).sum()) for name in first["linears"])
    assert different <= 4


def test_candidates_count_for_the_experts_that_they_were_sent_to():
    """A budget as large as can be takes every visual token: the masks are those of the mixed pool."""
    mixed, asymmetric = tiny_model("qwen3_vl_moe"), tiny_model("qwen3_vl_moe")
    batches = calibration(mixed)
    names = prune(mixed, batches, method())["linears"]
    prune(asymmetric, batches, method(pool=AsymmetricPool(alpha=1e4)))
    assert sum(int((zeros(mixed, name) != zeros(asymmetric, name)).sum()) for name in names) <= 4


def test_an_expert_that_saw_too_few_tokens_is_named_and_pruned_by_magnitude():
    model, by_magnitude = tiny_model("qwen3_vl_moe"), tiny_model("qwen3_vl_moe")
    batches = calibration(model)
    manifest = prune(model, batches, method(min_expert_tokens=10**6))
    prune(by_magnitude, batches, method(scorer=MagnitudeScorer()))
    rare = {name: entry for name, entry in manifest["linears"].items() if ".experts." in name}
    assert rare
    assert all(torch.equal(zeros(model, name), zeros(by_magnitude, name)) for name in rare)
    assert all(entry["scored_by"] == "magnitude" and entry["routed_tokens"] < 10**6 for entry in rare.values())
    (warning,) = manifest["warnings"]
    assert f"{len(rare)} matrices of experts" in warning
    assert "pruned by magnitude" in warning


def test_an_expert_that_saw_too_few_tokens_can_stay_dense(tmp_path):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    options = method(min_expert_tokens=10**6, rare_experts="keep")
    manifest = prune(tmp_path / "dense", calibration(model), options, tmp_path / "pruned", report=False)
    kept = [name for name, entry in manifest["linears"].items() if ".experts." in name]
    assert all(manifest["linears"][name]["achieved"] == 0 for name in kept)
    assert "left dense" in manifest["warnings"][0]
    reloaded = type(model).from_pretrained(tmp_path / "pruned")
    stacks = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert all(torch.equal(model.get_parameter(name), reloaded.get_parameter(name)) for name in stacks)


@pytest.mark.parametrize(
    "options",
    [{"scorer": MagnitudeScorer()}, {"scorer": SparseGPTScorer()}, {"pattern": "2:4", "sparsity": None}],
    ids=["magnitude", "sparsegpt", "2:4"],
)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "aria"])
def test_other_scorers_and_patterns(family: str, options: dict, tmp_path):
    """The written checkpoint is verified against the promise of each, transposed stacks included."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    manifest = prune(tmp_path / "dense", calibration(model), method(**options), tmp_path / "pruned", report=False)
    experts = [entry for name, entry in manifest["linears"].items() if ".experts." in name]
    assert experts
    assert all(entry["achieved"] == pytest.approx(0.5, abs=0.03) for entry in experts)


@pytest.mark.parametrize("recovery", ["lora", "full"])
def test_recovery_trains_the_linears_and_leaves_pruned_experts_as_they_are(recovery: str, tmp_path):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", calibration(model), method(), tmp_path / "pruned", report=False)
    labelled = [sample | {"labels": sample["input_ids"].clone()} for sample in text_samples(3)]
    save_file(tensors_of(labelled), tmp_path / "labelled.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'labelled.safetensors'}"]
    options = ["--data.validation_samples=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    paths = [f"--model.path={tmp_path / 'pruned'}", f"--output={tmp_path / 'recovered'}"]
    assert main(["recover", f"--method={recovery}", *paths, *source, *options]) == 0
    before, after = CheckpointFolder(tmp_path / "pruned"), CheckpointFolder(tmp_path / "recovered")
    changed = {key for key in before if before.read_bytes(key) != after.read_bytes(key)}
    assert changed
    assert not any(".experts." in key for key in changed)
    assert all(torch.equal(before.read(key) == 0, after.read(key) == 0) for key in changed)


def test_a_plan_lists_the_stacks_as_they_are_on_disk(tmp_path, capsys):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    save_file(tensors_of(text_samples(1)), tmp_path / "calib.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'calib.safetensors'}"]
    assert (
        main(["prune", f"--model.path={tmp_path / 'dense'}", *source, "--pruning.pool=MixedPool", "--plan=true"]) == 0
    )
    printed = capsys.readouterr().out
    folder = CheckpointFolder(tmp_path / "dense")
    stacks = [key for key in folder if ".experts." in key]
    assert stacks
    for key in stacks:
        kind = re.sub(r"\.\d+\.", ".*.", key)
        count = len(fnmatch.filter(stacks, kind))
        shape = " +x +".join(map(str, folder[key].shape))
        assert re.search(rf"{re.escape(kind)} +{count} of +{shape} +50%", printed), key


@pytest.mark.slow
def test_experts_do_not_depend_on_the_number_of_processes(run_cli, tmp_path):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    save_file(tensors_of([*image_samples(model), *text_samples(2)]), tmp_path / "calib.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'calib.safetensors'}"]
    arguments = ["prune", f"--model.path={tmp_path / 'dense'}", *source, "--pruning.min_expert_tokens=4"]
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    for name, more in (("one", []), ("two", devices)):
        finished = run_cli(*arguments, *more, f"--output={tmp_path / name}")
        assert finished.returncode == 0, finished.stderr
    one, two = (CheckpointFolder(tmp_path / name) for name in ("one", "two"))
    assert all(one.read_bytes(key) == two.read_bytes(key) for key in one)


@pytest.mark.parametrize("options", [{"pool": AMIAPool()}, {"allocation": DASAllocation()}], ids=["pool", "allocation"])
def test_what_is_not_defined_for_experts_is_refused(options: dict):
    model = tiny_model("qwen3_vl_moe")
    with pytest.raises(InputError, match=r"--pruning.experts prune: .* is not defined for routed experts"):
        prune(model, calibration(model), method(**options))


def test_the_plan_counts_the_statistics_of_every_expert(tmp_path, capsys):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    save_file(tensors_of(calibration(model)), tmp_path / "dense" / "calib.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={tmp_path / 'dense' / 'calib.safetensors'}"]
    arguments = ["prune", f"--model.path={tmp_path / 'dense'}", *source, "--pruning.scorer=SparseGPTScorer"]
    arguments += ["--pruning.pool=MixedPool", "--plan=true", f"--output={tmp_path / 'out'}"]
    gathering = {}
    for experts in ("prune", "keep"):
        assert main([*arguments, f"--pruning.experts={experts}"]) == 0
        number, unit = re.search(r"gathering ([\d.]+) ([kM]B)", capsys.readouterr().out).groups()
        gathering[experts] = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    block = max(model.get_decoder().layers, key=lambda layer: len(list(find_expert_stacks(layer))))
    channels = [matrix.in_features for stack in find_expert_stacks(block) for matrix in stack.matrices()]
    assert gathering["prune"] - gathering["keep"] == pytest.approx(
        sum(Gram.nbytes(count) for count in channels), rel=0.1
    )
