import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from lvlm_prune.data import CalibrationDataModule, CalibrationSource, Conversation, Document, encode, load_processor
from lvlm_prune.data.processing import refusals, takes_videos
from lvlm_prune.errors import InputError, RunError

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.effect_noise((width, height), 50).convert("RGB")


def text_of(processor, inputs: dict[str, torch.Tensor]) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.decode(inputs["input_ids"][0])


def write_folder(folder: Path, model_type: str, tokenizer, images=None, **processor_config) -> Path:
    tokenizer.save_pretrained(folder)
    if images is not None:
        images.save_pretrained(folder)
    config = {"model_type": model_type, **({"vision_config": {}} if model_type != "llama" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    if processor_config:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))
    return folder


def test_round_trip_through_a_folder(tmp_path: Path, processor):
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    image = picture()
    before = encode(processor, Conversation([QUESTION, ANSWER], [image]))
    after = encode(loaded, Conversation([QUESTION, ANSWER], [image]))
    assert set(before) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_same_inputs_as_transformers_own_chat_template(processor):
    image = picture()
    inline = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
    reference = processor.apply_chat_template(
        [inline, ANSWER], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False
    )
    inputs = encode(processor, Conversation([QUESTION, ANSWER], [image]))
    assert set(inputs) == set(reference)
    assert all(torch.equal(inputs[name], reference[name]) for name in inputs)


def test_whole_answer_and_no_generation_prompt(processor):
    conversation = Conversation([QUESTION, ANSWER], [picture()])
    text = text_of(processor, encode(processor, conversation)).replace("<image>", "")
    assert text == "user: \nWhat?</s>assistant: A cat.</s>"
    question = Conversation([QUESTION], [picture()])
    text = text_of(processor, encode(processor, question, add_generation_prompt=True)).replace("<image>", "")
    assert text == "user: \nWhat?</s>assistant: "


def test_images_are_turned_upright(tmp_path: Path, processor):
    upright = Image.new("RGB", (16, 16), "red")
    upright.paste("blue", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "lying.png", exif=exif)
    expected = encode(processor, Conversation([QUESTION], [upright]))["pixel_values"]
    assert torch.equal(encode(processor, Conversation([QUESTION], [tmp_path / "lying.png"]))["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_any_image_mode(processor, mode):
    inputs = encode(processor, Conversation([QUESTION], [picture().convert(mode)]))
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision these folders need a video processor")
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "llava_next_video"])
def test_models_of_images_and_videos_take_images_without_torchvision(tmp_path: Path, byte_tokenizer, family):
    tokens = ["<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    anyres = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
    if family == "qwen2_vl":
        images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
        folder = write_folder(tmp_path, family, byte_tokenizer(*tokens, template=QWEN_TEMPLATE), images)
        count, count_of_two, image_token = 12, 24, "<|image_pad|>"
    elif family == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, **anyres)
        folder = write_folder(
            tmp_path, family, byte_tokenizer(*tokens), images, processor_class="LlavaOnevisionProcessor",
            num_image_tokens=16, vision_feature_select_strategy="full",
        )  # fmt: skip
        count, count_of_two, image_token = 70, 2 * 17, "<image>"  # several images: no tiles
    else:
        crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        images = LlavaNextImageProcessorPil(**crop, **anyres)
        folder = write_folder(
            tmp_path, family, byte_tokenizer(*tokens), images, processor_class="LlavaNextVideoProcessor",
            patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
        count, count_of_two, image_token = 70, 140, "<image>"
    processor = load_processor(folder)
    inputs = encode(processor, Conversation([QUESTION, ANSWER], [picture(40, 30)]))
    text = text_of(processor, inputs)
    assert text.count(image_token) == count
    assert text.endswith("What?</s>assistant: A cat.</s>")
    two = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}
    inputs = encode(processor, Conversation([two], [picture(40, 30), picture(40, 30)]))
    assert text_of(processor, inputs).count(image_token) == count_of_two
    assert "pixel_values" not in encode(processor, Conversation([ANSWER]))
    document = encode(processor, Document("a <image> b"))
    assert ("mm_token_type_ids" in document) == (family == "qwen2_vl")


def test_a_template_for_plain_strings(processor, monkeypatch):
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    conversation = Conversation([QUESTION, ANSWER], [picture()])
    for template in (plain, plain.replace("m['content']", "m['content'] + ''")):
        monkeypatch.setattr(processor, "chat_template", template)
        text = text_of(processor, encode(processor, conversation))
        assert text == "user: " + "<image>" * 16 + "What?</s>assistant: A cat.</s>"


