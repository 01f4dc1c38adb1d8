"""Folders as they lie on the hub go in and come out: real processors, real images, every layout of keys."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.data import Conversation, encode, load_processor
from tests.families import tiny_model
from tests.hub_folders import PARTS, write_captions, write_folder, write_processor, write_sounds

QUICK = ("llava", "qwen2_vl", "gemma3", "mllama")
FAMILIES = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
    for family, parts in PARTS.items()
    if parts.images is not None
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions"))


# Holding a pruned model against the dense one takes longer than pruning it.
UNMEASURED = "--evaluate=false"


def prune(folder: Path, captions: Path, output: Path, *options: str) -> int:
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={captions}"]
    arguments = ["prune", f"--model.path={folder}", "--pruning.sparsity=0.5", *source, f"--output={output}"]
    return main([*arguments, "--report=false", *options])


def reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model of a folder, in which nothing is missing and nothing is left over."""
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return loaded.eval()


def generated(model: PreTrainedModel, folder: Path, captions: Path) -> Tensor:
    """Five new tokens about the first image."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    inputs = encode(load_processor(folder), Conversation([turn], [captions.parent / "0.png"]), True)
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    tokens = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :]


def hold_against(dense: Path, pruned: Path) -> dict:
    """Same files, keys, order, shapes, dtypes and sizes; what was no target has the same bytes. The manifest."""
    manifest = json.loads((pruned / "pruning.json").read_text())
    before, after = CheckpointFolder(dense), CheckpointFolder(pruned)
    assert before.tensors == after.tensors
    assert list(before) == list(after)
    own = {"pruning.json", "statistics.safetensors", "report.html", "report", "config.yaml", "README.md"}
    assert {path.name for path in dense.iterdir()} - own == {path.name for path in pruned.iterdir()} - own
    if (dense / "README.md").exists():
        assert (pruned / "README.md").read_text().rstrip().endswith((dense / "README.md").read_text().rstrip())
    for path in (path for path in dense.iterdir() if path.name not in own):
        assert path.stat().st_size == (pruned / path.name).stat().st_size, path.name
        if path.name not in before.shards:
            assert path.read_bytes() == (pruned / path.name).read_bytes(), path.name
    changed = {key for key in before if before.read_bytes(key) != after.read_bytes(key)}
    leaves = {name.rpartition(".")[2] for name in manifest["linears"]}
    assert changed
    for key in changed:
        assert (leaves | {"gate_proj", "up_proj"}) & set(key.split(".")), key
        assert not key.startswith(("vision", "model.vision", "model.visual", "visual", "lm_head")), key
        zeros = (after.read(key) == 0).float().mean().item()
        assert zeros == pytest.approx(0.5, abs=0.03), key
    return manifest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_from_images_with_captions(family: str, captions: Path, tmp_path: Path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model = write_folder(tmp_path / "dense", family)
    assert prune(tmp_path / "dense", captions, tmp_path / "out", "--pruning.min_expert_tokens=1") == 0
    manifest = hold_against(tmp_path / "dense", tmp_path / "out")
    assert manifest["calibration"]["num_samples"] == 8
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)
    pruned = reload(model, tmp_path / "out")
    assert len(generated(pruned, tmp_path / "out", captions)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_by_the_processor_changes_no_statistic(family: str, captions: Path, tmp_path: Path):
    """The tokenizers pad on the left; the captions differ in length."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    write_folder(tmp_path / "dense", family)
    found = []
    for size in (1, 4):
        options = [f"--data.batch_size={size}", "--pruning.record=true", "--pruning.pool=MixedPool", UNMEASURED]
        assert prune(tmp_path / "dense", captions, tmp_path / str(size), *options) == 0
        found.append(load_file(tmp_path / str(size) / "statistics.safetensors"))
    one, four = found
    first = [key for key in one if key.startswith("scaler_row.0.")]
    assert first
    for key in first:
        assert (one[key] - four[key]).abs().max() <= 1e-6 * one[key].max(), key


