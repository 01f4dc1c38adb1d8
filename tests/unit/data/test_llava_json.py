import json
import random
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from lvlm_prune.data import CalibrationDataModule, LlavaJsonSource, encode
from lvlm_prune.data import json_records as json_records_module
from lvlm_prune.data.conversation import load_image
from lvlm_prune.data.json_records import JsonRecords
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.evaluation.local import LocalBenchmark


def test_json_and_jsonl_give_the_same_samples(tmp_path: Path, llava_json: Path, llava_rows: list[dict]):
    lines = tmp_path / "share.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in llava_rows) + "\n\n", encoding="utf-8")
    indented = tmp_path / "indented.json"
    indented.write_text("\ufeff" + json.dumps(llava_rows, indent=4), encoding="utf-8")
    misnamed = tmp_path / "lines.json"
    misnamed.write_bytes(lines.read_bytes().replace(b"\n", b"\r\n"))
    sources = [LlavaJsonSource(str(path)) for path in (llava_json, lines, indented, misnamed)]
    samples = [[source[index] for index in range(len(source))] for source in sources]
    assert [len(found) for found in samples] == [8, 8, 8, 8]
    assert samples[0] == samples[1] == samples[2] == samples[3]


def test_placeholders_become_images_in_place(llava_json: Path, tmp_path: Path):
    source = LlavaJsonSource(str(llava_json))
    one, two, none = source[0], source[2], source[3]
    assert one.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": 'Which "colour" {is} [this]?'},
    ]
    assert one.messages[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "It is red, größer \\ \U0001f600."}],
    }
    assert [part["type"] for part in two.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert two.images == [tmp_path / "red.png", tmp_path / "green.png"]
    assert none.images == []
    assert [part["type"] for part in none.messages[0]["content"]] == ["text"]


def test_images_without_a_placeholder_come_first(tmp_path: Path, llava_rows: list[dict]):
    llava_rows[0]["conversations"][0]["value"] = "Which colour?"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(llava_rows[:1]))
    assert [part["type"] for part in LlavaJsonSource(str(path))[0].messages[0]["content"]] == ["image", "text"]


