"""Every decoder of transformers' image-text-to-text mapping that can be pruned is packed, loaded and unpacked."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families.checks import own_forward
from benchmarks.families.coverage import RESULTS, run
from benchmarks.families.tiny_config import mend_forward, names, tiny_model
from benchmarks.families.verdicts import EXACT, verdict
from benchmarks.families.visual_inputs import image_samples, text_samples
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.cli import main
from lvlm_prune.packed.linear import PackedLinear
from lvlm_prune.packed.weight import PackedWeight

QUICK = ("llava", "qwen3_5_moe", "qwen3_vl_moe")
PARTS = ("dense", "sparse", "small", "again", "saved", "whole_packed", "whole_dense")


def packed(name: str) -> dict[str, Any]:
    """What became of a tiny model that was pruned, packed, loaded, saved and unpacked."""
    model = tiny_model(name)
    with tempfile.TemporaryDirectory() as scratch:
        dense, sparse, small, again, saved, whole_packed, whole_dense = (Path(scratch, part) for part in PARTS)
        model.save_pretrained(dense, max_shard_size="300KB")
        own = "--pruning.scorer MagnitudeScorer --pruning.sparsity 0.6 --report false"
        for command in (
            f"prune --model.path {dense} {own} --output {sparse}",
            f"pack --model.path {sparse} --output {small}",
            f"unpack --model.path {small} --output {again}",
        ):
            if status := main(command.split()):
                return {"reason": f"{command.split()[0]} ended with status {status}"}
        files = [path for path in sparse.iterdir() if path.suffix == ".safetensors"]
        loaded = [type(model).from_pretrained(folder).eval() for folder in (sparse, small)]
        loaded[1].save_pretrained(saved)
        loaded.append(type(model).from_pretrained(saved).eval())
        whole = type(model).from_pretrained(small)
        whole.save_pretrained(whole_packed)
        whole.dequantize()
        whole.save_pretrained(whole_dense)
        written, original = CheckpointFolder(whole_dense), CheckpointFolder(sparse)
        found = {
            "same_when_dense": set(written) == set(original)
            and all(written.read_bytes(key) == original.read_bytes(key) for key in original),
            "same_files": all((again / path.name).read_bytes() == path.read_bytes() for path in files),
            "packed": [sum(isinstance(m, PackedLinear | PackedWeight) for m in one.modules()) for one in loaded],
        }
        for one in loaded:
            mend_forward(one)
            one.set_experts_implementation("eager")
        samples = text_samples(1)
        with suppress(ValueError):  # takes images in none of the usual forms
            samples += image_samples(loaded[0], 1)
        outputs = []
        for sample in samples:
            try:
                outputs.append([own_forward(one, sample)[1] for one in loaded])
            except Exception:
                if sample is not samples[0]:  # a family need not take text alone
                    raise
        found["compared"] = len(outputs)
        found["same_outputs"] = all(
            torch.allclose(first, other, rtol=1e-4, atol=1e-5) for first, *others in outputs for other in others
        )
    return found


def exact_names() -> list[str]:
    results = json.loads(RESULTS.read_text())["results"]
    return [name for name in names() if name in results and verdict(name, results[name]) == EXACT]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in exact_names()])
def test_a_decoder_is_packed_loaded_and_unpacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVLM_PRUNE_KERNELS", "avx512")  # small matrices stay packed too
    found = run(name, seconds=300, work=packed)
    assert found.get("same_files"), found
    assert found["packed"][0] == 0, found
    assert found["packed"][1] == found["packed"][2] > 0, found
    assert found["same_when_dense"], found
    assert found["compared"] > 0, found
    assert found["same_outputs"], found
