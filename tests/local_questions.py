"""A local data set to evaluate on."""

import json
from pathlib import Path

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
