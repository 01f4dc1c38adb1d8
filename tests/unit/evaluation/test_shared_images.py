"""Likelihoods of right answers: an image is forwarded once for all its questions, and no number changes."""

import pytest
import torch
from PIL import Image

from lvlm_prune.data.processing import load_processor
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.evaluation import shared_images
from lvlm_prune.evaluation.likelihood import AnswerLikelihood
from lvlm_prune.evaluation.scores import Question
from lvlm_prune.module import LVLMModule
from tests.hub_folders import write_folder

TEXTS = [("What is it?", "noise"), ("Is it noise?", "yes, it is"), ("How many?", "one"), ("What colour is it?", "grey")]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Three images of two shapes with four, four and one questions, and two questions without an image."""
    images = [picture(0, (32, 32)), picture(1, (40, 20)), picture(2, (32, 32))]
    about = [Question("t", "vision", text, answer, image) for image in images[:2] for text, answer in TEXTS]
    about.insert(2, Question("t", "vision", *TEXTS[0], images[2]))
    return [*about, *(Question("t", "text", text, answer) for text, answer in TEXTS[:2])]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A family's tiny model, whose answers depend much on the image, in a folder of its own."""

    def make(family: str):
        folder = tmp_path_factory.mktemp("shared") / family
        model = write_folder(folder, family)
        with torch.no_grad():
            model.get_output_embeddings().weight *= 30
            for name, parameter in model.named_parameters():
                if "projector" in name and parameter.ndim == 2:
                    parameter *= 10
        model.save_pretrained(folder)
        module = LVLMModule(str(folder), "float32")
        module.open()
        module.load_whole()
        return module, load_processor(folder)

    return make


def answers(module, processor, questions, tmp_path, batch_size: int = 8):
    """Number of each question -> its logits and tokens; and what asked."""
    likelihood = AnswerLikelihood(questions, batch_size, 16, tmp_path, Processes())
    asking = likelihood._answers(module, processor)
    found = {number: (logits, tokens) for number, logits, tokens in asking(likelihood.numbers, batch_size)}
    return found, asking


def plain(module, processor, questions, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shared_images.SharedImages, "_shared", lambda self, numbers: None)
        return answers(module, processor, questions, tmp_path)[0]


@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize("family", ["llava", "llava_next_llama", "qwen2_vl"])
def test_logits_are_those_of_each_question_alone(family, batch_size, opened, questions, tmp_path, monkeypatch):
    module, processor = opened(family)
    expected = plain(module, processor, questions, tmp_path, monkeypatch)
    found, asking = answers(module, processor, questions, tmp_path, batch_size)
    assert asking.exact is (family != "qwen2_vl"), "positions of Qwen2-VL go on behind an image in a way of their own"
    assert sorted(found) == sorted(expected) == list(range(len(questions)))
    for number, (logits, tokens) in expected.items():
        assert torch.equal(found[number][1], tokens)
        torch.testing.assert_close(found[number][0], logits, rtol=1e-3, atol=2e-4)


def test_an_image_is_encoded_once_for_all_its_questions(opened, questions, tmp_path):
    module, processor = opened("llava")
    seen = []
    tower = next(part for name, part in module.model.named_modules() if name.endswith("vision_tower"))
    with tower.register_forward_hook(lambda *_: seen.append(1)):
        answers(module, processor, questions, tmp_path)
    # One forward for both images of four questions, one that holds the first eight against it, one for the lone one.
    assert len(seen) == 3


def test_a_model_for_which_it_is_wrong_is_asked_the_plain_way(opened, questions, tmp_path, monkeypatch):
    module, processor = opened("llava")
    expected = plain(module, processor, questions, tmp_path, monkeypatch)
    right = shared_images._cache_of

    def wrong(module, inputs):
        return right(module, inputs | {"pixel_values": inputs["pixel_values"].flip(0)})

    monkeypatch.setattr(shared_images, "_cache_of", wrong)
    found, asking = answers(module, processor, questions, tmp_path)
    assert asking.exact is False
    for number, (logits, _) in expected.items():
        torch.testing.assert_close(found[number][0], logits)