def test_base_models_without_a_template(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    text = text_of(processor, encode(processor, Conversation([QUESTION, ANSWER], [picture()])))
    assert text == "<image>" * 16 + "What?\nA cat."


def test_an_empty_template_counts_as_none_as_transformers_own_processor_has_it(tmp_path: Path, processor, caplog):
    sample = Conversation([{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}])
    texts = []
    for folder in (tmp_path / "empty", tmp_path / "none"):
        processor.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        if folder.name == "empty":
            (folder / "chat_template.jinja").write_text("")
        loaded = load_processor(folder)
        texts.append(text_of(loaded, encode(loaded, sample)))
    assert texts[0] == texts[1]
    assert "Hi?" in texts[0]
    (said,) = [one.getMessage() for one in caplog.records]
    assert said.startswith(f"the chat template of {tmp_path / 'empty'} is empty")


def test_a_template_that_lies_with_the_tokenizer(processor, monkeypatch):
    conversation = Conversation([QUESTION, ANSWER], [picture()])
    expected = text_of(processor, encode(processor, conversation))
    template = processor.chat_template
    monkeypatch.setattr(processor, "chat_template", None)
    monkeypatch.setattr(processor.tokenizer, "chat_template", template)
    assert text_of(processor, encode(processor, conversation)) == expected


def test_first_token_comes_once(byte_tokenizer):
    tokenizer = byte_tokenizer()
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    by_tokenizer = encode(tokenizer, Conversation([ANSWER]))["input_ids"][0].tolist()
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    by_template = encode(tokenizer, Conversation([ANSWER]))["input_ids"][0].tolist()
    assert by_tokenizer == by_template
    assert by_template.count(first) == 1
    document = encode(tokenizer, Document("a <s> in the text", max_tokens=9))["input_ids"][0].tolist()
    assert document[0] == first
    assert document.count(first) == 1
    assert len(document) == 9


def test_special_tokens_of_a_document_are_plain_text_and_later_ones_are_not(processor):
    document = encode(processor, Document("an <image></s>"))["input_ids"]
    assert not torch.isin(document, torch.tensor(processor.tokenizer.all_special_ids)).any()
    conversation = encode(processor, Conversation([QUESTION], [picture()]))["input_ids"]
    assert (conversation == processor.image_token_id).sum() == 16


def test_language_models_have_only_a_tokenizer(tmp_path: Path, byte_tokenizer):
    tokenizer = load_processor(write_folder(tmp_path, "llama", byte_tokenizer()))
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert text_of(tokenizer, encode(tokenizer, Conversation([ANSWER]))) == "assistant: A cat.</s>"
    assert text_of(tokenizer, encode(tokenizer, Document("some text", max_tokens=4))) == "some"
    with pytest.raises(ValueError, match="takes only text"):
        encode(tokenizer, Conversation([QUESTION], [picture()]))


def test_folders_without_tokenizer_or_processor(tmp_path: Path, byte_tokenizer):
    with pytest.raises(InputError) as error:
        load_processor(tmp_path)
    assert str(error.value) == (
        f"--model.path {tmp_path}: has no tokenizer files (tokenizer.json, ...); copy them from the original model, or "
        "use data.source TensorSource, which needs none"
    )
    for model_type in ("llava", "qwen2_vl"):
        folder = write_folder(tmp_path / model_type, model_type, byte_tokenizer("<image>"))
        with pytest.raises(
            InputError, match=r"has (a tokenizer but )?no processor files \(preprocessor_config"
        ) as error:
            load_processor(folder)
        assert "\n" not in str(error.value)


def test_a_damaged_folder(tmp_path: Path, processor):
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"^--model.path .*: its processor cannot be loaded \("):
        load_processor(tmp_path)


DAMAGED = {
    "empty": b"",
    "another encoding": "{}".encode("utf-16"),
    "a list": b"[]",
    "deeply nested": b"[" * 100_000,
    "a class that is no name": b'{"processor_class": ["LlavaProcessor"]}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_configuration_of_the_processor(content: bytes, tmp_path: Path, processor):
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_bytes(content)
    assert not takes_videos(tmp_path)  # asked of every output, for its model card
    with pytest.raises(
        InputError, match=r"^--model.path .*: (its processor cannot be loaded \(|has a tokenizer but no)"
    ):
        load_processor(tmp_path)


def test_a_processor_without_its_library_ends_no_run(tmp_path: Path):
    """The card of every output asks whether the processor takes videos; without torchvision Pixtral's says nothing."""
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    assert not takes_videos(tmp_path)


def test_what_the_processor_refuses_is_named(tmp_path: Path, byte_tokenizer):
    class Strip(CalibrationSource):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Conversation:
            return Conversation([QUESTION], [picture(2000, 4)], id="strip")

    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    tokenizer = byte_tokenizer(
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", template=QWEN_TEMPLATE
    )
    processor = load_processor(write_folder(tmp_path, "qwen2_vl", tokenizer, images))
    message = (
        r"^calibration strip: Qwen2VLProcessor refuses it: absolute aspect ratio must be smaller than 200, got 500"
    )
    with pytest.raises(RunError, match=message):
        list(CalibrationDataModule(Strip()).calibration_batches(processor))


def test_a_template_that_writes_more_than_there_is_memory_is_no_fault_of_a_sample():
    """So that it cannot be skipped, sample after sample."""
    with pytest.raises(InputError, match="takes more memory than there is"), refusals(None):
        raise MemoryError
