import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lvlm_prune.data import CalibrationDataModule, Conversation, HFDatasetSource
from lvlm_prune.data.conversation import load_image
from lvlm_prune.errors import InputError, RunError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 16), colour)


def encoded(colour: str) -> bytes:
    buffer = io.BytesIO()
    picture(colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def rows() -> datasets.Dataset:
    columns = {
        "picture": [picture("red"), picture("blue"), None],
        "q": ["Which colour?", "<image>\nAnd this?", "Largest planet?"],
        "answers": [["red", "crimson"], ["blue", "navy"], ["Jupiter", "Jupiter"]],
    }
    features = {
        "picture": datasets.Image(),
        "q": datasets.Value("string"),
        "answers": datasets.Sequence(datasets.Value("string")),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


COLUMNS = {"image": "picture", "question": "q", "answer": "answers"}


@pytest.mark.parametrize("form", ["parquet", "folder", "save_to_disk", "splits"])
def test_columns_are_mapped_to_a_conversation(tmp_path: Path, rows, form, processor):
    path, split = tmp_path / "set", "train"
    if form == "parquet":
        path = tmp_path / "rows.parquet"
        rows.to_parquet(path)
    elif form == "folder":
        rows.to_parquet(path / "train-00000-of-00001.parquet")
    elif form == "save_to_disk":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(path)
        split = "test"
    data = CalibrationDataModule(HFDatasetSource(str(path), split=split, columns=COLUMNS))
    data.setup()
    batches = list(data.calibration_batches(processor))
    texts = [processor.tokenizer.decode(batch.inputs["input_ids"][0]).replace("<image>", "") for batch in batches]
    assert texts == [
        "user: \nWhich colour?</s>assistant: red</s>",
        "user: \nAnd this?</s>assistant: blue</s>",
        "user: Largest planet?</s>assistant: Jupiter</s>",
    ]
    assert ["pixel_values" in batch.inputs for batch in batches] == [True, True, False]


def test_messages_with_several_images(tmp_path: Path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Same?"}, {"type": "image", "text": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "No."}]}]
    features = datasets.Features(
        messages=[
            {
                "role": datasets.Value("string"),
                "content": [{name: datasets.Value("string") for name in ("type", "text")}],
            }
        ],
        images=datasets.Sequence(datasets.Image()),
    )
    rows = datasets.Dataset.from_dict(
        {"messages": [messages], "images": [[picture("red"), picture("blue")]]}, features=features
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    sample = HFDatasetSource(str(tmp_path / "rows.parquet"))[0]  # columns named like roles need no mapping
    assert isinstance(sample, Conversation)
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text", "image"]
    assert [load_image(image).getpixel((3, 3)) for image in sample.images] == [(255, 0, 0), (0, 0, 255)]


def test_a_folder_of_images_by_class(tmp_path: Path):
    for colour in ("blue", "red"):
        (tmp_path / "train" / colour).mkdir(parents=True)
        picture(colour).save(tmp_path / "train" / colour / "0.png")
    source = HFDatasetSource(str(tmp_path), columns={"image": "image", "answer": "label"})
    samples = [source[index] for index in range(len(source))]
    assert [sample.messages for sample in samples if isinstance(sample, Conversation)] == [
        [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": colour}]},
        ]
        for colour in ("blue", "red")
    ]


def test_documents(tmp_path: Path, processor):
    (tmp_path / "rows.jsonl").write_text('{"body": "hello world"}\n{"body": "short"}\n')
    source = HFDatasetSource(str(tmp_path / "rows.jsonl"), columns={"text": "body"}, max_tokens=7)
    batches = list(CalibrationDataModule(source).calibration_batches(processor))
    assert [processor.tokenizer.decode(batch.inputs["input_ids"][0]) for batch in batches] == ["hello w", "short"]


def test_image_files_beside_the_rows(tmp_path: Path):
    picture("green").save(tmp_path / "green.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "green.png", "question": "?"}\n{"image": "no.png", "question": "?"}\n'
    )
    source = HFDatasetSource(str(tmp_path / "rows.jsonl"))
    sample = source[0]
    assert isinstance(sample, Conversation)
    assert sample.images == [tmp_path / "green.png"]
    with pytest.raises(InputError, match=r"no.png of sample .*row 1 is missing; --data.on_error skip"):
        CalibrationDataModule(source).setup()


def test_a_broken_image_names_the_row(tmp_path: Path, processor):
    rows = datasets.Dataset.from_dict({"image": [encoded("red"), encoded("red")[:50]], "question": ["?", "?"]})
    path = tmp_path / "rows.parquet"
    rows.to_parquet(path)
    with pytest.raises(RunError, match=rf"^calibration {path}, row 1: an image of {path}, row 1: cannot be read"):
        list(CalibrationDataModule(HFDatasetSource(str(path))).calibration_batches(processor))
    data = CalibrationDataModule(HFDatasetSource(str(path)), on_error="skip")
    data.setup()
    assert [batch.indices for batch in data.calibration_batches(processor)] == [[0]]
    assert [name for name, _ in data.skipped] == [f"{path}, row 1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"columns": {**COLUMNS, "image": "img"}},
            "--data.source.columns.image img: the data set has no such column; there are picture, q, answers",
        ),
        ({"columns": {"image": "picture"}}, "must name a column for messages, for text, or for question and answer"),
        ({}, "--data.source.columns (not given): must name a column for messages"),
        (
            {"split": "test", "columns": COLUMNS},
            "--data.source.split test: the data set has no such split; there are train",
        ),
        ({"path": "./nowhere"}, "--data.source.path ./nowhere: no such file or folder"),
        ({"path": "/nowhere/set"}, "--data.source.path /nowhere/set: no such file or folder"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path: Path, rows, arguments, message):
    path = tmp_path / "set"
    datasets.DatasetDict({"train": rows}).save_to_disk(path)
    with pytest.raises(InputError) as error:
        CalibrationDataModule(HFDatasetSource(**{"path": str(path), **arguments})).setup()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_role_that_there_is_not():
    with pytest.raises(ValueError, match=r"^`columns` foto: no such role; there are image, images, question"):
        HFDatasetSource("set", columns={"foto": "picture"})


def test_a_file_that_is_not_a_data_set(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"^`path` .*rows.parquet: cannot be loaded \("):
        HFDatasetSource(str(path)).setup()
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one of .parquet"):
        HFDatasetSource(str(tmp_path / "rows.xlsx")).setup()


def test_an_answer_is_taken_out_of_its_object_or_its_choices(tmp_path: Path):
    given = [{"answer": "noise", "answer_confidence": "yes"}, {"answer": "static", "answer_confidence": "no"}]
    objects = [{"question": "What?", "answers": given}]
    choices = [{"question": "What?", "choices": ["a dog", "noise"], "answers": 1}]
    for number, rows in enumerate((objects, choices)):
        path = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        sample = HFDatasetSource(str(path), columns={"question": "question", "answer": "answers"})[0]
        assert sample.messages[-1]["content"] == [{"type": "text", "text": "noise"}]


@pytest.mark.parametrize("answer", [{"text": ["noise"], "start": [3]}, True])
def test_an_answer_that_is_no_text_is_refused(answer, tmp_path: Path):
    datasets.Dataset.from_list([{"question": "What?", "answer": answer}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RunError, match=r"the column of the answer holds (dict|bool), not text"):
        HFDatasetSource(str(tmp_path / "rows.parquet"))[0]


def test_a_column_of_sounds_is_not_left_out_in_silence_whatever_its_name(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "recording": datasets.Audio()})
    datasets.Dataset.from_dict({"text": ["a"], "recording": [None]}, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="the column recording holds audios and has no role"):
        HFDatasetSource(str(tmp_path / "rows")).setup()


def test_images_of_a_column_without_a_role_are_not_left_out_in_silence(tmp_path: Path, rows):
    rows.rename_column("q", "question").to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"columns .*the column picture holds images and has no role"):
        CalibrationDataModule(HFDatasetSource(str(tmp_path / "rows.parquet"))).setup()


@pytest.mark.parametrize(("column", "value"), [("image_path", "a.png"), ("img", ["a.png"]), ("video", "a.mp4")])
def test_media_that_a_column_only_names_are_not_left_out_in_silence(column, value, tmp_path: Path):
    row = {"question": "What?", "answer": "noise"}
    datasets.Dataset.from_list([row | {column: value}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        ValueError, match=rf"^`columns` \(not given\): the column {column} holds (image|video)s and has"
    ):
        HFDatasetSource(str(tmp_path / "rows.parquet")).setup()
    columns = {"question": "question", "answer": "answer"}
    assert len(HFDatasetSource(str(tmp_path / "rows.parquet"), columns=columns)) == 1
    datasets.Dataset.from_list([row | {"num_images": 1, "image_id": "a7"}]).to_parquet(tmp_path / "counted.parquet")
    assert len(HFDatasetSource(str(tmp_path / "counted.parquet"))) == 1


OVERLOOKED = {
    "another column": {"image": "a.png", "second_image": "b.png"},
    "by its values": {"image": "a.png", "mask": "b.png"},
    "deep inside": {"metadata": {"image": "b.png"}},
    "a name": {"file_name": "b.png"},
    "decoded": {"image": picture("red"), "mask": picture("blue")},
}


@pytest.mark.parametrize("media", OVERLOOKED.values(), ids=OVERLOOKED.keys())
def test_media_of_a_row_that_nobody_reads_are_refused(media, tmp_path: Path):
    row = {"id": "q-7", "question": "What?", "answer": "noise"} | media
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    name = [*media][-1]
    with pytest.raises(RunError, match=rf"^`{name}[.a-z]*` is not understood; .*; `columns` says which") as caught:
        HFDatasetSource(str(tmp_path / "rows.parquet"))[0]
    assert caught.value.id == "q-7"


def test_columns_that_are_not_taken_are_not_decoded_and_told_of(tmp_path: Path, caplog):
    features = {"text": datasets.Value("string"), "sound": datasets.Audio(), "image": datasets.Image()}
    broken = [{"bytes": b"none", "path": None}]
    rows = datasets.Dataset.from_dict({"text": ["a"], "sound": broken, "image": broken})
    table = rows.data.table.cast(datasets.Features(features).arrow_schema)
    datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features))).save_to_disk(
        tmp_path / "rows"
    )
    assert HFDatasetSource(str(tmp_path / "rows"), columns={"text": "text"})[0].text == "a"
    assert [record.getMessage() for record in caplog.records] == [
        "`columns` leaves out the media of sound, image: they have no role"
    ]


def test_one_image_under_two_names_is_one_image(tmp_path: Path):
    image = Image.new("RGB", (4, 4))
    row = {"image": image, "images": [image], "question": "What?", "answer": "noise"}
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "rows"))
    for columns in (None, {"image": "image", "images": "images", "question": "question"}):
        assert len(HFDatasetSource(str(tmp_path / "rows"), columns=columns)[0].images) == 1
    row |= {"images": [Image.new("RGB", (5, 5))]}
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "others"))
    with pytest.raises(RunError, match="`image` and `images` hold different images"):
        HFDatasetSource(str(tmp_path / "others"))[0]


