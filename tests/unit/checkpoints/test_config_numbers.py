"""Whatever stands in `config.json`, a model is built or refused in one line, and soon."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaForCausalLM, OPTForCausalLM

from benchmarks.families.tiny_config import names
from lvlm_prune.checkpoints import CheckpointFolder, skeleton
from lvlm_prune.checkpoints.sizes import refuse_absurd_sizes
from lvlm_prune.errors import LVLMPruneError
from lvlm_prune.module import LVLMModule
from tests.conftest import MODEL
from tests.families import tiny_model

WRONG: list[Any] = [-1, 0, 10**6, 10**9, 10**20, 1.5, "abc", None, []]


FAMILIES = ["llava", "qwen2_vl", "gemma3"]


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(path / family)
    return path


@pytest.fixture(scope="module")
def folder(folders: Path) -> Path:
    return folders / "llava"


def opened(folder: Path, copy: Path, config: Any) -> str:
    """What is said against a configuration; empty where a model can be built and its tensors fit."""
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(json.dumps(config))
    try:
        LVLMModule(str(copy)).open()
    except LVLMPruneError as error:
        return str(error)
    finally:
        shutil.rmtree(copy)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "value", [pytest.param(value, marks=() if value in (-1, "abc") else pytest.mark.slow) for value in WRONG], ids=repr
)
def test_wrong_numbers_are_refused_in_one_line(value: Any, family: str, folders: Path, tmp_path: Path):
    """None of them is a traceback, none takes long; many are refused, others are never looked at."""
    folder = folders / family
    config = json.loads((folder / "config.json").read_text())
    refused, tried = 0, 0
    for path in leaves(config):
        changed = json.loads(json.dumps(config))
        section = changed
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        started = time.monotonic()
        said = opened(folder, tmp_path / "copy", changed)
        assert "\n" not in said, path
        assert "allocate memory" not in said, path
        assert time.monotonic() - started < 20, path
        tried, refused = tried + 1, refused + bool(said)
    assert refused > tried / 5


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "num_hidden_layers", 10**9),
        ("text_config", "vocab_size", 10**15),
        ("vision_config", "image_size", 10**12),
    ],
)
def test_sizes_are_compared_with_the_tensors_before_anything_is_built(section, name, value, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config[section][name] = value
    said = opened(folder, tmp_path / "copy", config)
    assert f"config.json says {section}.{name}: {value}, which does not fit the tensors on disk" in said


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llava", "hidden_size", 10**6),
        ("llava", "image_size", 10**6),
        ("gemma3", "patch_size", 10**6),
        ("qwen2_vl", "embed_dim", 20_000),
        ("qwen2_vl", "spatial_merge_size", 20_000),
        ("qwen2_vl", "spatial_merge_size", 10**8),
        ("qwen2_vl", "depth", 2000),
    ],
)
def test_what_sizes_make_of_each_other_is_refused_before_there_is_memory_for_it(
    family, name, value, folders, tmp_path, monkeypatch
):
    """Of a tower too: which tensors they make only the model says, asked without memory."""

    def in_memory(*arguments, **options):
        raise AssertionError("built in memory")

    monkeypatch.setattr(skeleton, "init_empty_weights", in_memory)
    config = json.loads((folders / family / "config.json").read_text())
    config["vision_config"][name] = value
    said = opened(folders / family, tmp_path / "copy", config)
    assert "asks for" in said or "does not fit" in said or "overflow" in said


def test_a_model_of_which_every_number_is_a_length_on_disk_is_built_once(monkeypatch):
    asked = []
    monkeypatch.setattr(skeleton, "refuse_larger_tensors", lambda *_: asked.append(1))
    skeleton.build_skeleton(CheckpointFolder(MODEL))
    assert not asked


@pytest.mark.parametrize("value", [1e308, 1.0, -1e-6, float("inf"), float("nan")])
@pytest.mark.parametrize(("section", "name"), [("text_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps")])
def test_norms_that_give_nothing_of_use_are_refused(section, name, value, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config[section][name] = value
    said = opened(folder, tmp_path / "copy", config)
    assert f"config.json says {section}.{name}: {value:g}, with which its norms give nothing of use" in said


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1])
def test_positions_that_give_nothing_of_use_are_refused(value, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = value
    said = opened(folder, tmp_path / "copy", config)
    assert f"config.json says text_config.rope_theta: {value:g}, with which its positions give nothing of use" in said


def test_labels_without_number_are_refused_before_they_are_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    said = opened(folder, tmp_path / "copy", config | {"num_labels": 10**12})
    assert "config.json says num_labels: 1000000000000, which does not fit the tensors on disk" in said


@pytest.mark.parametrize(("name", "value"), [("model_max_length", 10**30), ("max_length", 1e30), ("num_labels", 21843)])
def test_numbers_that_are_no_size_of_the_model_may_be_large(name, value, folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_window_layers"] = 4096
    refuse_absurd_sizes(
        SimpleNamespace(path=folder, config=config | {name: value}, tensors=CheckpointFolder(folder).tensors)
    )


@pytest.mark.parametrize("value", [131_072, 10_485_760, 2**30, 10**12])
@pytest.mark.parametrize("name", ["max_position_embeddings", "max_sequence_length"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_without_a_table_go_as_far_as_they_like(family, name, value, folders, tmp_path):
    config = json.loads((folders / family / "config.json").read_text())
    config["text_config"][name] = value
    assert opened(folders / family, tmp_path / "copy", config) == ""


@pytest.mark.parametrize("value", [2**30, 10**12])
@pytest.mark.parametrize("table", ["learned", "calculated"])
def test_a_table_with_a_row_for_each_position_is_held_against_what_is_on_disk(table, value, tmp_path, monkeypatch):
    """Rows that are learned are on disk; those that are calculated are made in memory, and may be too many for it."""
    model_class = OPTForCausalLM if table == "learned" else LlamaForCausalLM
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 64} if table == "learned" else {"intermediate_size": 64}
    model_class(model_class.config_class(max_position_embeddings=64, **sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    really = model_class.__init__

    def with_table(model, config):
        really(model, config)
        model.register_buffer("table", torch.empty(config.max_position_embeddings, 64), persistent=False)

    if table == "calculated":
        monkeypatch.setattr(model_class, "__init__", with_table)
    with pytest.raises(LVLMPruneError, match=r"does not fit the tensors on disk|the configuration asks for"):
        skeleton.build_skeleton(CheckpointFolder(tmp_path))


@pytest.mark.parametrize(
    "architectures", ["LlavaForConditionalGeneration", ["BertModel"], ["AutoModel"], ["LlavaConfig"], [5, None], {}, 7]
)
def test_architectures_of_any_kind_are_no_traceback(architectures: Any, folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
    assert "\n" not in opened(folder, tmp_path / "copy", config)


@pytest.mark.parametrize(
    "config", [[], None, 3, {}, {"model_type": 3}, {"model_type": "llava"}, {"model_type": "bert"}]
)
def test_configurations_of_another_shape_are_refused(config: Any, folder: Path, tmp_path: Path):
    assert opened(folder, tmp_path / "copy", config).startswith("--model.path ")


def test_nothing_is_left_of_a_model_that_could_not_be_built(folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 0
    default = torch.get_default_dtype()
    assert opened(folder, tmp_path / "copy", config)
    assert torch.get_default_dtype() == default
    assert torch.empty(1).device.type == "cpu"


def test_a_window_behind_the_last_layer_is_legal(folders: Path, tmp_path: Path):
    """Configurations of small models keep `max_window_layers` of large ones."""
    config = json.loads((folders / "qwen2_vl" / "config.json").read_text())
    config["text_config"]["max_window_layers"] = 80
    assert opened(folders / "qwen2_vl", tmp_path / "copy", config) == ""


def test_no_family_has_a_number_that_is_refused():
    """Bases of rotary positions, clipping limits and the like are far larger than any tensor, and are no sizes."""
    for name in names():
        config = CONFIG_MAPPING[name.partition(":")[0]]().to_dict()
        refuse_absurd_sizes(SimpleNamespace(path=Path(name), tensors={}, config=config))
