"""What the model would refuse in the middle of a run is found when a sample is encoded."""

import json
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import SandboxedEnvironment
from PIL import Image
from tokenizers import Tokenizer

from lvlm_prune.data import (
    CalibrationDataModule,
    CalibrationSource,
    Conversation,
    Document,
    RecoveryDataModule,
    encode,
    load_processor,
    templates,
)
from lvlm_prune.data.conversation import load_image
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.data.processing import render
from lvlm_prune.errors import InputError, RunError
from tests.families import tiny_model
from tests.family_configs import IMAGE_TOKEN
from tests.hub_folders import write_processor

REFUSING = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['role'] }}: {{ m['content'][0]['text'] }}
{% endfor %}"""


class Turns(CalibrationSource):
    """Conversations of text, given as their turns."""

    def __init__(self, *samples: list[tuple[str, str]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Conversation:
        turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in self.samples[index]]
        return Conversation(turns, id=f"s{index}")


GOOD = [("user", "Hello?"), ("assistant", "Yes.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    write_processor(path, "llava")
    (path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}}))
    return path


@pytest.fixture(scope="module")
def processor(folder: Path):
    return load_processor(folder)


def test_the_limits_of_a_model_are_read_off_it():
    model = tiny_model("llava")
    limits = ModelLimits.of(model)
    assert limits.vocabulary == model.get_input_embeddings().num_embeddings
    assert limits.context_length == 512
    assert IMAGE_TOKEN in limits.placeholders


@pytest.mark.parametrize(
    ("ids", "problem"),
    [([5, 100], "token id 100, the model's vocabulary ends at 99"), ([-1], "token id -1"), ([1] * 9, "has 9 tokens")],
)
def test_inputs_beyond_the_limits_are_refused(ids: list[int], problem: str):
    with pytest.raises(RunError, match=problem):
        ModelLimits(vocabulary=100, context_length=8).refuse({"input_ids": torch.tensor([ids])})


def test_a_placeholder_that_is_no_word_of_the_vocabulary_is_none_of_them():
    ModelLimits(100, 8, frozenset({100})).refuse({"input_ids": torch.tensor([[5, 100, 100]])})


BEYOND = {
    "too long": ([*GOOD[:1], ("assistant", "yes " * 200)], None, "the model's context is 300"),
    "no such token": ([("user", "é"), ("assistant", "Yes.")], None, "the model's vocabulary ends at 98"),
    "system turn": ([("system", "Be kind."), *GOOD], REFUSING, "System role not supported"),
    "two turns in a row": ([("user", "Hello?"), *GOOD], REFUSING, "Conversation roles must alternate"),
    "broken template": (GOOD, "{{ 1 / 0 }}", "division by zero"),
    "nothing said": (GOOD, "{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out all that the user says"),
    "no answers": (
        GOOD,
        "{% for m in messages %}{{ m['role'] }}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        "leaves out all that the assistant says",
    ),
    "far too much": (GOOD, "{{ 'ab' * 35000000 }}", "makes 70000000 characters"),
    "only unknown tokens": (
        [("user", "éé"), ("assistant", "éé")],
        "{{ messages[0]['content'][0]['text'] }}",
        "no part",
    ),
}


@pytest.mark.parametrize(("turns", "template", "problem"), BEYOND.values(), ids=BEYOND.keys())
def test_what_template_or_model_refuse_names_the_sample_and_can_be_skipped(folder, turns, template, problem):
    processor = load_processor(folder)
    good = [GOOD] if template in (None, REFUSING) else []
    if template is not None:
        processor.chat_template = processor.tokenizer.chat_template = template
    limits = ModelLimits(vocabulary=99, context_length=300)
    source = Turns(turns, *good)
    with pytest.raises(RunError, match=f"^calibration s0: .*{problem}") as caught:
        list(CalibrationDataModule(source).calibration_batches(processor, limits=limits))
    assert "\n" not in str(caught.value)
    if good:
        data = CalibrationDataModule(source, on_error="skip")
        assert [batch.indices for batch in data.calibration_batches(processor, limits=limits)] == [[1]]
        assert [name for name, _ in data.skipped] == ["s0"]
    training = RecoveryDataModule(source, validation_samples=0)
    training.connect(processor, limits)
    training.setup()
    with pytest.raises(InputError, match=f"s0: .*{problem}"):
        training.examine()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" + (
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_template_that_loops_on_and_on_ends_the_run(on_error, folder, monkeypatch):
    """It would for each sample, so that none is left out."""
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    processor = load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = ENDLESS
    data = CalibrationDataModule(Turns(GOOD), on_error=on_error)
    with pytest.raises(InputError, match="its chat template does not come to an end"):
        list(data.calibration_batches(processor))


DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = n.x STEP %}{% endfor %}"
IMMENSE = {
    "a power": "{{ 10**(10**9) }}",
    "powers of powers": DOUBLED.replace("START", "9").replace("STEP", "** n.x"),
    "squares": DOUBLED.replace("START", "99").replace("STEP", "* n.x"),
    "lists": DOUBLED.replace("START", "[0]").replace("STEP", "+ n.x"),
    "lists at once": "{{ ([0] * 10**9)|length }}",
    "text": DOUBLED.replace("START", "'a'").replace("STEP", "* 99"),
}


@pytest.mark.parametrize("template", IMMENSE.values(), ids=IMMENSE.keys())
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_template_with_a_step_that_nothing_interrupts_is_refused_before_it(template, on_error, folder):
    processor = load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = template
    with pytest.raises(InputError, match="its chat template calculates with immense numbers"):
        list(CalibrationDataModule(Turns(GOOD), on_error=on_error).calibration_batches(processor))


ASKED = "What colour is the door of the small house behind the old mill, and who painted it?"
ANSWERED = "It is green; the miller's daughter painted it twice, in spring and once more before the winter came."
TURNS = "{% for m in messages %}{{ m['role'] }}: TEXT\n{% endfor %}"
CONTENT = "m['content'][0]['text']"


@pytest.mark.parametrize(
    ("text", "whose"),
    [
        (f"{{{{ {CONTENT}[:12] }}}}", "user"),
        (f"{{{{ {CONTENT}[:12] if m['role'] == 'assistant' else {CONTENT} }}}}", "assistant"),
        (f"{{{{ {CONTENT}.split(',')[0].split(' ')[:4]|join(' ') }}}}", "user"),
    ],
)
def test_a_template_that_keeps_a_small_part_of_the_last_turns_is_refused(text, whose, folder):
    processor = load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = TURNS.replace("TEXT", text)
    with pytest.raises(RunError, match=rf"keeps \d of the \d+ words that the {whose} says last"):
        render(processor, Turns([("user", ASKED), ("assistant", ANSWERED)])[0].messages)


@pytest.mark.parametrize(
    "template",
    [
        TURNS.replace("TEXT", f"{{{{ {CONTENT}|upper|trim }}}}"),
        TURNS.replace("TEXT", f"{{{{ {CONTENT}.split('</think>')|last }}}}"),  # what was only thought
        TURNS.replace("messages", "messages[-2:]").replace("TEXT", f"{{{{ {CONTENT} }}}}"),  # earlier turns
        TURNS.replace("messages", "messages[1:]").replace("TEXT", f"{{{{ {CONTENT} }}}}"),  # the system
    ],
)
@pytest.mark.parametrize("ended", ["</think>", "◁/think▷", "</reasoning>"])
def test_a_template_may_leave_out_what_is_not_said_last(template, ended, folder):
    processor = load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = template.replace("</think>", ended)
    thought = f"<think>{' '.join(map(str, range(100, 200)))}{ended}{ANSWERED}"
    first = [
        ("system", "Be kind."),
        ("user", "A first question of so many words that it counts."),
        ("assistant", "Yes."),
    ]
    assert render(processor, Turns([*first, ("user", ASKED), ("assistant", thought)])[0].messages)


def test_a_template_may_calculate(folder):
    """With what numbers conversations have; and others calculate as before."""
    processor = load_processor(folder)
    asked = "{{ messages|length * 2**10 }} {{ '-' * 3 }} {{ ([1] + [2])|length + 1.5 * 2 ** -1 }} {{ f(**{'a': 2}) }}"
    asked = (
        "{% macro f(a) %}{{ a }}{% endmacro %}"
        + asked
        + "{{ messages[0].content[0].text }}{{ messages[1].content[0].text }}"
    )
    processor.chat_template = processor.tokenizer.chat_template = asked
    assert render(processor, Turns(GOOD)[0].messages).startswith(f"{len(GOOD) * 2**10} --- 2.75 2")
    assert SandboxedEnvironment().from_string("{{ 2**(2**18) > 1 }}").render() == "True"


@pytest.mark.parametrize(("images", "context", "least"), [(5000, 4096, 5000), (300, 4096, 300 * 16)])
def test_more_images_than_any_context_holds_are_refused_before_one_is_decoded(
    images, context, least, processor, tmp_path
):
    """By their number, and by the tokens that each of them takes."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-25])  # its head is whole; whoever decodes it finds that the rest is not
    sample = Conversation([{"role": "user", "content": [{"type": "image"}] * images}], [tmp_path / "a.png"] * images)
    limits = ModelLimits(context_length=context)
    with pytest.raises(RunError, match=f"take {least} tokens at least, the model's context is 4096"):
        limits.refuse_media(processor, sample)
    for fitting in (sample.images[:17], sample.images[:1], []):
        limits.refuse_media(processor, Conversation(sample.messages, fitting))
    limits.refuse_media(None, Document("a"))
    with pytest.raises(RunError, match="cannot be read"):
        load_image(sample.images[0])


