import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_prune.checkpoints import CheckpointFolder, build_skeleton
from lvlm_prune.checkpoints.sources import find_sources
from lvlm_prune.errors import InputError
from tests.families import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llava", torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> CheckpointFolder:
    """Set entries of `config.json`; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return CheckpointFolder(folder)


def test_parameters_are_on_meta_and_buffers_are_real(folder: Path) -> None:
    model = build_skeleton(CheckpointFolder(folder))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


def test_auto_dtype_is_the_stored_one_whatever_the_configuration_says(folder: Path) -> None:
    checkpoint = change_config(folder, dtype="float32")
    assert {parameter.dtype for parameter in build_skeleton(checkpoint).parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in build_skeleton(checkpoint, "float32").parameters()} == {torch.float32}


def test_the_class_is_found_without_architectures(folder: Path) -> None:
    model = build_skeleton(change_config(folder, architectures=None))
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_the_attention_implementation_can_be_chosen(folder: Path) -> None:
    model = build_skeleton(CheckpointFolder(folder), attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("changes", "option", "problem"),
    [
        ({"model_type": "nonesuch", "architectures": ["Nonesuch"]}, "model.path", "nonesuch"),
        ({"model_type": None, "architectures": None}, "model.path", "cannot read its configuration"),
        ({"model_type": "nonesuch", "auto_map": {"AutoConfig": "a.B"}}, "model.trust_remote_code", "own model code"),
        ({"quantization_config": {"quant_method": "awq"}}, "model.path", "quantized"),
        ({"dtype": "int8"}, "model.path", "dtype torch.int8, in which no model can be loaded"),
        ({"dtype": "float8_e4m3fn"}, "model.path", "in which no model can be loaded"),
        ({"dtype": 5}, "model.path", "dtype 5, in which no model can be loaded"),
        ({"model_type": "clip_vision_model", "architectures": ["Nonesuch"]}, "model.path", "no model class"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(folder: Path, changes: dict, option: str, problem: str) -> None:
    checkpoint = change_config(folder, **changes)
    with pytest.raises(InputError, match=problem) as caught:
        build_skeleton(checkpoint)
    assert caught.value.option == option
    assert "\n" not in str(caught.value)


def test_a_type_without_a_name_is_refused(folder: Path) -> None:
    checkpoint = change_config(folder, model_type={"name": "llava"})
    with pytest.raises(InputError, match=r"cannot say what its tensors are called|cannot read its configuration"):
        find_sources(build_skeleton(checkpoint), checkpoint)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "nn", ""])
def test_a_dtype_that_does_not_exist_is_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(InputError, match=r"model\.dtype"):
        build_skeleton(CheckpointFolder(folder), dtype)


def test_an_attention_implementation_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.attn_implementation nonesuch"):
        build_skeleton(CheckpointFolder(folder), attn_implementation="nonesuch")


def test_the_checkpoint_s_own_code_runs_only_when_it_is_trusted(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "modeling_own.py").write_text(
        "from transformers import LlavaForConditionalGeneration\n\n\n"
        "class OwnLlava(LlavaForConditionalGeneration):\n    pass\n"
    )
    checkpoint = change_config(folder, auto_map={"AutoModelForImageTextToText": "modeling_own.OwnLlava"})
    assert type(build_skeleton(checkpoint)).__name__ == "LlavaForConditionalGeneration"
    assert type(build_skeleton(checkpoint, trust_remote_code=True)).__name__ == "OwnLlava"
