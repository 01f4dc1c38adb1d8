"""A plan says what a run would do, and does nothing."""

import fnmatch
import json
import re
import shutil
from collections import namedtuple
from math import prod

import pytest

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from tests.conftest import ALL_SAMPLES, MODEL

# Decoder shapes of the papers' models: architecture, hidden, blocks, heads, key-value heads, intermediate, vocabulary.
SHAPES = {
    "llama3-llava-next-8b-hf": ("llava_next", "llama", 4096, 32, 32, 8, 14336, 128320),
    "llava-v1.6-vicuna-7b-hf": ("llava_next", "llama", 4096, 32, 32, 32, 11008, 32064),
    "llava-v1.6-vicuna-13b-hf": ("llava_next", "llama", 5120, 40, 40, 40, 13824, 32064),
    "llava-onevision-qwen2-7b-ov-hf": ("llava_onevision", "qwen2", 3584, 28, 28, 4, 18944, 152064),
    "Qwen2-VL-7B-Instruct": ("qwen2_vl", "qwen2_vl_text", 3584, 28, 28, 4, 18944, 152064),
    "Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", "qwen2_5_vl_text", 3584, 28, 28, 4, 18944, 152064),
}


def listed_kinds(lines: list[str]) -> dict[str, list[str]]:
    """Name of each kind of Linear in a plan -> how many, sizes of the shape, target."""
    kinds = {}
    for line in lines:
        if found := re.fullmatch(r"(\S+) +(\d+) of +(\d+) x +(\d+)  ([\d.]+%(?: to [\d.]+%)?)", line):
            kinds[found[1]] = list(found.groups()[1:])
    return kinds


def test_a_plan_counts_every_tensor_and_writes_nothing(golden_arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--pruning.exclude=*.k_proj", "--pruning.sparsity=0.6", "--plan=true", "--output=out"]
    assert main([*golden_arguments, ALL_SAMPLES, *arguments]) == 0
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    folder = CheckpointFolder(MODEL)
    listed = listed_kinds(lines)
    assert len(listed) == 6
    planned = []
    for name, (count, rows, columns, target) in listed.items():
        keys = fnmatch.filter(folder, name)
        assert {folder[key].shape for key in keys} == {(int(rows), int(columns))}
        assert (len(keys), target) == (int(count), "60%")
        planned += keys
    assert len(planned) == 12
    weights = sum(prod(folder[key].shape) for key in planned)
    assert lines[0] == "model · 2 blocks · 12 Linears · 81.9 k weights · ATV · 60% unstructured · 8 samples"
    assert lines[1].startswith(f"12 Linears · {weights:,} weights")
    assert "hidden states of the calibration samples: " in "\n".join(lines)


def test_a_plan_is_short_however_many_blocks_there_are_and_gives_bounds_of_targets(golden_arguments, tmp_path, capsys):
    sparsities = json.dumps({"*layers.0.*": 0.4, "*layers.1.*": 0.6})
    arguments = ["--pruning.allocation=CustomAllocation", f"--pruning.allocation.sparsities={sparsities}"]
    assert main([*golden_arguments, *arguments, "--plan=true", f"--output={tmp_path / 'out'}"]) == 0
    listed = listed_kinds(capsys.readouterr().out.splitlines())
    assert len(listed) == 7
    assert {(count, target) for count, _, _, target in listed.values()} == {("2", "40% to 60%")}


def test_a_plan_says_what_a_run_would_refuse_for_lack_of_room(golden_arguments, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    output = f"--output={tmp_path / 'out'}"
    assert main([*golden_arguments, "--plan=true", output]) == 0
    assert "of it the output folder, where 5.0 kB are free)" in capsys.readouterr().out
    assert main([*golden_arguments, output]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {tmp_path / 'out'}: needs ")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_the_configuration_in_an_output_folder_says_that_it_is_taken(golden_arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*golden_arguments, "--publishable=false", f"--output={out}"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["prune", f"--config={out / 'config.yaml'}", "--plan=true"]) == 0
    said = capsys.readouterr().out
    assert f"the run would be refused: --output {out}: exists and is not empty" in said
    assert "predicted peak" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_disk_of_a_plan_counts_no_records_of_the_run_that_made_the_input(golden_arguments, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main([*golden_arguments, f"--output={once}"]) == 0
    (once / "report").mkdir(exist_ok=True)
    (once / "report" / "large.png").write_bytes(bytes(10**8))
    assert main([*golden_arguments, f"--model.path={once}", "--plan=true", f"--output={twice}"]) == 0
    planned = re.search(r"([\d.]+) (kB|MB) of it the output folder", capsys.readouterr().out)
    assert planned is not None
    copied = sum(path.stat().st_size for path in MODEL.iterdir())
    assert float(planned[1]) * {"kB": 1e3, "MB": 1e6}[planned[2]] == pytest.approx(copied, rel=0.05)


def sparse_checkpoint(name: str, folder) -> CheckpointFolder:
    """A checkpoint folder of this shape whose shard is a hole in the file system: no bytes are stored."""
    import struct

    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, text, hidden, blocks, heads, kv_heads, intermediate, vocabulary = SHAPES[name]
    language = {
        "model_type": text,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }
    config = AutoConfig.for_model(family, text_config=language)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header, position = {}, 0
    for key, tensor in model.state_dict().items():
        if "inv_freq" in key or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        size = 2 * tensor.numel()
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + position)
    return CheckpointFolder(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_the_papers_models_are_covered_by_their_shapes(name, tmp_path, capsys):
    _, _, hidden, blocks, heads, kv_heads, intermediate, _ = SHAPES[name]
    folder = tmp_path / name
    folder.mkdir()
    sparse_checkpoint(name, folder)
    arguments = [
        f"--model.path={folder}",
        "--pruning.scorer=MagnitudeScorer",
        "--plan=true",
        f"--output={tmp_path / 'o'}",
    ]
    assert main(["prune", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    checkpoint, shapes = CheckpointFolder(folder), []
    for kind, (count, *shape, _) in listed_kinds(lines).items():
        keys = fnmatch.filter(checkpoint, kind)
        assert len(keys) == int(count) == blocks
        shapes += [checkpoint[key].shape for key in keys]
        assert checkpoint[keys[0]].shape == tuple(map(int, shape))
    head = hidden // heads
    per_block = [(heads * head, hidden), *[(kv_heads * head, hidden)] * 2, (hidden, heads * head)]
    per_block += [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    assert sorted(shapes) == sorted(per_block * blocks)
