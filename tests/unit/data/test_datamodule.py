import hashlib
import itertools
import os
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from lvlm_prune.data import (
    CalibrationDataModule,
    CalibrationSource,
    Conversation,
    EmbeddedSource,
    HFDatasetSource,
    LlavaJsonSource,
    TensorSource,
    TextSource,
    encode,
    fingerprint,
)
from lvlm_prune.data.selection import choose
from lvlm_prune.errors import InputError, RunError


class NumberedSource(CalibrationSource):
    """Questions of different length, and broken samples where asked for."""

    def __init__(self, total: int = 20, broken: list[int] | None = None, default: int | None = 128) -> None:
        self.total = total
        self.broken = broken or []
        self.default_num_samples = default  # type: ignore[misc]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Conversation:
        if index in self.broken:
            raise RunError(f"file-{index}.png: cannot be read as an image")
        content = [{"type": "text", "text": "?" * (1 + index % 5)}]
        return Conversation([{"role": "user", "content": content}], id=f"number-{index}")


def digests(data: CalibrationDataModule, processor, world_size: int = 1) -> dict[int, str]:
    found: dict[int, str] = {}
    for rank in range(world_size):
        for batch in data.calibration_batches(processor, rank, world_size):
            assert not set(found) & set(batch.indices), "a sample came twice"
            found.update(zip(batch.indices, batch.digests))
    return found


def test_choice_is_the_same_on_every_machine():
    # Fixed numbers: a choice that changes with a release makes every published result irreproducible.
    assert choose(5, 1_000_000, seed=0) == [1593, 269349, 486273, 502532, 658316]
    assert choose(5, 1_000_000, seed=1) != choose(5, 1_000_000, seed=0)
    # The definition, with a list in place of the sparse bookkeeping.
    cards = list(range(50))
    for step in range(20):
        drawn = step + int(hashlib.sha256(f"7/{step}".encode()).hexdigest(), 16) % (50 - step)
        cards[step], cards[drawn] = cards[drawn], cards[step]
    assert choose(20, 50, seed=7) == sorted(cards[:20])


@pytest.mark.parametrize(("count", "total"), [(1, 1), (7, 7), (3, 10), (128, 129)])
def test_choice_has_no_repetition_and_is_in_file_order(count, total):
    chosen = choose(count, total, seed=3)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(total))


def test_every_sample_is_equally_likely():
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[choose(3, 10, seed)] += 1
    assert (counts / 2000 - 0.3).abs().max() < 0.04


def test_a_smaller_choice_is_part_of_a_larger_one():
    assert set(choose(16, 1000, seed=5)) < set(choose(32, 1000, seed=5))


@pytest.mark.parametrize(
    ("total", "default", "asked", "expected"),
    [(200, 128, None, 128), (50, 128, None, 50), (200, None, None, 200), (200, 128, 150, 150), (200, None, 7, 7)],
)
def test_number_of_samples(total, default, asked, expected):
    data = CalibrationDataModule(NumberedSource(total, default=default), num_samples=asked)
    assert len(data.select()) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_sample_once_whatever_the_processes_and_batches(processor, world_size, batch_size):
    data = CalibrationDataModule(NumberedSource(), num_samples=13, batch_size=batch_size)
    reference = digests(CalibrationDataModule(NumberedSource(), num_samples=13), processor)
    assert sorted(reference) == list(range(13))
    assert digests(data, processor, world_size) == reference


def test_fingerprint_sees_a_pixel_but_not_the_batch_size(tmp_path: Path, llava_json: Path, processor):
    def of(batch_size: int) -> str:
        data = CalibrationDataModule(LlavaJsonSource(str(llava_json)), batch_size=batch_size)
        data.setup()
        found = digests(data, processor)
        return fingerprint(found[index] for index in sorted(found))

    before = of(1)
    assert of(3) == before
    with Image.open(tmp_path / "yellow.png") as image:
        picture = image.convert("RGB")
    picture.save(tmp_path / "yellow.png", compress_level=1)
    assert of(1) == before, "the same pixels in a rewritten file are the same calibration set"
    picture.putpixel((10, 8), (0, 0, 0))
    picture.save(tmp_path / "yellow.png")
    assert of(1) != before