def test_a_question_is_not_left_out_in_silence_beside_a_text(tmp_path: Path):
    row = {"text": "It rains.", "question": "What does it do?", "answer": "Rain."}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"^`columns` \(not given\): both text and question are said"):
        HFDatasetSource(str(tmp_path / "rows.parquet")).setup()
    columns = {"question": "question", "answer": "answer"}
    assert len(HFDatasetSource(str(tmp_path / "rows.parquet"), columns=columns)[0].messages) == 2


def test_turns_of_two_columns_are_refused(tmp_path: Path):
    turns = [{"role": "user", "content": "What?"}]
    row = {"messages": turns, "conversations": [{"from": "human", "value": "And that?"}]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RunError, match="both `messages` and `conversations` hold turns"):
        HFDatasetSource(str(tmp_path / "rows.parquet"))[0]
    assert HFDatasetSource(str(tmp_path / "rows.parquet"), columns={"messages": "messages"})[0].messages


@pytest.mark.parametrize("column", ["texts", "conversations"])
def test_turns_of_two_and_columns_of_turns_by_other_names_are_read(column: str, tmp_path: Path):
    row = {"images": [Image.new("RGB", (5, 5))], column: [{"user": "What?", "assistant": "A cat.", "source": "ai2d"}]}
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "rows"))
    sample = HFDatasetSource(str(tmp_path / "rows"))[0]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_what_a_turn_names_beside_its_text_is_refused(tmp_path: Path):
    turns = [{"role": "user", "content": "What?", "image": "a.png"}, {"role": "assistant", "content": "A cat."}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RunError, match="turn 0: `image` is not understood"):
        HFDatasetSource(str(tmp_path / "rows.parquet"))[0]


