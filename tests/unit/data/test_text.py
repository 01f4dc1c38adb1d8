import json
from pathlib import Path

import pytest

from lvlm_prune.data import CalibrationDataModule, TextSource
from lvlm_prune.errors import InputError, RunError

DOCUMENTS = ["One line.", "Two lines,\nof one document.", "Grüße, <image> and </s> are just text here."]


def corpus(tmp_path: Path, form: str) -> str:
    if form == "folder":
        for number, text in enumerate(DOCUMENTS):
            (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        return str(tmp_path)
    path = tmp_path / f"corpus.{form}"
    if form == "txt":
        path.write_text("\n\n \n".join(DOCUMENTS) + "\n\n", encoding="utf-8")
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    else:
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    return str(path)


@pytest.mark.parametrize("form", ["txt", "folder", "jsonl", "json"])
def test_one_sample_per_document_without_chat_template(tmp_path: Path, form, processor):
    data = CalibrationDataModule(TextSource(corpus(tmp_path, form)))
    data.setup()
    batches = list(data.calibration_batches(processor))
    assert [processor.tokenizer.decode(batch.inputs["input_ids"][0]) for batch in batches] == DOCUMENTS
    assert all((batch.inputs["input_ids"] != processor.image_token_id).all() for batch in batches)


def test_documents_are_cut_off(tmp_path: Path, processor):
    data = CalibrationDataModule(TextSource(corpus(tmp_path, "txt"), max_tokens=12))
    lengths = [batch.inputs["input_ids"].shape[1] for batch in data.calibration_batches(processor)]
    assert lengths == [9, 12, 12]


def test_a_document_that_is_not_text_is_named(tmp_path: Path, processor):
    corpus(tmp_path, "folder")
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00 not UTF-8")
    data = CalibrationDataModule(TextSource(str(tmp_path)))
    data.setup()
    with pytest.raises(RunError, match=r"1\.txt: 'utf-8' codec can't decode"):
        list(data.calibration_batches(processor))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "--data.source.path {path}: no such file"),
        ("a.txt", "\n \n", "--data.source.path {path}: holds no text"),
        ("a.jsonl", '{"content": "x"}', "--data.source.column text: samples have no such key; there are content"),
        ("a.jsonl", "", "--data.source.path {path}: holds no samples"),
    ],
)
def test_bad_corpora_are_one_clear_line(tmp_path: Path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        CalibrationDataModule(TextSource(str(path))).setup()
    assert str(error.value) == message.format(path=path)


def test_empty_folder_and_bad_length(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a folder without \.txt files"):
        TextSource(str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"^`max_tokens` 0: must be at least 1"):
        TextSource(str(tmp_path), max_tokens=0)
