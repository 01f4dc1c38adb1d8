"""Folders with two pathways: an engine that loads one, in this process or in a harness, scores the routed model."""

import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from lvlm_prune.blocks.routing import routed
from lvlm_prune.data import TensorSource
from lvlm_prune.evaluation.harness import LMMSEvalEngine
from lvlm_prune.evaluation.pathways import routed_when_loaded, write_pathways
from lvlm_prune.runs.probe.pathways import is_probed
from tests.conftest import GOLDEN, MODEL

DENSE = MODEL
HARNESS = '''
"""A harness with one task: how far the model's logits spread."""
import json, pathlib, sys
import torch
from transformers import AutoModelForImageTextToText

arguments = dict(zip(sys.argv[1::1], sys.argv[2::1]))
given = dict(part.split("=", 1) for part in arguments["--model_args"].split(","))
model = AutoModelForImageTextToText.from_pretrained(given["pretrained"], dtype=torch.float32).eval()
with torch.no_grad():
    score = model(**torch.load(given["inputs"])).logits.double().std().item()
folder = pathlib.Path(arguments["--output_path"])
(folder / "results.json").write_text(json.dumps({"results": {"gqa": {"exact_match,none": score}}}))
'''


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs():
    source = TensorSource(str(GOLDEN / "calib.safetensors"))
    source.setup()
    return source[0]


@pytest.fixture(scope="module")
def pathways(tmp_path_factory, inputs):
    """Folders with two pathways, and the logits of the routed model, by pathway."""
    model, found = load(DENSE), {}
    linears = {name: linear for name, linear in model.named_modules() if isinstance(linear, torch.nn.Linear)}
    half = {name: linear.weight * 0.5 for name, linear in linears.items() if ".layers." in name and is_probed(name)}
    for pathway in ("text", "visual"):
        folder = tmp_path_factory.mktemp("pathways") / pathway
        write_pathways(DENSE, folder, {name: weight.detach() for name, weight in half.items()}, pathway)
        with torch.no_grad(), routed(model, half, pathway):
            found[pathway] = folder, model(**inputs).logits
    return found


@pytest.mark.parametrize("pathway", ["text", "visual"])
@torch.no_grad()
def test_what_is_loaded_from_the_folder_is_routed_and_nothing_else(pathway, pathways, inputs):
    folder, expected = pathways[pathway]
    before = PreTrainedModel.__dict__["from_pretrained"]
    with routed_when_loaded(folder):
        model, dense = load(folder), load(DENSE)
        assert torch.equal(model(**inputs).logits, expected)
        plain = dense(**inputs).logits
        assert not torch.equal(plain, expected)
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    assert torch.equal(model(**inputs).logits, plain)


def test_a_harness_in_its_own_interpreter_scores_the_routed_model(pathways, inputs, tmp_path):
    package = tmp_path / "packages" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(HARNESS)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH="{package.parent}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)
    torch.save(inputs, tmp_path / "inputs.pt")
    given = {"inputs": str(tmp_path / "inputs.pt")}
    engine = LMMSEvalEngine(["gqa"], str(interpreter), model_args=given)
    folder, expected = pathways["text"]
    scores = engine.score(folder)
    assert scores.tasks["gqa"] == pytest.approx(expected.double().std().item())