@pytest.mark.parametrize(
    ("asked", "of_the_tokenizer", "side"), [("auto", "left", -1), ("auto", "right", 1), ("right", "left", 1)]
)
def test_padding_is_masked_and_on_the_side_of_the_processor(processor, monkeypatch, asked, of_the_tokenizer, side):
    monkeypatch.setattr(processor.tokenizer, "padding_side", of_the_tokenizer)
    data = CalibrationDataModule(NumberedSource(), num_samples=20, batch_size=4, padding_side=asked)
    alone = {batch.indices[0]: batch.inputs for batch in data.calibration_batches(processor, batch_size=1)}
    padded = 0
    for batch in data.calibration_batches(processor):
        for row, index in enumerate(batch.indices):
            kept = batch.inputs["attention_mask"][row].bool()
            assert torch.equal(batch.inputs["input_ids"][row][kept], alone[index]["input_ids"][0])
            assert bool((side * kept.int().diff() <= 0).all())
            assert (batch.inputs["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
            padded += int((~kept).sum())
    assert padded


def test_large_images_are_shrunk_before_the_processor_sees_them(processor, monkeypatch):
    class Wide(NumberedSource):
        def __getitem__(self, index: int) -> Conversation:
            image = Image.new("RGB", (4000, 10), "red")
            return Conversation([{"role": "user", "content": [{"type": "image"}]}], [image])

    seen = []
    look = type(processor.image_processor).preprocess
    monkeypatch.setattr(
        type(processor.image_processor),
        "preprocess",
        lambda own, images, *rest, **options: seen.append(images) or look(own, images, *rest, **options),
    )
    for most in (None, 10_000):
        list(CalibrationDataModule(Wide(), num_samples=1, max_pixels=most).calibration_batches(processor))
    sizes = [images[0][0].size if isinstance(images[0], list) else images[0].size for images in seen]
    assert sizes == [(4000, 10), (2000, 5)]
    with pytest.raises(InputError, match=r"--data\.max_pixels 0: must be at least 1"):
        CalibrationDataModule(Wide(), max_pixels=0)


def test_samples_that_cannot_be_stacked_get_batches_of_their_own(llava_json: Path, processor):
    data = CalibrationDataModule(LlavaJsonSource(str(llava_json)), batch_size=8)
    batches = list(data.calibration_batches(processor))
    assert [batch.indices for batch in batches] == [[0, 1, 2, 4, 5, 6, 7], [3]]
    assert batches[0].inputs["pixel_values"].shape == (8, 3, 16, 16)  # sample 2 has two images
    assert "pixel_values" not in batches[1].inputs


@pytest.mark.parametrize("world_size", [1, 2])
def test_broken_samples_are_left_out_on_request(processor, caplog, world_size):
    source = NumberedSource(broken=[4, 11])
    data = CalibrationDataModule(source, num_samples=20, on_error="skip", batch_size=3)
    data.setup()
    skipped = []
    found: dict[int, str] = {}
    for rank in range(world_size):
        for batch in data.calibration_batches(processor, rank, world_size):
            found.update(zip(batch.indices, batch.digests))
        skipped += data.skipped
    assert sorted(found) == [index for index in range(20) if index not in (4, 11)]
    assert sorted(reason for _, reason in skipped) == [
        "file-11.png: cannot be read as an image",
        "file-4.png: cannot be read as an image",
    ]
    assert len(caplog.records) == 2
    complete = digests(CalibrationDataModule(NumberedSource(), num_samples=20), processor)
    assert found == {index: complete[index] for index in found}, "the others keep their numbers and contents"


def test_a_broken_sample_is_named(processor):
    data = CalibrationDataModule(NumberedSource(broken=[4]), num_samples=20)
    data.setup()
    with pytest.raises(RunError, match=r"^calibration sample 4: file-4.png: cannot be read as an image \(--data.on_er"):
        list(data.calibration_batches(processor))


def test_nothing_left_is_an_error(processor):
    data = CalibrationDataModule(NumberedSource(2, broken=[0, 1]), on_error="skip")
    with pytest.raises(RunError, match=r"no calibration sample could be read; the first one, sample 0: file-0.png"):
        list(data.calibration_batches(processor))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_exception_of_a_users_source_keeps_its_traceback(processor, on_error):
    class Buggy(NumberedSource):
        def __getitem__(self, index: int) -> Conversation:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(CalibrationDataModule(Buggy(), on_error=on_error).calibration_batches(processor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "--data.num_samples 0: must be at least 1"),
        ({"num_samples": 21}, "--data.num_samples 21: the source holds only 20 samples"),
        ({"batch_size": 0}, "--data.batch_size 0: must be at least 1"),
        ({"seed": -1}, "--data.seed -1: must not be negative"),
        ({"on_error": "ignore"}, "--data.on_error ignore: must be raise or skip"),
        ({"source": NumberedSource(0)}, "--data.source NumberedSource: holds no samples"),
    ],
)
def test_bad_options_are_one_clear_line(arguments, message):
    with pytest.raises(InputError) as error:
        CalibrationDataModule(**{"source": NumberedSource(), **arguments}).setup()
    assert str(error.value) == message


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CalibrationDataModule, "data")
    return parser


