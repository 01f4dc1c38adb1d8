"""What each family's own processor makes of odd samples: turns, several images, no image, strips, videos, sounds."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lvlm_prune.data import CalibrationDataModule, CalibrationSource, Conversation, encode, load_processor
from lvlm_prune.errors import InputError, RunError
from tests.families import FAMILIES as MODELS
from tests.hub_folders import PARTS, write_processor, write_sounds

FAMILIES = [family for family, parts in PARTS.items() if parts.images is not None]
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]}
# Families whose processor refuses a side more than 200 times as long as the other one.
REFUSE_STRIPS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni_moe", "video_llama_3"}


class Samples(CalibrationSource):
    """Given conversations."""

    def __init__(self, *conversations: Conversation) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversations[index]


@pytest.fixture(scope="module")
def processor_of(tmp_path_factory):
    """The processor of a family, loaded from a folder as on the hub."""
    loaded = {}

    def load(family: str):
        if family == "smolvlm":
            pytest.importorskip("num2words")
        if family not in loaded:
            folder = tmp_path_factory.mktemp(family)
            MODELS[family].config().save_pretrained(folder)
            write_processor(folder, family)
            loaded[family] = load_processor(folder)
        return loaded[family]

    return load


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 50).convert("RGB")


def placeholders(processor, inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["input_ids"] == processor.image_token_id).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_images_and_text(family: str, processor_of):
    processor = processor_of(family)
    question = {"role": "user", "content": [IMAGE, TEXT]}
    one = Conversation([question, ANSWER], [picture(32, 32)], "one")
    turns = Conversation([question, ANSWER, {"role": "user", "content": [TEXT]}, ANSWER], [picture(32, 32)], "turns")
    both = [{"role": "user", "content": [IMAGE, TEXT, IMAGE]}, ANSWER, question, ANSWER]
    three = Conversation(both, [picture(32, 32), picture(32, 32), picture(32, 32)], "three")
    text = Conversation([{"role": "user", "content": [TEXT]}, ANSWER], id="text")
    data = CalibrationDataModule(Samples(one, turns, three, text), on_error="skip")
    found = {batch.indices[0]: batch.inputs for batch in data.calibration_batches(processor)}
    # PaliGemma's own processor takes no sample without an image.
    assert [name for name, _ in data.skipped] == (["text"] if family == "paligemma" else [])
    assert placeholders(processor, found[0]) == placeholders(processor, found[1]) > 0
    assert placeholders(processor, found[2]) >= 3 or family == "mllama"
    assert found[1]["input_ids"].shape[1] > found[0]["input_ids"].shape[1]
    if family != "paligemma":
        assert placeholders(processor, found[3]) == 0
        assert not any(name.startswith("pixel_values") for name in found[3])


@pytest.mark.parametrize("size", [(4, 2000), (2000, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_strips_work_or_are_named(family: str, size: tuple[int, int], processor_of):
    processor = processor_of(family)
    strip = Conversation([{"role": "user", "content": [IMAGE, TEXT]}, ANSWER], [picture(*size)], "strip")
    data = CalibrationDataModule(Samples(strip))
    if family not in REFUSE_STRIPS:
        (batch,) = data.calibration_batches(processor)
        assert placeholders(processor, batch.inputs) > 0
        return
    with pytest.raises(RunError, match=r"^calibration strip: \w+ refuses it: absolute aspect ratio") as error:
        list(data.calibration_batches(processor))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_audio"])
def test_videos_and_sounds_are_one_line_where_they_cannot_be_read(family: str, processor_of, tmp_path: Path):
    from transformers.utils import is_torchvision_available

    processor = processor_of(family)
    name = type(processor).__name__
    video = {"role": "user", "content": [{"type": "video"}, TEXT]}
    takes_videos = any("video" in part for part in processor.get_attributes())
    if not (takes_videos and is_torchvision_available()):
        problem = f"^{name}: .* torchvision" if takes_videos else f"it has a video, and {name} takes none"
        with pytest.raises(InputError if takes_videos else RunError, match=problem) as error:
            encode(processor, Conversation([video], videos=[tmp_path / "a.mp4"]))
        assert "\n" not in str(error.value)
    sound = {"role": "user", "content": [{"type": "audio"}, TEXT]}
    takes_sounds = PARTS[family].sounds is not None
    problem = "a.wav: no such file" if takes_sounds else f"it has a sound, and {name} takes none"
    with pytest.raises(RunError, match=problem):
        encode(processor, Conversation([sound], audios=[tmp_path / "a.wav"]))


def test_a_library_that_is_missing_is_one_line(processor_of, tmp_path: Path, monkeypatch):
    sounds = write_sounds(tmp_path, 1).parent / "0.wav"

    def missing(*_, **options):
        raise ImportError("load_audio requires the soundfile library but it was not found\nin your environment.")

    monkeypatch.setattr("transformers.audio_utils.load_audio", missing)
    sound = Conversation([{"role": "user", "content": [{"type": "audio"}, TEXT]}], audios=[sounds])
    with pytest.raises(InputError) as error:
        encode(processor_of("qwen2_audio"), sound)
    assert str(error.value) == (
        "a sample has a sound: reading it needs a library that is not installed: load_audio requires the soundfile "
        "library but it was not found in your environment."
    )


def test_a_broken_sound_is_named(processor_of, tmp_path: Path):
    pytest.importorskip("soundfile")
    (tmp_path / "a.wav").write_bytes(b"RIFF, but no sound")
    sound = Conversation([{"role": "user", "content": [{"type": "audio"}, TEXT]}], audios=[tmp_path / "a.wav"], id="7")
    data = CalibrationDataModule(Samples(sound, Conversation([ANSWER])), on_error="skip")
    assert [batch.indices for batch in data.calibration_batches(processor_of("qwen2_audio"))] == [[1]]
    ((name, reason),) = data.skipped
    assert name == "7"
    assert reason.startswith(f"{tmp_path / 'a.wav'}: cannot be read as a sound (")