NO_TEXT = {
    "messages that are a number": ({"messages": 5}, "the column of messages holds int, not a list of turns"),
    "messages that are text": ({"messages": "Hello."}, "the column of messages holds str, not a list of turns"),
    "no number": ({"question": "What?", "answer": float("nan")}, "the column of the answer holds float, not text"),
    "choices without texts": ({"question": "What?", "answer": 1, "choices": {"label": ["A"]}}, "the choices are no"),
    "a choice of nothing": ({"question": "What?", "answer": 0, "choices": [None, "a"]}, "the choice .* is null"),
}


@pytest.mark.parametrize(("row", "problem"), NO_TEXT.values(), ids=NO_TEXT.keys())
def test_a_value_that_is_no_text_does_not_become_one(row, problem, tmp_path: Path):
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RunError, match=problem):
        HFDatasetSource(str(tmp_path / "rows.parquet"))[0]


FILES = {
    "empty": ("rows.json", b"", "holds no samples"),
    "no JSON": ("rows.json", b"nothing", r"cannot be loaded \(.*JSON"),
    "a comma": ("rows.csv", b"question,answer\nq,this, or that\n", r"cannot be loaded \(the first row has 3 fields"),
    "a saved folder": ("state.json", b"{}", r"cannot be loaded \("),
}


@pytest.mark.parametrize(("name", "content", "problem"), FILES.values(), ids=FILES.keys())
def test_whatever_the_library_raises_about_a_file_is_one_line(name, content, problem, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    if name == "state.json":
        (tmp_path / "dataset_info.json").write_bytes(content)
    path = tmp_path if name == "state.json" else tmp_path / name
    with pytest.raises(ValueError, match=rf"^`path` .*: {problem}") as caught:
        HFDatasetSource(str(path)).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [None, {"question": "question", "answer": "answer", "system": "system"}])
def test_what_is_said_to_the_system_comes_first(tmp_path: Path, columns):
    rows = {"question": ["Why?"] * 2, "answer": ["So."] * 2, "system": ["You are brief.", None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    source = HFDatasetSource(str(tmp_path / "rows.parquet"), columns=columns)
    assert source[0].messages[0] == {"role": "system", "content": [{"type": "text", "text": "You are brief."}]}
    assert [[one["role"] for one in source[row].messages] for row in (0, 1)] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]
