"""The vision tower is a target of its own: pruned block by block as its own full forward says, before the decoder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lvlm_prune import prune
from lvlm_prune.blocks import TowerRunner, find_decoder, find_towers
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.module import LVLMModule
from lvlm_prune.report.pruning import summarise
from lvlm_prune.runs.compare.folders import ComparedFolder
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.full_forward import prune_by_full_forwards, prune_towers_by_full_forwards
from tests.pages import Page, refuse_other_numbers

# Where each family keeps its vision blocks, in the order in which they run.
TOWERS = {
    "llava": ["model.vision_tower.encoder.layers"],
    "llava_next_llama": ["model.vision_tower.encoder.layers"],
    "llava_onevision": ["model.vision_tower.encoder.layers"],
    "gemma3": ["model.vision_tower.encoder.layers"],
    "paligemma": ["model.vision_tower.encoder.layers"],
    "internvl": ["model.vision_tower.encoder.layer"],
    "idefics3": ["model.vision_model.encoder.layers"],
    "qwen2_vl": ["model.visual.blocks"],
    "qwen2_5_vl": ["model.visual.blocks"],
    "qwen3_vl": ["model.visual.blocks"],
    "mllama": ["model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"],
}
QUICK = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "mllama")
BOTH = "--model.targets=[language, vision]"


def samples_of(family: str, model: nn.Module) -> list[dict[str, Tensor]]:
    kinds = [Sample(3, 0, 5), Sample(2, 1, 9), Sample(6, 2, 2)]
    if family != "paligemma":
        kinds.append(Sample(4, None, 6))
    return [make_inputs(family, model, [kind]) for kind in kinds]


def write(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """A checkpoint folder with its calibration set; the arguments that prune it on all tokens."""
    model = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    samples = samples_of(family, model)
    tensors = {f"s{number}.{name}": value for number, one in enumerate(samples) for name, value in one.items()}
    save_file(tensors, folder / "calib.safetensors")
    source = ["--data.source=TensorSource", f"--data.source.path={folder / 'calib.safetensors'}"]
    return ["prune", f"--model.path={folder}", *source, "--pruning.pool=MixedPool", "--report=false"]


def same_bytes(one: Path, other: Path) -> bool:
    first, second = CheckpointFolder(one), CheckpointFolder(other)
    return all(first.same_bytes(key, second) for key in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_list_of_vision_blocks_is_found(family: str):
    model = tiny_model(family)
    found = [f"{name}" for tower in find_towers(model, find_decoder(model)) for name in tower.names]
    expected = [
        name for path in TOWERS.get(family, ()) for name, _ in model.named_modules() if name.rpartition(".")[0] == path
    ]
    assert found == expected if family in TOWERS else (family == "qwen2_audio") == (found == [])


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in TOWERS])
def test_masks_are_those_of_the_full_forward(family: str):
    """Tower and decoder, one after the other: the decoder is calibrated on what the pruned tower gives it."""
    model, reference = tiny_model(family), tiny_model(family)
    samples = samples_of(family, model)
    expected = prune_towers_by_full_forwards(reference, TOWERS[family], samples, 0.25)
    expected |= prune_by_full_forwards(reference, samples)
    method = BlockwisePruning(sparsity=0.5, vision_sparsity=0.25, pool=MixedPool())
    manifest = prune(model, samples, method, targets=["language", "vision"])
    done = {name for name, entry in manifest["linears"].items() if "note" not in entry}
    assert done == set(expected)
    different = sum(int(((model.get_submodule(name).weight == 0) != mask).sum()) for name, mask in expected.items())
    assert different <= max(2, 1e-4 * sum(mask.numel() for mask in expected.values()))
    assert manifest["sparsity"]["parts"]["vision"]["achieved"] == pytest.approx(0.25, abs=0.03)
    assert manifest["sparsity"]["parts"]["language"]["achieved"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_vl"])
def test_a_streamed_checkpoint_is_the_model_in_memory(family: str, tmp_path: Path):
    arguments = write(tmp_path / "dense", family)
    assert main([*arguments, BOTH, "--pruning.vision_sparsity=0.25", f"--output={tmp_path / 'out'}"]) == 0
    model = tiny_model(family)
    method = BlockwisePruning(sparsity=0.5, vision_sparsity=0.25, pool=MixedPool())
    prune(model, samples_of(family, model), method, targets=["language", "vision"])
    reloaded, report = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reloaded.state_dict()[name]), name
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    dense, pruned = CheckpointFolder(tmp_path / "dense"), CheckpointFolder(tmp_path / "out")
    changed = {key for key in dense if not dense.same_bytes(key, pruned)}
    assert len(changed) == len(manifest["linears"])
    assert manifest["verified"]["untouched_tensors"] == len(list(dense)) - len(changed)


def test_the_tower_alone_and_then_the_decoder_is_both_at_once(tmp_path: Path):
    arguments = write(tmp_path / "dense", "llava")
    assert main([*arguments, BOTH, f"--output={tmp_path / 'both'}"]) == 0
    assert main([*arguments, "--model.targets=[vision]", f"--output={tmp_path / 'tower'}"]) == 0
    manifest = json.loads((tmp_path / "tower" / "pruning.json").read_text())
    assert {block["target"] for block in manifest["blocks"]} == {"vision"}
    assert all(name.startswith("model.vision_tower.") for name in manifest["linears"])
    assert main([*arguments, f"--model.path={tmp_path / 'tower'}", f"--output={tmp_path / 'then'}"]) == 0
    assert same_bytes(tmp_path / "both", tmp_path / "then")


@pytest.mark.parametrize("options", [["--pruning.scorer=SparseGPTScorer"], ["--pruning.scorer=MagnitudeScorer"], []])
def test_methods_that_need_only_inputs(options: list[str], tmp_path: Path):
    arguments = write(tmp_path / "dense", "qwen2_5_vl", torch.bfloat16)
    pattern = ["--pruning.pattern=2:4"] if not options else []
    assert main([*arguments, BOTH, *options, *pattern, f"--output={tmp_path / 'out'}"]) == 0
    for name, entry in json.loads((tmp_path / "out" / "pruning.json").read_text())["linears"].items():
        assert entry["achieved"] == pytest.approx(0.5, abs=0.04), name


def test_a_kill_between_tower_and_decoder_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = write(tmp_path / "dense", "llava")
    assert main([*arguments, BOTH, f"--output={tmp_path / 'whole'}"]) == 0
    blocks = len(json.loads((tmp_path / "whole" / "pruning.json").read_text())["blocks"])
    run = TowerRunner.catch_calls
    for finished in (1, 3, blocks - 1):
        broken = tmp_path / f"broken-{finished}"
        with monkeypatch.context() as patch:
            patch.setattr(BlockwisePruning, "on_block_start", _failing_at(finished))
            with pytest.raises(ZeroDivisionError):
                main([*arguments, BOTH, f"--output={broken}"])
        assert len(json.loads((broken / "pruning.json").read_text())["blocks"]) == finished
        caught: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(TowerRunner, "catch_calls", lambda *given: caught.append(1) or run(*given))  # noqa: B023
            assert main([*arguments, BOTH, "--resume=true", f"--output={broken}"]) == 0
        assert bool(caught) == (finished < 3), "a finished tower is not gone through again"
        assert same_bytes(tmp_path / "whole", broken)


def _failing_at(index: int) -> Callable[..., None]:
    start = BlockwisePruning.on_block_start

    def fail(self: BlockwisePruning, trainer, pl_module, block) -> None:
        if block.index == index:
            raise ZeroDivisionError
        start(self, trainer, pl_module, block)

    return fail


def test_batches_do_not_change_the_tower(tmp_path: Path):
    arguments = write(tmp_path / "dense", "llava")
    for size in (1, 3):
        options = [f"--data.batch_size={size}", "--model.targets=[vision]"]
        assert main([*arguments, *options, f"--output={tmp_path / str(size)}"]) == 0
    assert same_bytes(tmp_path / "1", tmp_path / "3")


def test_the_page_tells_the_tower_from_the_decoder(tmp_path: Path, blank_figures):
    arguments = [*write(tmp_path / "dense", "llava"), "--report=true", BOTH, "--pruning.vision_sparsity=0.25"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    summary = summarise(manifest)
    page = Page((tmp_path / "out" / "report.html").read_text())
    refuse_other_numbers(page, manifest | {"summary": summary})
    assert summary["num_vision_blocks"] == 3
    assert set(summary["sparsity"]["vision q_proj"]) == {0, 1, 2}
    decoder = range(summary["num_blocks"] - 3)
    assert set(summary["sparsity"]["q_proj"]) == set(decoder)
    # Also where a row is a block of either: named so that it is no other, on pages and where runs are compared.
    names = [*(f"vision {number}" for number in range(3)), *(f"language {number}" for number in decoder)]
    written = re.findall(r">\s*((?:vision|language) \d+)\s*</t", (tmp_path / "out" / "report.html").read_text())
    assert written == 2 * names  # tables of the pool and of the scores
    folder = ComparedFolder(tmp_path / "out")
    places = {name: folder.place_of(name) for name in manifest["linears"]}
    assert {f"{'vision' if kind.startswith('vision ') else 'language'} {block}" for kind, block in places.values()} == {
        *names
    }
    assert {kind: set(blocks) for kind, blocks in summary["sparsity"].items()} == {
        kind: {block for other, block in places.values() if other == kind} for kind, _ in places.values()
    }
    assert all(value == pytest.approx(0.25) for value in summary["sparsity"]["vision q_proj"].values())
    assert {"sparsity/parts/vision/achieved", "summary/num_vision_blocks"} <= {path for path, *_ in page.numbers}


@pytest.mark.slow
def test_two_processes_prune_as_one(tmp_path: Path, run_cli):
    arguments = write(tmp_path / "dense", "llava")
    for count in (1, 2):
        options = [f"--trainer.devices={count}", "--trainer.accelerator=cpu", f"--output={tmp_path / str(count)}"]
        finished = run_cli(*arguments, BOTH, *options)
        assert finished.returncode == 0, finished.stderr
    assert same_bytes(tmp_path / "1", tmp_path / "2")


def test_the_plan_lists_the_tower_first(tmp_path: Path, capsys):
    arguments = write(tmp_path / "dense", "qwen2_vl")
    options = ["--pruning.vision_sparsity=0.3", "--pruning.exclude=model.visual.*.proj", "--plan=true"]
    assert main([*arguments, BOTH, *options, f"--output={tmp_path / 'out'}"]) == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    words = [line.split() for line in printed.splitlines() if line.split()[-1:] in (["30%"], ["50%"])]
    kinds = [(row[0].split(".")[0], row[-1]) for row in words]
    tower = [entry for entry in kinds if entry == ("visual", "30%")]
    assert tower
    assert kinds == tower + [("model", "50%")] * 7
    assert "vision tower, gathering" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pruning.pool=TextOnlyPool"], "--pruning.pool TextOnlyPool: is not defined for the vision tower"),
        (["--pruning.pool=AsymmetricPool"], "--pruning.pool AsymmetricPool: is not defined for the vision tower"),
        (["--pruning.allocation=DASAllocation"], "--pruning.allocation DASAllocation: is not defined for the vision"),
        (["--pruning.vision_sparsity=1.5"], "--pruning.vision_sparsity 1.5: must lie strictly between 0 and 1"),
        (["--model.targets=[language]", "--pruning.vision_sparsity=0.5"], "--pruning.vision_sparsity 0.5: needs"),
        (["--model.targets=[sound]"], "--model.targets"),
        (["--model.targets=[]"], "--model.targets []: must be a list of `language`, `vision` or both"),
    ],
)
def test_what_is_not_defined_is_one_line(options: list[str], message: str, tmp_path: Path, capsys):
    arguments = write(tmp_path / "dense", "llava")
    capsys.readouterr()
    assert main([*arguments, BOTH, *options, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tower_and_a_set_without_an_image(tmp_path: Path, capsys):
    arguments = write(tmp_path / "audio", "qwen2_audio")
    assert main([*arguments, BOTH, f"--output={tmp_path / 'out'}"]) == 2
    assert "--model.targets vision: Qwen2AudioForConditionalGeneration has no vision tower" in capsys.readouterr().err
    arguments = write(tmp_path / "dense", "llava")
    text = {
        f"s0.{name}": value for name, value in make_inputs("llava", tiny_model("llava"), [Sample(9, None, 0)]).items()
    }
    save_file(text, tmp_path / "dense" / "calib.safetensors")
    assert main([*arguments, BOTH, f"--output={tmp_path / 'out'}"]) == 2
    assert "--model.targets vision: no calibration sample has an image or a video" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_patches_that_are_padding_do_not_count():
    """Idefics3 pads small images; a mask says which patches are real."""
    model = tiny_model("idefics3")
    inputs = make_inputs("idefics3", model, [Sample(3, 0, 5)])
    side = inputs["pixel_values"].shape[-1]
    mask = torch.ones(1, 1, side, side, dtype=torch.bool)
    mask[..., side // 2 :, :] = False
    (runner,) = LVLMModule.from_model(model, targets=["vision"]).towers
    whole, part = (_norms(model, inputs | {"pixel_attention_mask": one}) for one in (torch.ones_like(mask), mask))
    ((batch, modality),) = runner.catch_calls(inputs | {"pixel_attention_mask": mask})
    patches = batch.token_shape[1]
    assert modality == "image"
    assert (whole, part) == (patches, patches // 2)


def _norms(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Tokens that calibrate the first block of the tower."""
    fresh = tiny_model("idefics3")
    fresh.load_state_dict(model.state_dict())
    manifest = prune(fresh, [inputs], BlockwisePruning(pool=MixedPool()), targets=["vision"])
    return int(manifest["blocks"][0]["pool"]["image"])


def test_recovery_of_a_folder_with_a_pruned_tower_adapts_the_decoder(tmp_path: Path):
    options = ["--model.path=demo", "--data.num_samples=4", "--evaluate=false", "--report=false"]
    pool = "--pruning.pool=MixedPool"
    assert main(["prune", *options, pool, BOTH, f"--output={tmp_path / 'pruned'}"]) == 0
    options[0] = f"--model.path={tmp_path / 'pruned'}"
    source = ["--data.validation_samples=2", "--trainer.max_steps=1"]
    assert main(["recover", *options, *source, f"--output={tmp_path / 'recovered'}"]) == 0
    before, after = (CheckpointFolder(tmp_path / name) for name in ("pruned", "recovered"))
    changed = {key for key in before if not before.same_bytes(key, after)}
    assert changed
    assert not any("vision" in key for key in changed)
    for key in before:
        zeros = (before.read(key) == 0).sum()
        assert int((after.read(key) == 0).sum()) == int(zeros), key
    assert main(["recover", *options, BOTH, f"--output={tmp_path / 'no'}"]) == 2