def test_the_model_sees_question_and_whole_answer(llava_json: Path, processor):
    source = LlavaJsonSource(str(llava_json))
    inputs = encode(processor, source[2])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<image>") == 2 * 16
    assert (
        text.replace("<image>", "")
        == "user: Left: \n right: \nSame?</s>assistant: It is blue, größer \\ \U0001f600.</s>"
    )
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_index_does_not_depend_on_where_chunks_end(tmp_path: Path, monkeypatch, chunk):
    draw = random.Random(0)
    pieces = ['"', "\\", "{", "}", "[", "]", ",", "é", "\n", "x", "\\u0041", "😀"]
    records = [
        {"id": number, "".join(draw.choices(pieces, k=5)): ["".join(draw.choices(pieces, k=9)), {"a": [[]]}, None, 1.5]}
        for number in range(40)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])), "utf-8")
    monkeypatch.setattr(json_records_module, "_CHUNK", chunk)
    found = JsonRecords(path)
    assert [found[index] for index in range(len(found))] == records


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix):
    row = json.dumps({"id": 0, "conversations": [{"from": "human", "value": 'words "and" more\n ' * 60}]})
    count = 20_000_000 // len(row)
    path = tmp_path / f"large.{suffix}"
    with path.open("w") as file:
        file.write("[" if suffix == "json" else "")
        for number in range(count):
            separator = "" if number == 0 else ",\n" if suffix == "json" else "\n"
            file.write(separator + row)
        file.write("]" if suffix == "json" else "\n")
    assert path.stat().st_size > 19e6
    tracemalloc.start()
    records = JsonRecords(path)
    last = records[count - 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == count
    assert last == json.loads(row)
    assert peak < 4e6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        ("hello", "neither a JSON array of samples nor one JSON object per line"),
        ('[{"id": 0}, null, {"id": 1}]', "what its array has at byte 12 is no object"),
        ('[{"id": 0},\n"text"]', "what its array has at byte 12 is no object"),
        ("[5", "what its array has at byte 1 is no object"),
        ('[{"id": 0, "conversations": []}, {"id": ', "ends in the middle of its JSON array, after 1 complete samples"),
        ('[{"id": 0, "image": "a.png"}]', "sample 0: no list `conversations`, only the keys id, image"),
        (
            '[{"question": "Why?", "answer": "So."}]',
            "only the keys question, answer (HFDatasetSource takes such columns)",
        ),
        ('[{"id": 0 "image": "a.png"}]', "sample 0: invalid JSON at byte 1"),
        ("[[1, 2]]", "sample 0: list at byte 1"),
        ('[{"id": 0}]\n\n[{"id": 1}]', "goes on at byte 13, behind its JSON array"),
        ('{"id": "\\ud83d"}', "sample 0: invalid JSON at byte 0"),
        ('{"data": [\n{"id": 0}\n]}', "sample 0: invalid JSON at byte 0"),
        ('{"conversations": []}', "sample 0: the conversation is empty"),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', "sample 0: turn 0 has the role 'robot'"),
        ('{"conversations": [{"from": "gpt"}]}', "sample 0: turn 0 has no text"),
        ('{"image": 5, "conversations": []}', "sample 0: `image` is neither a file name nor a list"),
        ('{"video": 5, "conversations": []}', "sample 0: `video` is neither a file name nor a list"),
        (
            '{"id": 7, "video": "no.mp4", "conversations": [{"from": "human", "value": "<video>"}]}',
            "video file {folder}/no.mp4 of sample 7 is missing; is `image_folder` needed?",
        ),
        (
            '{"id": 7, "audio": ["no.wav"], "conversations": [{"from": "human", "value": "x"}]}',
            "audio file {folder}/no.wav of sample 7 is missing",
        ),
        (
            '{"audio": ["a.wav"], "conversations": [{"from": "human", "value": "<audio> <audio>"}]}',
            "sample 0: more audio placeholders (2) than audios (1)",
        ),
        (
            '{"conversations": [{"from": "human", "value": "<image> <image>"}]}',
            "turn 0 has the placeholder <image>, and the record names no image for it",
        ),
        (
            '{"id": 7, "image": "no.png", "conversations": [{"from": "human", "value": "x"}]}',
            "no.png of sample 7 is missing; is `image_folder` needed?",
        ),
    ],
)
def test_bad_files_are_one_clear_line_before_the_run(tmp_path: Path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        CalibrationDataModule(LlavaJsonSource(str(path)), num_samples=None).setup()
    assert message.replace("{folder}", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--data.source.path {path}: ")


def test_a_broken_record_is_the_fault_of_the_file_by_its_own_name(tmp_path: Path, llava_json: Path, processor):
    """Whatever the folder of images is; evaluation and reading with `on_error: skip` call it by that name too."""
    path = tmp_path / "broken.json"
    path.write_text('[{"id": "q-7", "conversations": []}]')
    source = LlavaJsonSource(str(path), str(llava_json.parent))
    with pytest.raises(InputError) as error:
        CalibrationDataModule(source).setup()
    assert str(error.value).startswith(f"--data.source.path {path}: sample q-7: the conversation is empty; --data.on_e")
    with pytest.raises(ValueError, match=r"^`path` \S+: sample q-7: the conversation is empty$"):
        LocalBenchmark(source).check()
    with pytest.raises(ValueError, match=r"^`source` \S+: sample q-7: the conversation is empty$"):
        LocalBenchmark(source).questions  # noqa: B018
    data = CalibrationDataModule(source, on_error="skip")
    with pytest.raises(RunError, match=r"the first one, q-7: the conversation is empty"):
        list(data.calibration_batches(processor))


def test_a_folder_or_a_device_is_no_image(tmp_path: Path):
    path = tmp_path / "a.json"
    for image, what in ((str(tmp_path), "is a folder"), ("/dev/null", "is no regular file")):
        path.write_text(json.dumps([{"image": image, "conversations": [{"from": "human", "value": "x"}]}]))
        with pytest.raises(InputError, match=f"image file {image} of sample 0 {what}"):
            CalibrationDataModule(LlavaJsonSource(str(path))).setup()
        with pytest.raises(RunError, match=f"{image}: {what}"):
            load_image(Path(image))


def test_missing_image_folder(llava_json: Path):
    with pytest.raises(InputError, match=r"^--data.source.image_folder /nowhere: no such folder$"):
        CalibrationDataModule(LlavaJsonSource(str(llava_json), "/nowhere")).setup()


def test_only_the_chosen_images_must_exist(tmp_path: Path, llava_json: Path):
    source = LlavaJsonSource(str(llava_json))
    data = CalibrationDataModule(source, num_samples=2)
    chosen = {Path(str(file)).name for index in data.select() for file in source[index].images}
    for file in tmp_path.glob("*.png"):
        if file.name not in chosen:
            file.unlink()
    data.setup()
    with pytest.raises(InputError, match=r"is missing \(and \d more\)"):
        CalibrationDataModule(LlavaJsonSource(str(llava_json), str(tmp_path))).setup()


@pytest.mark.parametrize(("mode", "value", "gray"), [("I;16", 40_000, 155), ("I;16B", 514, 2), ("I;16", 200, 200)])
def test_images_with_16_bits_per_pixel_are_not_white(tmp_path: Path, mode, value, gray):
    Image.new(mode, (4, 4), value).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").getextrema() == ((gray, gray),) * 3


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", -1), ("I", 70_000)])
def test_pixels_of_no_known_brightness_are_refused(tmp_path: Path, mode, value):
    Image.new(mode, (4, 4), value).save(tmp_path / "a.tif")
    with pytest.raises(RunError, match=f"its pixels lie between {value} and {value}"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_image_names_the_file(tmp_path: Path, llava_json: Path, processor, damage):
    Image.effect_noise((64, 64), 50).save(tmp_path / "yellow.png")
    content = (tmp_path / "yellow.png").read_bytes()
    (tmp_path / "yellow.png").write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}[damage]
    )
    data = CalibrationDataModule(LlavaJsonSource(str(llava_json)))
    data.setup()
    with pytest.raises(RunError) as error:
        list(data.calibration_batches(processor))
    assert str(error.value).startswith(f"calibration id-5: {tmp_path / 'yellow.png'}: cannot be read as an image (")
    assert "\n" not in str(error.value)

    data = CalibrationDataModule(LlavaJsonSource(str(llava_json)), on_error="skip")
    data.setup()
    assert sum(len(batch) for batch in data.calibration_batches(processor)) == 7
    assert [name for name, _ in data.skipped] == ["id-5"]


def test_a_missing_image_is_skipped_too(tmp_path: Path, llava_json: Path, processor):
    (tmp_path / "yellow.png").unlink()
    data = CalibrationDataModule(LlavaJsonSource(str(llava_json)), on_error="skip")
    data.setup()
    assert sum(len(batch) for batch in data.calibration_batches(processor)) == 7
    assert data.skipped == [("id-5", f"{tmp_path / 'yellow.png'}: no such image file")]


def test_only_the_first_samples_that_are_left_out_get_a_line(tmp_path: Path, llava_json: Path, processor, caplog):
    for file in tmp_path.glob("*.png"):
        file.write_text("no image")
    data = CalibrationDataModule(LlavaJsonSource(str(llava_json)), on_error="skip")
    data.setup()
    list(data.calibration_batches(processor))
    lines = [record.getMessage() for record in caplog.records]
    assert len(data.skipped) >= len(lines) == 6
    assert lines[-1] == "left out more than 5 calibration samples; the others are named in the record"