def test_broken_and_missing_images_are_left_out_counted_and_named(tmp_path: Path, capsys, blank_figures):
    captions = write_captions(tmp_path / "captions")
    write_folder(tmp_path / "dense", "llava")
    (captions.parent / "2.png").write_bytes((captions.parent / "2.png").read_bytes()[:300])
    (captions.parent / "5.png").unlink()
    assert prune(tmp_path / "dense", captions, tmp_path / "out") == 2
    assert f"image file {captions.parent / '5.png'} of sample noise-5 is missing" in capsys.readouterr().err
    assert (
        prune(tmp_path / "dense", captions, tmp_path / "out", "--data.on_error=skip", "--report=true", UNMEASURED) == 0
    )
    said = "2 of 8 calibration samples could not be read and were left out (the first is noise-2: "
    assert f"warning: {said}{captions.parent / '2.png'}: cannot be read as an image (" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out.private" / "pruning.json").read_text())
    assert manifest["calibration"]["num_samples"] == 6
    assert [name for name, _ in manifest["calibration"]["skipped"]] == ["noise-2", "noise-5"]
    assert said in (tmp_path / "out.private" / "report.html").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 of 8 calibration samples could not be read" in page
    assert "noise-2" not in page


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family, parts in PARTS.items() if parts.images is not None])
def test_a_family_is_pruned_with_its_tower(family: str, captions: Path, tmp_path: Path):
    """Every Linear of the vision blocks that images go through, but for the tower of videos, which saw none."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model = write_folder(tmp_path / "dense", family)
    options = ["--model.targets=[language, vision]", "--pruning.pool=MixedPool", "--pruning.min_expert_tokens=1"]
    assert prune(tmp_path / "dense", captions, tmp_path / "out", *options) == 0
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    dense, pruned = CheckpointFolder(tmp_path / "dense"), CheckpointFolder(tmp_path / "out")
    changed = [key for key in dense if not dense.same_bytes(key, pruned)]
    assert manifest["verified"]["untouched_tensors"] >= len(list(dense)) - len(changed)
    of_tower = {block["index"]: block["name"] for block in manifest["blocks"] if block.get("target") == "vision"}
    assert of_tower
    for name, entry in manifest["linears"].items():
        if entry["block"] in of_tower and "video_tower" not in name:
            assert entry["achieved"] == pytest.approx(0.5, abs=0.04), name
    assert len(generated(reload(model, tmp_path / "out"), tmp_path / "out", captions)) == 5


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe"])
def test_a_family_is_pruned_from_sounds_that_count_as_visual(family: str, tmp_path: Path):
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    model = write_folder(tmp_path / "dense", family)
    sounds = write_sounds(tmp_path / "sounds")
    options = ["--pruning.visual=[image, video, audio]", "--pruning.min_expert_tokens=1", "--data.batch_size=2"]
    options.append("--pruning.pool.alpha=1e4")
    assert prune(tmp_path / "dense", sounds, tmp_path / "out", *options) == 0
    manifest = hold_against(tmp_path / "dense", tmp_path / "out")
    assert manifest["calibration"]["num_samples"] == 4
    assert manifest["calibration"]["tokens"]["audio"] >= 4
    assert all(sum(block["visual_tokens"]) > 0 for block in manifest["blocks"])
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]}
    question = Conversation([turn], audios=[sounds.parent / "0.wav"])
    inputs = encode(load_processor(tmp_path / "out"), question, True)
    tokens = reload(model, tmp_path / "out").generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 5


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other weights into a folder, in one file."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_folder_under_the_names_of_the_modules(captions: Path, tmp_path: Path):
    """What older transformers 5 and many tools write: `model.language_model.layers...`, all in one file."""
    model = write_folder(tmp_path / "dense", "llava")
    assert any(key.startswith("language_model.model.layers.") for key in CheckpointFolder(tmp_path / "dense"))
    rewrite(tmp_path / "dense", {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert any(key.startswith("model.language_model.layers.") for key in CheckpointFolder(tmp_path / "dense"))
    assert prune(tmp_path / "dense", captions, tmp_path / "out") == 0
    hold_against(tmp_path / "dense", tmp_path / "out")
    assert len(generated(reload(model, tmp_path / "out"), tmp_path / "out", captions)) == 5


def test_layouts_give_the_same_masks(captions: Path, tmp_path: Path):
    """`model.layers...` as on the hub, and `model.language_model.layers...`."""
    model = write_folder(tmp_path / "hub", "qwen2_vl")
    shutil.copytree(tmp_path / "hub", tmp_path / "modules")
    rewrite(tmp_path / "modules", {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert any(key.startswith("model.layers.0.") for key in CheckpointFolder(tmp_path / "hub"))
    for layout in ("hub", "modules"):
        assert prune(tmp_path / layout, captions, tmp_path / f"{layout}-out", UNMEASURED) == 0
    one, two = (reload(model, tmp_path / f"{layout}-out").state_dict() for layout in ("hub", "modules"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype, captions: Path, tmp_path: Path):
    model = write_folder(tmp_path / "dense", "llava", dtype)
    assert prune(tmp_path / "dense", captions, tmp_path / "out") == 0
    hold_against(tmp_path / "dense", tmp_path / "out")
    pruned = reload(model, tmp_path / "out")
    assert pruned.dtype == dtype
    assert len(generated(pruned, tmp_path / "out", captions)) == 5


def test_tied_embeddings_stay_tied(captions: Path, tmp_path: Path):
    """The output embedding is stored once, as the input embedding, and is no target."""
    model = write_folder(tmp_path / "dense", "gemma3")
    assert not any("lm_head" in key for key in CheckpointFolder(tmp_path / "dense"))
    assert prune(tmp_path / "dense", captions, tmp_path / "out") == 0
    hold_against(tmp_path / "dense", tmp_path / "out")
    pruned = reload(model, tmp_path / "out")
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight


def test_other_safetensors_files_and_folders_are_kept_but_for_copies_of_the_weights(captions: Path, tmp_path: Path):
    write_folder(tmp_path / "dense", "llava")
    save_file({"value_head": torch.ones(3)}, tmp_path / "dense" / "value_head.safetensors")
    for name in ("assets", "original"):
        (tmp_path / "dense" / name).mkdir()
        (tmp_path / "dense" / name / "params.json").write_text("{}")
    assert prune(tmp_path / "dense", captions, tmp_path / "out", UNMEASURED) == 0
    assert not (tmp_path / "out" / "original").exists()
    for name in ("value_head.safetensors", "assets/params.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_the_thinker_of_a_whole_omni_folder(captions: Path, tmp_path: Path):
    """The hub's omni folders hold a thinker and a talker; the talker stays as it is."""
    thinker = tiny_model("qwen2_5_omni")
    folder = tmp_path / "dense"
    thinker.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {f"thinker.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rewrite(folder, tensors | {"talker.model.embed_tokens.weight": torch.randn(8, 4)})
    config = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "model_type": "qwen2_5_omni"}
    (folder / "config.json").write_text(json.dumps(whole | {"thinker_config": config}))
    write_processor(folder, "qwen2_5_omni")
    assert prune(folder, captions, tmp_path / "out") == 0
    hold_against(folder, tmp_path / "out")
