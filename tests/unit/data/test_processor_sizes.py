"""Sizes that would fill the memory are refused when the processor is loaded; those of real models are not."""

import json
import shutil
from pathlib import Path

import pytest

from lvlm_prune.data import load_processor
from lvlm_prune.data.processor_sizes import absurd_size
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.errors import InputError


def square(side: float) -> dict[str, float]:
    return {"height": side, "width": side}


@pytest.mark.parametrize(
    ("entries", "by_area", "problem"),
    [
        ({"size": square(336), "crop_size": square(336)}, False, None),
        ({"size": {"shortest_edge": 224}}, False, None),
        ({"size": square(336) | {"width": 1e6}}, False, "width: 1000000.0"),
        ({"image_processor": {"crop_size": square(10**6)}}, False, "height: 1000000"),
        ({"size": {"shortest_edge": 10**6}}, False, "shortest_edge: 1000000"),
        ({"size": {"longest_edge": 10**6}}, False, "longest_edge: 1000000"),
        ({"image_grid_pinpoints": [[336, 672], [672, 10**6]]}, False, "image_grid_pinpoints: 1000000"),
        ({"size": square(float("inf"))}, False, "height: inf"),
        # Qwen2-VL and its successors count pixels, and any number of them may be the most.
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, True, None),
        ({"min_pixels": 147384, "max_pixels": 10**12}, True, None),
        ({"min_pixels": 10**9}, True, "min_pixels: 1000000000"),
        ({"size": {"shortest_edge": 10**9, "longest_edge": 10**9}}, True, "shortest_edge: 1000000000"),
        ({"image_seq_length": 576, "num_additional_image_tokens": 1}, False, None),
        ({"image_seq_length": 10**9}, False, "image_seq_length: 1000000000"),
        ({"num_image_tokens": 10**9}, False, "num_image_tokens: 1000000000"),
        # Speech, and numbers that are no sizes.
        ({"n_samples": 4800000, "image_token_id": 200092, "rescale_factor": 0.004, "do_resize": True}, True, None),
    ],
)
def test_sizes_that_no_sample_can_be_made_with(entries, by_area, problem):
    assert absurd_size(entries, by_area) == problem


def test_a_processor_of_such_sizes_is_refused_when_it_is_loaded(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    file = folder / "processor_config.json"
    entries = json.loads(file.read_text())
    entries["image_processor"]["size"]["width"] = 10**7
    file.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"no sample can be made with width: 10000000 of its processor_config.json"):
        load_processor(folder)
