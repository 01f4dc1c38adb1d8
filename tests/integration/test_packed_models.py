"""What transformers and PEFT do with a packed model: precision, devices, state, adapters."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from lvlm_prune.packed.kernels.native import limited_to
from lvlm_prune.packed.linear import PackedLinear
from lvlm_prune.packed.weight import PackedWeight
from tests.integration.test_packed_families import pack, write_sparse

pytestmark = [
    pytest.mark.usefixtures("keep_packed"),
    pytest.mark.skipif(transformers.__version__ < "5", reason="packed checkpoints need transformers 5"),
]

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sparse checkpoint of a tiny Qwen2-VL in bfloat16, and the same packed."""
    root = tmp_path_factory.mktemp("models")
    pack(root / "sparse", root / "packed", write_sparse(root / "sparse", "qwen2_vl"))
    return root / "sparse", root / "packed"


def load(folder: Path, **options: object) -> PreTrainedModel:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def packed_linear(model: nn.Module) -> PackedLinear:
    return next(module for module in model.modules() if isinstance(module, PackedLinear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_cast_as_those_of_the_sparse_model(folders, dtype: torch.dtype) -> None:
    expected = logits(load(folders[0], dtype=dtype))
    # What a matrix is laid out for is decided when it is loaded.
    with limited_to("torch"):
        packed = load(folders[1], dtype=dtype)
        assert packed_linear(packed).weight.dtype == dtype
        assert torch.equal(logits(packed), expected)
    torch.testing.assert_close(logits(load(folders[1], dtype=dtype)), expected)


def test_a_packed_linear_changes_its_precision(folders) -> None:
    linear = packed_linear(load(folders[1]))
    dense = linear.weight.dense()
    linear.to(torch.float32)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight.dense(), dense.float())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_is_followed(folders, device_map: object) -> None:
    sparse, packed = folders
    assert torch.equal(logits(load(packed, device_map=device_map)), logits(load(sparse)))


def test_offloading_is_refused(folders, tmp_path: Path) -> None:
    device_map = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="cannot be offloaded"):
        load(folders[1], device_map=device_map, offload_folder=tmp_path)


def test_greedy_answers_are_equal(folders) -> None:
    sparse, packed = map(load, folders)
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(packed.generate(**options), sparse.generate(**options))


def test_the_weight_of_a_packed_linear_answers_as_a_tensor(folders) -> None:
    linear = packed_linear(load(folders[1]))
    dense = linear.weight.dense()
    assert linear.weight.shape == dense.shape
    assert (linear.weight.ndim, linear.weight.numel(), len(linear.weight)) == (2, dense.numel(), len(dense))
    assert torch.equal(linear.weight.T, dense.T)
    assert torch.equal(torch.abs(linear.weight), dense.abs())
    assert torch.equal(linear.weight[1], dense[1])
    inputs = torch.randn(3, dense.shape[1], dtype=dense.dtype)
    assert torch.equal(nn.functional.linear(inputs, linear.weight, linear.bias), linear(inputs))


def test_a_packed_weight_is_not_changed_in_silence(folders) -> None:
    weight = packed_linear(load(folders[1])).weight
    for change in (
        lambda: weight.zero_(),
        lambda: setattr(weight, "data", torch.zeros(weight.shape)),
        lambda: nn.init.normal_(weight),
        lambda: torch.add(torch.zeros(1), 1, out=weight),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


def test_adapters_are_trained_beside_packed_linears_and_not_merged(folders) -> None:
    model = load(folders[1], dtype=torch.float32)
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    assert torch.equal(logits(adapted), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises((TypeError, ValueError), match="cannot be changed"):
        adapted.merge_and_unload()


def test_adapters_of_a_packed_and_of_a_sparse_model_learn_alike(folders) -> None:
    gradients = []
    for folder in folders:
        torch.manual_seed(0)
        model = peft.get_peft_model(load(folder, dtype=torch.float32), peft.LoraConfig(target_modules=["v_proj"], r=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for of_sparse, of_packed in zip(*gradients, strict=True):
        torch.testing.assert_close(of_packed, of_sparse, rtol=1e-5, atol=1e-7)


def test_a_model_that_is_in_memory_is_not_pruned_packed(folders) -> None:
    import lvlm_prune
    from lvlm_prune.errors import InputError

    model = load(folders[1])
    with pytest.raises(InputError, match="is packed"):
        lvlm_prune.prune(model, [{"input_ids": IDS}])
    assert any(isinstance(module, PackedWeight) for module in model.modules())


@pytest.mark.parametrize("kernels", ["C++", "torch"])
def test_what_is_slower_packed_is_dense_in_memory_and_packed_on_disk(
    folders, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sparse, packed = folders
    load(packed).save_pretrained(tmp_path / "kept")
    monkeypatch.delenv("LVLM_PRUNE_KERNELS")
    if kernels == "torch":
        monkeypatch.setattr("lvlm_prune.packed.kernels.cpu.usable", lambda tensor: False)
    else:
        monkeypatch.setattr("lvlm_prune.packed.kernels.speed._measure", lambda matrix: False)
        monkeypatch.setattr("lvlm_prune.packed.kernels.speed._measured", {})
    model = load(packed)
    assert not any(isinstance(module, PackedLinear | PackedWeight) for module in model.modules())
    assert "packed weights are dense in memory" in caplog.text
    assert torch.equal(logits(model), logits(load(sparse)))
    model.save_pretrained(tmp_path / "unpacked")
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "unpacked")]
    assert contents[0] == contents[1]