def test_sources_are_named_on_the_command_line(parser):
    parsed = parser.parse_args(["--data.source", "TensorSource", "--data.source.path", "missing.safetensors"])
    data = parser.instantiate(parsed).data
    assert isinstance(data.source, TensorSource)  # nothing was opened yet
    with pytest.raises(InputError, match=r"--data.source.path missing.safetensors: no such file"):
        data.setup()
    full = parser.parse_args(["--data.source", "lvlm_prune.data.LlavaJsonSource", "--data.source.path", "a.json"])
    assert isinstance(parser.instantiate(full).data.source, LlavaJsonSource)
    assert isinstance(parser.instantiate(parser.parse_args([])).data.source, EmbeddedSource)


@pytest.mark.parametrize("source", [LlavaJsonSource, TensorSource, TextSource, HFDatasetSource])
def test_what_is_no_file_is_said_and_not_waited_for(source, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"--data.source.path .*pipe.json: is no regular file"):
        CalibrationDataModule(source(str(tmp_path / "pipe.json"))).setup()
    with pytest.raises(InputError, match=r"--data.source.path .*/aaa.*a.json: no such file"):
        CalibrationDataModule(source(f"{tmp_path}/{'a' * 260}.json")).setup()


def test_column_mapping_on_the_command_line(parser):
    arguments = itertools.chain(
        ["--data.source", "HFDatasetSource", "--data.source.path", "folder"],
        ["--data.source.columns", '{"question": "q", "image": "img"}'],
    )
    source = parser.instantiate(parser.parse_args(list(arguments))).data.source
    assert source.columns == {"question": "q", "image": "img"}


def test_a_users_own_source_from_its_own_file(parser, tmp_path: Path, monkeypatch, processor):
    (tmp_path / "my_module.py").write_text(
        "from lvlm_prune.data import CalibrationSource, Conversation\n"
        "class MySource(CalibrationSource):\n"
        "    def __init__(self, word: str = 'hello'):\n"
        "        self.word = word\n"
        "    def __len__(self):\n"
        "        return 3\n"
        "    def __getitem__(self, index):\n"
        "        return Conversation([{'role': 'user', 'content': [{'type': 'text', 'text': self.word * index}]}])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parsed = parser.parse_args(["--data.source", "my_module.MySource", "--data.source.word", "ho"])
    texts = [
        processor.tokenizer.decode(batch.inputs["input_ids"][0])
        for batch in parser.instantiate(parsed).data.calibration_batches(processor)
    ]
    assert texts == ["user: </s>", "user: ho</s>", "user: hoho</s>"]


def test_embedded_source_takes_96_captions(processor):
    data = CalibrationDataModule()
    data.setup()
    assert len(data.source) == 1024
    assert len(data.select()) == 96
    sample = EmbeddedSource()[5]
    assert isinstance(sample, Conversation)
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert set(encode(processor, sample)) == {"input_ids", "attention_mask", "pixel_values"}
