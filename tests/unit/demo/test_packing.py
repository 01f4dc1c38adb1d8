"""A question in a packed row is what the processor makes of it alone."""

from random import Random
from typing import Any

import pytest
import torch

from lvlm_prune.demo.datasets import conversation
from lvlm_prune.demo.making.packing import TASKS, PackedBatches, attention_mask, encode
from lvlm_prune.demo.making.training import EmbeddedModelTraining
from lvlm_prune.demo.processing import BOS_ID, IMAGE_ID, USER_ID, build_processor, build_tokenizer
from lvlm_prune.demo.questions import text_question, vision_questions
from lvlm_prune.demo.world import draw_indexed


@pytest.fixture(scope="module")
def processor():
    return build_processor(build_tokenizer())


def batches(processor, **changes):
    options: dict[str, Any] = {"image_rows": 2, "text_rows": 1, "row_length": 240, "emphasis": {}, "caption_share": 0.5}
    return PackedBatches(processor.tokenizer, "train", 0, batches=3, **(options | changes))


def segments_of(batch, row):
    for number in range(1, int(batch["segments"][row].max()) + 1):
        yield torch.where((batch["segments"][row] == 0) | (batch["segments"][row] == number))[0]


def test_tokens_are_those_of_the_processor(processor):
    scene, image, _ = draw_indexed("train", 0, 0)
    rng = Random(0)
    prefix = [BOS_ID, USER_ID] + [IMAGE_ID] * 144
    cases: list[tuple] = [(asked, image, prefix) for asked in vision_questions(scene, rng)]
    cases += [(text_question(task, "train", rng), None, [BOS_ID, USER_ID]) for task in ("facts", "sorting")]
    for asked, picture, start in cases:
        messages = conversation("", asked, picture)["messages"]
        text = processor.apply_chat_template(messages)
        expected = processor(text=text, images=picture, return_tensors="pt")["input_ids"][0].tolist()
        (segment,) = encode(processor.tokenizer, [asked], prefix=start)
        assert segment.prompt + segment.answer == expected
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
        assert processor(text=prompt, images=picture, return_tensors="pt")["input_ids"][0].tolist() == segment.prompt


def test_batch_is_a_function_of_split_seed_and_index(processor):
    first, again = batches(processor)[1], batches(processor)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], batches(processor)[2]["pixels"])


def test_labels_are_the_next_tokens_of_answers(processor):
    batch = batches(processor)[0]
    rows, tokens = torch.where(batch["labels"] >= 0)
    assert torch.equal(batch["labels"][rows, tokens], batch["input_ids"][rows, tokens + 1])
    assert torch.equal(batch["segments"][rows, tokens], batch["segments"][rows, tokens + 1])
    assert (batch["tasks"][rows, tokens] >= 0).all()
    assert (batch["weights"] > 0).sum() == len(rows)


def test_grounded_tokens_end_the_phrase_that_names_things(processor):
    batch = batches(processor, caption_share=0.0)[0]
    words = {
        processor.tokenizer.decode(batch["input_ids"][row, token]).strip()
        for row, token in zip(batch["grounding_rows"], batch["grounding_tokens"])
    }
    names = {"circle", "square", "triangle", "star", "cross", "diamond", "object", "objects", "sign", "number"}
    assert words <= names | {name + "s" for name in names} | {"crosses"}
    assert len(batch["grounding_cells"]) == len(batch["grounding_rows"]) > 10


def test_packed_questions_do_not_see_each_other(processor):
    """Logits in a packed row equal those of the model's own forward on each conversation alone."""
    torch.manual_seed(0)
    training = EmbeddedModelTraining(blocks=2, tower_blocks=1).eval()
    batch = batches(processor)[0]
    with torch.no_grad():
        hidden = training.hidden_states(batch, training.image_tokens(batch["pixels"]))[-1]
        packed = training.model.lm_head(hidden)
        training.model.set_attn_implementation("sdpa")
        for row in range(3):
            pixels = batch["pixels"][row : row + 1].permute(0, 3, 1, 2) / 127.5 - 1 if row < 2 else None
            for places in segments_of(batch, row):
                alone = training.model(input_ids=batch["input_ids"][row, places][None], pixel_values=pixels).logits[0]
                torch.testing.assert_close(packed[row, places], alone, atol=2e-4, rtol=1e-3)


def test_mask_is_causal_within_image_and_segment():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    expected = ["100000", "110000", "111000", "111100", "110010", "110001"]
    assert ["".join(str(int(seen)) for seen in row) for row in mask] == expected


def test_emphasis_on_an_unknown_task_is_refused(processor):
    with pytest.raises(ValueError, match="`emphasis` names unknown tasks: colour"):
        batches(processor, emphasis={"colour": 2.0})
    assert set(TASKS) >= {"color", "caption"}
