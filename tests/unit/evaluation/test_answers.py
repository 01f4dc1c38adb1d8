"""The scorer asks through processor and ``generate``; its shortcut for images changes no answer."""

import json

import pytest
import torch
from PIL import Image

from lvlm_prune.checkpoints.versions import cache_argument
from lvlm_prune.demo.making.training import EmbeddedModelTraining
from lvlm_prune.demo.processing import build_processor, build_tokenizer
from lvlm_prune.errors import RunError
from lvlm_prune.evaluation import answers
from lvlm_prune.evaluation.answers import Question, Scores, answer, retention, score
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark


@pytest.fixture(scope="module")
def untrained():
    """A model with random weights: its answers are noise, but the same noise each time, and depend on the image."""
    torch.manual_seed(0)
    model = EmbeddedModelTraining(blocks=2, tower_blocks=1).model.eval()
    for parameter in model.model.vision_tower.parameters():
        parameter.data *= 3
    model.set_attn_implementation("sdpa")
    return model, build_processor(build_tokenizer())


IMAGES = 3


@pytest.fixture(scope="module")
def questions():
    return EmbeddedBenchmark(num_images=IMAGES, num_text=8, seed=1).questions


def generate_alone(model, processor, question):
    """One question, one ``generate``, as the documentation of transformers has it."""
    content = [{"type": "text", "text": question.question}]
    images = None
    if question.image is not None:
        content.insert(0, {"type": "image"})
        images = [question.image]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def answered_alone(untrained, questions):
    return [generate_alone(*untrained, question) for question in questions]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_answers_are_those_of_generate_on_each_question_alone(untrained, questions, answered_alone, batch_size):
    model, processor = untrained
    answers = answer(model, processor, questions, batch_size=batch_size)
    assert len(set(answers)) > 3, "the answers are too much alike to tell anything"
    for question, given, alone in zip(questions, answers, answered_alone):
        assert given
        assert alone.startswith(given), question  # the scorer stops a little behind the length of the right answer


def test_image_is_encoded_once_for_all_its_questions(untrained, questions):
    model, processor = untrained
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    vision = [question for question in questions if question.group == "vision"]
    answer(model, processor, vision, batch_size=16)
    hook.remove()
    assert encoded[1] <= 16  # the first batch is also asked without the shortcut
    assert encoded[0] + sum(encoded[2:]) == IMAGES


def test_a_model_for_which_the_shortcut_is_wrong_is_asked_the_plain_way(untrained, questions, monkeypatch):
    model, processor = untrained
    expected = answer(model, processor, questions, batch_size=16)
    right = answers._Answerer._shared_inputs

    def wrong(self, prompts, images, limit):
        """A cache that belongs to other images."""
        inputs = right(self, prompts, images, limit)
        (cache,) = cache_argument(inputs).values()
        cache.batch_select_indices(torch.arange(len(prompts)).flip(0))
        return inputs

    for replacement in (wrong, lambda self, prompts, images, limit: None):
        monkeypatch.setattr(answers._Answerer, "_shared_inputs", replacement)
        assert answer(model, processor, questions, batch_size=16) == expected


def test_score_counts_exact_answers(untrained, questions, monkeypatch):
    half_right = [q.answer if number % 2 else q.answer + " or not" for number, q in enumerate(questions)]
    monkeypatch.setattr(answers, "answer", lambda *arguments: half_right)
    model, processor = untrained
    scores = score(model, processor, questions)
    right = sum(scores.tasks[task] * count for task, count in scores.counts.items())
    assert right == pytest.approx(len(questions) // 2)
    assert sum(scores.counts.values()) == len(questions)
    assert set(scores.groups) == {"vision", "text"}


def test_progress_counts_questions(untrained, questions):
    model, processor = untrained
    done: list[int] = []
    score(model, processor, questions, batch_size=16, progress=done.append)
    assert len(done) > 1
    assert sum(done) == len(questions)


def test_the_model_is_left_as_it_was(untrained, questions):
    model, processor = untrained
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    answer(model, processor, questions[:3])
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_bad_arguments_are_refused(untrained):
    model, processor = untrained
    question = Question("color", "vision", "What color?", "red", Image.new("RGB", (144, 144)))
    with pytest.raises(ValueError, match="`questions` is empty"):
        score(model, processor, [])
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        score(model, processor, [question], batch_size=0)


def test_scores_survive_json():
    scores = Scores({"color": 0.5, "facts": 1.0}, {"color": 2, "facts": 3}, {"color": "vision", "facts": "text"})
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    assert scores.average == 0.75


def test_retention_is_the_mean_of_ratios_not_the_ratio_of_means():
    groups = {"color": "vision", "place": "vision", "facts": "text"}
    counts = dict.fromkeys(groups, 10)
    dense = Scores({"color": 1.0, "place": 0.5, "facts": 0.0}, counts, groups)
    pruned = Scores({"color": 0.5, "place": 0.5, "facts": 0.0}, counts, groups)
    kept = retention(pruned, dense)
    assert kept.tasks == {"color": 0.5, "place": 1.0}  # nothing can be said about facts
    assert kept.groups == {"vision": 0.75}
    assert kept.average == 0.75
    with pytest.raises(RunError, match="same questions"):
        retention(Scores(pruned.tasks, dict.fromkeys(groups, 9), groups), dense)
