"""A local data set to evaluate on."""

import importlib.util
import json
import os
import sys
from pathlib import Path

from lvlm_prune.data import LlavaJsonSource
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark


def write_questions(folder: Path, count: int = 4) -> Path:
    """Questions of the embedded benchmark as LLaVA's JSONL, with their images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, images = [], {}
    for number, question in enumerate(EmbeddedBenchmark(num_images=count, num_text=6).questions):
        text = question.question
        line = {"id": f"q{number}", "task": question.task}
        if question.image is not None:
            name = images.setdefault(id(question.image), f"{len(images)}.png")
            question.image.save(folder / name)
            text, line["image"] = f"<image>\n{text}", name
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
        lines.append(json.dumps(line | {"conversations": turns}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder / "questions.jsonl"


def local(path: Path, *options: str) -> list[str]:
    """Options of `evaluate` that ask the questions of a file."""
    arguments = ["--engine.benchmark=LocalBenchmark", "--engine.benchmark.source=LlavaJsonSource"]
    return [*arguments, f"--engine.benchmark.source.path={path}", *options]


WITHOUT_LM_EVAL = "lm_eval is not installed here, and LM_EVAL_PYTHON names no interpreter that has it"
LM_EVAL = os.environ.get("LM_EVAL_PYTHON", "") or (sys.executable if importlib.util.find_spec("lm_eval") else "")


WITHOUT_LMMS_EVAL = "LMMS_EVAL_PYTHON names no interpreter that has lmms_eval"
LMMS_EVAL = os.environ.get("LMMS_EVAL_PYTHON", "")


def _write_table(folder: Path, questions: Path) -> int:
    """Write the questions with an image as `questions.parquet`; how many there are."""
    from datasets import Dataset, Image

    source = LlavaJsonSource(str(questions))
    source.setup()
    rows = [source[index] for index in range(len(source))]
    rows = [row for row in rows if row.images]
    table = Dataset.from_dict(
        {
            "image": [str(row.images[0]) for row in rows],
            "question": [row.messages[0]["content"][-1]["text"] for row in rows],
            "answer": [row.messages[1]["content"][0]["text"] for row in rows],
        }
    ).cast_column("image", Image())
    folder.mkdir()
    table.to_parquet(folder / "questions.parquet")
    return len(rows)


def _task_of(folder: Path) -> str:
    """What a definition of the task `mine` begins with in both harnesses."""
    return f"""task: mine
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder / "questions.parquet"}}}}}
test_split: test
output_type: generate_until"""


def write_lm_eval_task(folder: Path, questions: Path) -> int:
    """Write the questions with an image as the task `mine` in lm-eval's own format; how many there are."""
    count = _write_table(folder, questions)
    (folder / "mine.yaml").write_text(
        f"""{_task_of(folder)}
doc_to_image: [image]
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs: {{until: ["</s>"], do_sample: false, max_gen_toks: 12}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return count


def write_lmms_eval_task(folder: Path, questions: Path) -> int:
    """The same in lmms-eval's own format, with functions of Python beside it."""
    count = _write_table(folder, questions)
    (folder / "utils.py").write_text(
        """def images(doc):
    return [doc["image"].convert("RGB")]


def question(doc, kwargs=None):
    return doc["question"]
"""
    )
    (folder / "mine.yaml").write_text(
        f"""{_task_of(folder)}
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
    )
    return count
