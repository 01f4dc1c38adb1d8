"""A model streamed block by block from a checkpoint folder is the model in memory."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.blocks import BlockRunner, CaughtBatch, StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder, build_skeleton
from lvlm_prune.checkpoints.checkpoint import SINGLE_NAME
from lvlm_prune.checkpoints.versions import VERSION_5
from lvlm_prune.errors import InputError
from tests.families import FAMILIES, Sample, make_inputs, tiny_model

FAMILIES_WITH_DIFFERENT_CHECKPOINTS = [
    "llava",
    "qwen2_vl",
    "qwen3_vl",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "gemma3",
    "mllama",
    "smolvlm",
    "qwen2_audio",
]


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write the tiny model of a family as a checkpoint of several shards."""
    model = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def stream(folder: Path) -> tuple[BlockRunner, StreamedWeights]:
    checkpoint = CheckpointFolder(folder)
    runner = BlockRunner(build_skeleton(checkpoint))
    return runner, StreamedWeights(runner.model, runner.decoder, checkpoint)


def inputs_of(family: str, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    return [
        make_inputs(family, model, [Sample(3, 0, 5)]),
        make_inputs(family, model, [Sample(3, 0, 5), Sample(2, 1, 9)], side="left"),
        make_inputs(family, model, [Sample(4, None, 3)]),
    ]


def zero_small_weights(runner: BlockRunner, i: int) -> None:
    for parameter in runner.block(i).parameters():
        parameter.data[parameter.abs() < 0.01] = 0


def finish_after_pruning(runner: BlockRunner, batches: list[CaughtBatch], weights: StreamedWeights | None) -> list:
    for i in range(len(runner)):
        if weights is not None:
            weights.load_block(i)
        zero_small_weights(runner, i)
        for batch in batches:
            runner.advance(i, batch)
        if weights is not None:
            weights.release_block(i)
            assert all(parameter.device.type == "meta" for parameter in runner.block(i).parameters())
    return [runner.finish(batch) for batch in batches]


@pytest.mark.parametrize("family", FAMILIES_WITH_DIFFERENT_CHECKPOINTS)
def test_streamed_equals_resident(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    inputs = inputs_of(family, model)
    resident = BlockRunner(model)
    expected = finish_after_pruning(resident, [resident.catch(batch) for batch in inputs], None)

    runner, weights = stream(tmp_path)
    assert len(CheckpointFolder(tmp_path).shards) > 1
    weights.load_non_block_weights()
    batches = [runner.catch(batch) for batch in inputs]
    weights.release_non_block_weights(any(batch.needs_token_embedding for batch in batches))
    for output, reference in zip(finish_after_pruning(runner, batches, weights), expected):
        torch.testing.assert_close(output, reference, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_are_those_of_from_pretrained(family: str, tmp_path: Path) -> None:
    """Every parameter and every buffer, bits and dtype; in bfloat16, where families keep some of them in float32."""
    save(family, tmp_path, torch.bfloat16)
    model_class = getattr(transformers, FAMILIES[family].model)
    reference = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    runner, weights = stream(tmp_path)
    weights.load_non_block_weights()
    for i in range(len(runner)):
        weights.load_block(i)
    loaded = dict(runner.model.named_parameters()) | dict(runner.model.named_buffers())
    expected = dict(reference.named_parameters()) | dict(reference.named_buffers())
    for name, tensor in expected.items():
        if not name.endswith("lm_head.weight"):
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, msg=name)
    assert not any(parameter.requires_grad for parameter in runner.model.parameters())
    assert not runner.model.training


def test_only_the_decoder_stays_when_the_frame_is_released(tmp_path: Path) -> None:
    save("llava", tmp_path)
    runner, weights = stream(tmp_path)
    assert all(parameter.device.type == "meta" for parameter in runner.model.parameters())
    weights.load_non_block_weights()
    in_memory = {name for name, parameter in runner.model.named_parameters() if parameter.device.type != "meta"}
    assert any("vision_tower" in name for name in in_memory)
    assert not any(".layers." in name and "language_model" in name for name in in_memory)
    assert "lm_head.weight" not in in_memory
    weights.release_non_block_weights()
    in_memory = {name for name, parameter in runner.model.named_parameters() if parameter.device.type != "meta"}
    assert in_memory == {"model.language_model.norm.weight"}


def test_what_is_written_under_the_key_of_a_weight_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    save("llava", tmp_path)
    _, weights = stream(tmp_path)
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    (key,) = weights.keys_of(name)
    assert key == "language_model.model.layers.2.mlp.up_proj.weight"
    checkpoint = CheckpointFolder(tmp_path)
    checkpoint.write(key, torch.zeros(checkpoint[key].shape))
    reloaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    zeros = [other for other, parameter in reloaded.named_parameters() if not parameter.any()]
    assert zeros == [name]


@pytest.mark.skipif(not VERSION_5, reason="transformers 4 has no stacks of experts here")
def test_a_stack_of_experts_comes_from_one_tensor_per_expert(tmp_path: Path) -> None:
    model = save("qwen3_omni_moe", tmp_path)
    runner, weights = stream(tmp_path)
    name = f"{runner.name(1)}.mlp.experts.gate_up_proj"
    assert not weights.is_stored_as_used(name)
    assert len(weights.keys_of(name)) == 2 * 4
    weights.load_block(1)
    torch.testing.assert_close(runner.model.get_parameter(name), model.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_omni_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_parameter_of_a_block_goes_back_to_where_it_came_from(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also where the model runs in another dtype than it is stored in."""
    save(family, tmp_path, torch.bfloat16)
    checkpoint = CheckpointFolder(tmp_path)
    runner = BlockRunner(build_skeleton(checkpoint, dtype))
    weights = StreamedWeights(runner.model, runner.decoder, checkpoint)
    before = {key: checkpoint.read(key) for key in checkpoint}
    for path, parameter in runner.block(2).named_parameters():
        name = f"{runner.name(2)}.{path}"
        stored = weights.stored(name)
        assert stored.dtype == torch.bfloat16
        assert stored.shape == parameter.shape
        for key, tensor in weights.to_disk({name: stored}).items():
            assert torch.equal(tensor, before[key]), key
        # Written one by one: parameters that share a tensor on disk must not undo each other.
        for key, tensor in weights.to_disk({name: -stored}, checkpoint).items():
            checkpoint.write(key, tensor)
    in_block = {
        key for path, _ in runner.block(2).named_parameters() for key in weights.keys_of(f"{runner.name(2)}.{path}")
    }
    for key in checkpoint:
        assert torch.equal(checkpoint.read(key), -before[key] if key in in_block else before[key]), key


def test_a_block_can_be_read_from_another_folder_of_the_same_layout(tmp_path: Path) -> None:
    model = save("llava", tmp_path / "dense")
    for parameter in model.parameters():
        parameter.zero_()
    model.save_pretrained(tmp_path / "pruned", max_shard_size="60KB")
    runner, weights = stream(tmp_path / "dense")
    weights.load_block(0, CheckpointFolder(tmp_path / "pruned"))
    assert not any(parameter.any() for parameter in runner.block(0).parameters())
    weights.load_block(0)
    assert all(parameter.any() for parameter in runner.block(0).parameters())


@pytest.mark.parametrize("tie", [False, True])
def test_checkpoints_in_the_model_s_own_spelling(tie: bool, tmp_path: Path) -> None:
    """`model.language_model...` as other tools write it, where transformers writes `language_model.model...`."""
    model = tiny_model("llava")
    # Version 4 looks at the configuration of the decoder.
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tie
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tie and name == "lm_head.weight")}
    save_file(tensors, tmp_path / SINGLE_NAME)
    runner, weights = stream(tmp_path)
    weights.load_non_block_weights()
    weights.load_block(3)
    for name, parameter in runner.model.named_parameters():
        if parameter.device.type != "meta":
            torch.testing.assert_close(parameter.data, model.get_parameter(name).data, rtol=0, atol=0)


def rewrite(folder: Path, **changes: Tensor | None) -> str:
    """Change or drop the first tensor whose name ends like a keyword (`__` for a dot); its name."""
    ((ending, tensor),) = changes.items()
    tensors = load_file(folder / SINGLE_NAME)
    name = next(name for name in tensors if name.endswith(ending.replace("__", ".")))
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / SINGLE_NAME)
    return name


def test_a_missing_tensor_of_a_block_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    tiny_model("llava").save_pretrained(tmp_path)
    rewrite(tmp_path, layers__0__mlp__down_proj__weight=None)
    with pytest.raises(InputError, match=r"lacks the tensor .*layers\.0\.mlp\.down_proj\.weight"):
        stream(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tiny_model("llava").save_pretrained(tmp_path)
    rewrite(tmp_path, layers__0__mlp__down_proj__weight=torch.zeros(32, 40))
    with pytest.raises(InputError, match=r"down_proj\.weight has shape \[32, 40\].* asks for \[32, 48\]"):
        stream(tmp_path)


NEEDED = {
    "output embedding": "lm_head.weight",
    "token embedding": "embed_tokens.weight",
    "projector": "multi_modal_projector.linear_1.weight",
    "norm behind the blocks": "norm.weight",
    "patch embedding": "patch_embedding.weight",
    "half of a block of the tower": "encoder.layers.0.mlp.fc1.bias",
}


@pytest.mark.parametrize("ending", NEEDED.values(), ids=NEEDED.keys())
def test_a_tensor_that_every_forward_needs_is_named_before_anything_is_loaded(ending: str, tmp_path: Path) -> None:
    tiny_model("llava").save_pretrained(tmp_path)
    name = rewrite(tmp_path, **{ending.replace(".", "__"): None})
    with pytest.raises(InputError, match=r"the checkpoint lacks the tensor ") as caught:
        stream(tmp_path)
    assert caught.value.problem.endswith(name.removeprefix("language_model.").rpartition("layers.")[2])


def test_many_missing_tensors_are_named_in_one_line(tmp_path: Path) -> None:
    tiny_model("llava").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE_NAME)
    save_file({name: one for name, one in tensors.items() if "projector" not in name}, tmp_path / SINGLE_NAME)
    with pytest.raises(InputError, match=r"lacks the tensors .*projector.*, .*projector.*, .*projector.* and 1 more$"):
        stream(tmp_path)


def test_an_older_transformers_is_said_where_tensors_seem_to_be_missing(tmp_path: Path) -> None:
    """As the embedded model is with releases before 5.6."""
    tiny_model("llava").save_pretrained(tmp_path)
    rewrite(tmp_path, multi_modal_projector__linear_1__weight=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "99.1.0"}))
    with pytest.raises(InputError, match=r"; transformers 99\.1\.0 wrote it, which may name them differently: \d"):
        stream(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "next"}))
    with pytest.raises(InputError, match=r"projector.linear_1.weight$"):
        stream(tmp_path)


def test_a_block_of_the_tower_that_is_missing_as_a_whole_is_named_when_it_is_needed(tmp_path: Path) -> None:
    """Of many towers the last blocks are not run, and some checkpoints lack them."""
    model = tiny_model("llava")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE_NAME)
    kept = {name: one for name, one in tensors.items() if not re.search(r"vision.*layers\.0\.", name)}
    save_file(kept, tmp_path / SINGLE_NAME)
    assert len(kept) < len(tensors)
    runner, weights = stream(tmp_path)
    weights.load_non_block_weights()
    with pytest.raises(InputError, match=r"lacks the tensor .*vision.*layers\.0\."):
        runner.catch(make_inputs("llava", model, [Sample(3, 0, 5)]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_though_nothing_announces_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llava").save_pretrained(tmp_path)
    name = rewrite(tmp_path, layers__1__mlp__down_proj__weight=torch.zeros(32, 48).to(dtype))
    with pytest.raises(InputError, match=rf"the weights are quantized \({re.escape(name)} is"):
        stream(tmp_path)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen3_omni_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, experts__3__up_proj__weight=None)
    with pytest.raises(InputError, match="experts"):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("family", "model_type"), [("qwen2_5_omni", "qwen2_5_omni"), ("qwen3_omni_moe", "qwen3_omni_moe")]
)
def test_an_omni_checkpoint_gives_its_thinker(family: str, model_type: str, tmp_path: Path) -> None:
    """The talker, which makes speech, is left alone."""
    try:
        transformers.AutoConfig.for_model(model_type)
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot make its own configuration: {error}")
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    thinker = load_file(tmp_path / SINGLE_NAME)
    whole = {f"thinker.{key}": tensor for key, tensor in thinker.items()} | {"talker.weight": torch.zeros(3)}
    save_file(whole, tmp_path / SINGLE_NAME)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "architectures": ["OmniModel"], "thinker_config": config})
    )
    runner, weights = stream(tmp_path)
    name = f"{runner.name(3)}.self_attn.q_proj.weight"
    assert weights.keys_of(name) == ["thinker.model.layers.3.self_attn.q_proj.weight"]
    weights.load_non_block_weights()
    weights.load_block(3)
    loaded = {path: tensor for path, tensor in runner.model.named_parameters() if tensor.device.type != "meta"}
    assert name in loaded
    for path, tensor in loaded.items():
        torch.testing.assert_close(tensor, model.get_parameter(path), rtol=0, atol=0, msg=path)
