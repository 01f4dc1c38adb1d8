"""Diversities against the numbers of TAMP's released code, and against the matrix of all pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from lvlm_prune.methods.diversity import distance_to_others, mean_diversity, modality_diversity
from tests.conftest import REPOSITORY

TAMP = REPOSITORY / "tests" / "golden" / "tamp"


def reference(index):
    tensors = load_file(TAMP / "pure_functions.safetensors")
    numbers = json.loads((TAMP / "mini_net.json").read_text())["pure"][str(index)]
    return tensors[f"Z.{index}"], tensors[f"mask.{index}"].to(torch.int8), numbers


@pytest.mark.parametrize("index", range(4))
def test_terms_of_the_paper(index):
    outputs, modality, numbers = reference(index)
    score, terms = modality_diversity(outputs, modality)
    assert terms["visual"] == pytest.approx(1 - numbers["paper_v"], abs=1e-6)
    assert terms["text"] == pytest.approx(1 - numbers["paper_l"], abs=1e-6)
    assert terms["between"] == pytest.approx(1 - numbers["paper_vl"], abs=1e-6)
    assert score == pytest.approx(numbers["das_score_paper"], abs=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_positive_pairs_are_the_released_code(index):
    outputs, modality, numbers = reference(index)
    score, terms = modality_diversity(outputs, modality, pairs="positive")
    assert terms["visual"] == pytest.approx(1 - numbers["v"], abs=1e-6)
    assert terms["text"] == pytest.approx(1 - numbers["l"], abs=1e-6)
    assert 3 * score == pytest.approx(numbers["das_score_code"], abs=1e-5)
    assert mean_diversity(outputs, pairs="positive").item() == pytest.approx(1 - numbers["total"], abs=1e-6)


def test_no_positive_pair_is_a_distance_of_one_where_the_released_code_gives_nan():
    outputs, modality, numbers = reference(3)
    assert numbers["v"] is None
    assert modality_diversity(outputs, modality, pairs="positive")[1]["visual"] == 1.0


def test_stripes_of_the_matrix_of_pairs_add_up(monkeypatch):
    outputs, modality, _ = reference(2)
    whole = modality_diversity(outputs, modality, pairs="positive")[0]
    monkeypatch.setattr("lvlm_prune.methods.diversity._ROWS", 7)
    assert modality_diversity(outputs, modality, pairs="positive")[0] == pytest.approx(whole, abs=1e-7)


def test_audio_is_a_modality_of_its_own_and_a_term_that_is_not_there_does_not_count():
    outputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    modality = torch.tensor([0, 0, 0, 1, 2, 1, 3, 3, -1], dtype=torch.int8)
    unit = normalize(outputs, dim=-1)
    text, visual, audio = unit[:3], unit[3:6], unit[6:8]

    def within(part):
        return 1 - ((part @ part.T).sum() - len(part)) / (len(part) * (len(part) - 1))

    between = 1 - torch.stack([(text @ visual.T).mean(), (text @ audio.T).mean(), (visual @ audio.T).mean()]).mean()
    expected = torch.stack([within(text), within(visual), within(audio), between])
    score, terms = modality_diversity(outputs, modality)
    assert list(terms) == ["text", "visual", "audio", "between"]
    torch.testing.assert_close(torch.tensor(list(terms.values())), expected)
    assert score == pytest.approx(expected.mean().item(), abs=1e-6)
    assert list(modality_diversity(outputs[:3], modality[:3])[1]) == ["text"]
    assert list(modality_diversity(outputs[2:4], modality[2:4])[1]) == ["between"]
    assert modality_diversity(outputs[:1], modality[:1]) == (0.0, {})


def test_distance_to_others_needs_no_matrix_to_be_right():
    vectors = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) + 1
    unit = normalize(vectors, dim=-1)
    distance = 1 - unit @ unit.T
    torch.testing.assert_close(distance_to_others(vectors), distance.fill_diagonal_(0).sum(1) / 39)
    assert distance_to_others(vectors[:1]).tolist() == [0.0]
