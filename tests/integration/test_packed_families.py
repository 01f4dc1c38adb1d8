"""Packed checkpoints of twenty families in transformers: the same answers, saved again, unpacked again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.blocks import find_expert_stacks
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.packed.folder import PackedFolder, one_shard
from lvlm_prune.packed.format import METHOD, Format
from lvlm_prune.packed.linear import PackedLinear
from lvlm_prune.packed.shards import pack_shard, unpack_shard
from lvlm_prune.packed.weight import PackedWeight
from tests.families import FAMILIES, tiny_model

pytestmark = [
    pytest.mark.usefixtures("keep_packed"),
    pytest.mark.skipif(transformers.__version__ < "5", reason="packed checkpoints need transformers 5"),
]

SLOW = pytest.mark.slow
INDEX = "model.safetensors.index.json"
# The rest of the twenty takes a minute.
QUICK = ("llava", "qwen2_vl", "qwen3_omni_moe")


def write_sparse(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> set[str]:
    """A checkpoint in shards whose Linears and experts are 60% zero; names on disk of these."""
    model = tiny_model(family, dtype)
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    linears = [module.weight for module in model.modules() if type(module) is torch.nn.Linear and module is not head]
    stacks = [p for stack in find_expert_stacks(model) for p in stack.module.parameters() if p.ndim == 3]
    for weight in (*linears, *stacks):
        weight.data.masked_fill_(torch.rand(weight.shape) < 0.6, 0.0)
    model.save_pretrained(folder, max_shard_size="60KB")
    source = CheckpointFolder(folder)
    return {key for key in source if source[key].torch_dtype == dtype and (source.read(key) == 0).float().mean() > 0.3}


def pack(source: Path, target: Path, packable: set[str], form: Format = "bitmask") -> None:
    folder = CheckpointFolder(source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for shard in folder.shards:
        pack_shard(folder, shard, target, packable, form)
    if (source / INDEX).is_file():
        names = {key: shard for shard in folder.shards for key in one_shard(target, shard)}
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHOD, "format_version": 1, "format": form}
    (target / "config.json").write_text(json.dumps(config))


def load(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A model whose experts are computed one after the other, as those of packed models are."""
    model = model_class.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    ids = torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    types = {"token_type_ids": torch.zeros_like(ids)} if family in ("gemma3", "paligemma") else {}
    return model(input_ids=ids, **types).logits


@pytest.mark.parametrize("form", ["bitmask", "coded"])
@pytest.mark.parametrize("family", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in FAMILIES])
def test_a_packed_family_is_the_sparse_one(
    family: str, form: Format, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparse, packed, again, dense = (tmp_path / name for name in ("sparse", "packed", "again", "dense"))
    packable = write_sparse(sparse, family)
    pack(sparse, packed, packable, form)
    model_class = type(tiny_model(family))
    expected = load(model_class, sparse)
    model = load(model_class, packed)

    assert sum(isinstance(module, PackedLinear) for module in model.modules()) > 20
    if family == "qwen3_omni_moe":
        assert any(isinstance(module, PackedWeight) and module.ndim == 3 for module in model.modules())
    assert torch.equal(logits(model, family), logits(expected, family))
    assert model.get_memory_footprint() < 0.8 * expected.get_memory_footprint()

    model.save_pretrained(again, max_shard_size="60KB")
    assert set(PackedFolder.open(again).packed) == set(PackedFolder.open(packed).packed)
    assert torch.equal(logits(load(model_class, again), family), logits(expected, family))

    model.dequantize()
    assert torch.equal(logits(model, family), logits(expected, family))
    model.save_pretrained(dense)
    written, original = CheckpointFolder(dense), CheckpointFolder(sparse)
    assert set(written) == set(original)
    assert all(written.read_bytes(key) == original.read_bytes(key) for key in original)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["bitmask", "coded"])
def test_shards_come_back_byte_for_byte(form: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    sparse, packed, unpacked = (tmp_path / name for name in ("sparse", "packed", "unpacked"))
    pack(sparse, packed, write_sparse(sparse, "qwen3_omni_moe", dtype), form)
    unpacked.mkdir()
    shards = CheckpointFolder(sparse).shards
    assert len(shards) > 2
    for shard in shards:
        unpack_shard(packed, shard, unpacked)
        assert (unpacked / shard).read_bytes() == (sparse / shard).read_bytes()


_WITHOUT_THE_PACKAGE = """
import sys
from transformers import Qwen2VLForConditionalGeneration as Model
try:
    Model.from_pretrained(sys.argv[1])
except Exception as error:
    print("refused", type(error).__name__)
print("told to go on", file=sys.stderr, flush=True)
model = Model.from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
print("loaded", type(model).__name__)
"""


def test_without_this_package_nothing_is_taken_for_a_weight(tmp_path: Path) -> None:
    """The values are under the name of the weight, in another shape: an error, unless transformers is told to go on."""
    sparse, packed = tmp_path / "sparse", tmp_path / "packed"
    pack(sparse, packed, write_sparse(sparse, "qwen2_vl"))
    # The command line silences transformers, for this process and its children.
    loud = os.environ | {"TRANSFORMERS_VERBOSITY": "warning"}
    command = [sys.executable, "-c", _WITHOUT_THE_PACKAGE, str(packed)]
    child = subprocess.run(command, env=loud, capture_output=True, text=True, check=True)
    refused, loaded = child.stdout.splitlines()
    assert refused.startswith("refused")
    assert loaded == "loaded Qwen2VLForConditionalGeneration"
    by_itself, told_to_go_on = child.stderr.split("told to go on\n")
    assert "lvlm_prune_packed" in by_itself
    assert "mismatch" in by_itself.lower()
    assert "q_proj.weight" in told_to_go_on  # named, with what becomes of it
    assert "newly initialized" in told_to_go_on or "Reinit due to size mismatch" in told_to_go_on