def test_samples_are_padded_with_a_token_that_the_model_has(folder: Path):
    processor = load_processor(folder)
    processor.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    limits = ModelLimits(vocabulary=processor.tokenizer.pad_token_id, context_length=300)
    data = CalibrationDataModule(Turns(GOOD, GOOD + GOOD), batch_size=2, padding_side="right")
    (batch,) = data.calibration_batches(processor, limits=limits)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert not mask.all()
    assert ids.max() < limits.vocabulary


SAVED = {
    "truncation": {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
    "padding": {
        "padding": {
            "strategy": {"Fixed": 300},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    },
}


@pytest.mark.parametrize("saved", [*SAVED, "model_max_length", "max_length"])
def test_what_training_left_in_a_tokenizer_neither_cuts_nor_pads(saved: str, folder: Path, processor, tmp_path: Path):
    write_processor(tmp_path, "llava")
    if saved in SAVED:
        content = json.loads((tmp_path / "tokenizer.json").read_text()) | SAVED[saved]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert getattr(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), saved) is not None
    else:
        content = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {saved: 8}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    left = load_processor(tmp_path)
    for sample in (Turns(GOOD * 5)[0], Document("Some text of a corpus. " * 10), Document("Some text.", max_tokens=5)):
        expected, found = encode(processor, sample), encode(left, sample)
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
