"""The built-in engine: exact answers to a benchmark's questions, without any other package."""

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lvlm_prune.data import load_processor
from lvlm_prune.demo.benchmark import EmbeddedBenchmark
from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.engine import Engine
from lvlm_prune.evaluation.exact_match import score
from lvlm_prune.evaluation.scores import Benchmark, Scores
from lvlm_prune.plugins import own_instance
from lvlm_prune.processes import Processes


class BuiltinEngine(Engine):
    """Loads a checkpoint as a user would and counts the questions that it answers to the letter.

    Args:
        benchmark: What is asked.
        batch_size: Questions per batch.
        dtype: Precision in which the model answers; `auto` takes the checkpoint's own.

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        benchmark: Benchmark = lazy_instance(EmbeddedBenchmark),
        batch_size: int = 128,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise InputError("engine.batch_size", batch_size, "must be at least 1")
        self.benchmark: Benchmark = own_instance(benchmark)
        self.batch_size = batch_size
        self.dtype = dtype

    def score(
        self, folder: Path, processes: Processes | None = None, device: torch.device | str = "cpu", title: str = ""
    ) -> Scores:
        """Accuracy per task; each question is answered by one process."""
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
        processor, questions = load_processor(folder), self.benchmark.questions
        processes = processes or Processes()
        bar = Tqdm(
            total=len(questions),
            bar_format=f"Scoring {title} {{bar:24}} {{n_fmt}}/{{total_fmt}} · {{elapsed}} · {{remaining}} left",
            disable=None if processes.is_main else True,
            leave=False,
        )
        try:
            return score(model, processor, questions, self.batch_size, bar.update, processes)
        finally:
            bar.close()
