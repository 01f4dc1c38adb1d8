"""The embedded model with outlier channels: another distribution of weights, the same function."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lvlm_prune.checkpoints import resolve
from lvlm_prune.demo import CHECKPOINT, is_embedded
from lvlm_prune.demo.outliers import EXPONENTS, PAIRS, cached, rescaled
from lvlm_prune.errors import InputError

WEIGHTS = "2bb7e66b5fe9d20c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cached(CHECKPOINT, tmp_path_factory.mktemp("cache"))


def logits(folder, dtype, image):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.randint(5, 400, (1, 184), generator=torch.Generator().manual_seed(0))
    tokens[:, 10:154] = model.config.image_token_index
    with torch.inference_mode():
        return model(input_ids=tokens, pixel_values=image.to(dtype)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_the_same_bit_by_bit(folder, dtype):
    image = torch.randn(1, 3, 144, 144, generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(CHECKPOINT, dtype, image), logits(folder, dtype, image))


def test_every_pair_is_rescaled_by_powers_of_two_and_nothing_else_is_touched(folder):
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    touched = {".".join(name.split(".")[-3:-1]) for name in before if not torch.equal(before[name], after[name])}
    modules = {module for pair in PAIRS.values() for module in (pair.louder, *pair.quieter)}
    assert {module.rpartition(".")[2] for module in touched} == {module.rpartition(".")[2] for module in modules}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        ratio = (after[name].double() / tensor.double())[tensor != 0].log2()
        assert torch.equal(ratio, ratio.round()), name


def test_it_is_the_same_file_everywhere(folder):
    """Numbers in the documentation are of this one."""
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16] == WEIGHTS


def test_scales_and_their_inverses_give_back_the_weights():
    weights, exponents = load_file(CHECKPOINT / "model.safetensors"), load_file(EXPONENTS)
    again = rescaled(rescaled(weights, exponents), {name: -powers for name, powers in exponents.items()})
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_several_processes_that_ask_at_once_get_one_whole_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        (folder,) = set(pool.map(lambda _: cached(CHECKPOINT, tmp_path), range(8)))
    assert [one.name for one in tmp_path.iterdir()] == [folder.name]
    assert {file.name for file in folder.iterdir()} == {file.name for file in CHECKPOINT.iterdir()}


def test_the_name_stands_for_a_folder_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    folder = resolve("demo-outliers")
    assert folder.is_relative_to(tmp_path)
    assert is_embedded(folder)
    assert resolve("demo-outliers") == folder
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"model\.path demo-outliers: cannot be made in the cache of HF_HOME"):
        resolve("demo-outliers")
