"""Engines that hand a checkpoint to an evaluation harness, in an interpreter of its own, and read what it wrote.

    lvlm-prune evaluate ─► PYTHON -m lm_eval --model hf-multimodal --model_args pretrained=DIR ... --output_path TMP
                        ◄─ TMP/.../results_2026-11-21.json

With several processes the tasks are dealt out, one child for each process on its own device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, ClassVar

import torch

from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.data.processing import takes_images
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.evaluation.engine import Engine, Measurement
from lvlm_prune.evaluation.harness_results import read_results, score_names
from lvlm_prune.evaluation.pathways import PATHWAY_FILE
from lvlm_prune.evaluation.scores import Scores
from lvlm_prune.output.temporary import temporary_folder
from lvlm_prune.packed.folder import packing_of

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule

PAPER_TASKS = (
    "gqa",
    "mmbench_en_dev",
    "mme",
    "mmmu_val",
    "ok_vqa",
    "pope",
    "scienceqa_img",
    "textvqa_val",
    "vizwiz_vqa_val",
)
_PAPER_METRICS = {
    "mmbench_en_dev": "gpt_eval_score",
    "mme": "mme_perception_score+mme_cognition_score",
    "mmmu_val": "mmmu_acc",
    "pope": "pope_f1_score",
}
_PAPER_FULL_MARKS = {"mmbench_en_dev": 100.0, "mme": 2800.0}

TASKS = "engine.tasks"
"""Option under which every command takes the tasks of a harness."""

_PATHWAYS = "lvlm_prune.evaluation.pathways"

# What launchers tell a process about its fellows; a child that read it would wait for them.
_OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class HarnessEngine(Engine):
    """What the harnesses have in common: the child, its results file, and the errors of both."""

    package: ClassVar[str]

    def __init__(
        self,
        tasks: list[str],
        python: str,
        model: str,
        model_args: dict[str, str],
        limit: int | None,
        arguments: list[str],
        metrics: dict[str, str],
        full_marks: dict[str, float],
    ) -> None:
        self.tasks, self.python, self.model, self.model_args = list(tasks), python, model, dict(model_args)
        if limit is not None and limit < 1:
            raise ValueError(f"`limit` {limit}: must be at least 1")
        self.limit, self.arguments = limit, list(arguments)
        self.metrics, self.full_marks = dict(metrics), dict(full_marks)

    def check(self) -> None:
        """Look for the package in the interpreter that is to run it."""
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"`tasks` {self.tasks}: name tasks of the harness, each once")
        scored = {*self.tasks, *self.task_names()}
        for option, names, known in (
            ("metrics", self.metrics, set(self.tasks)),
            ("full_marks", self.full_marks, scored),
        ):
            if unknown := sorted(set(names) - known):
                raise ValueError(f"`{option}` {unknown[0]}: is not among the tasks")
        looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.package!r}) is None)"
        try:
            found = subprocess.run([self._interpreter, "-c", looks], capture_output=True, check=False)
        except OSError as error:
            raise ValueError(f"`python` {self._interpreter}: cannot be run ({error.strerror})") from None
        if found.returncode != 0:
            problem = f"this interpreter has no package {self.package}; install it there, or name another one"
            raise ValueError(f"`python` {self._interpreter}: {problem}")

    def task_names(self) -> list[str]:
        """The tasks, those with several metrics once for each."""
        return [name for task in self.tasks for name in score_names(task, self.metrics.get(task, ""))]

    def score(
        self,
        folder: Path,
        processes: Processes | None = None,
        device: torch.device | str = "cpu",
        title: str = "",
    ) -> Scores:
        """Scores of all tasks; each task is run by one process."""
        return self._score(folder, processes or Processes(), torch.device(device), {})

    def measure(
        self,
        model: LVLMModule,
        baseline: LVLMModule | None,
        processes: Processes,
        device: torch.device,
    ) -> Measurement:
        """Scores of both checkpoints, loaded with the options of the model."""
        found: list[Scores] = []
        for module in (baseline, model):
            if module is not None:
                assert module.folder is not None
                loading = {"trust_remote_code": "True"} if module.trust_remote_code else {}
                if module.attn_implementation:
                    loading["attn_implementation"] = module.attn_implementation
                found.append(self._score(module.folder.path, processes, device, loading))
        return Measurement(found[-1], found[0] if len(found) > 1 else None)

    @abstractmethod
    def _arguments(self, folder: Path, device: torch.device, loading: Mapping[str, str]) -> list[str]:
        """Arguments of the harness but for tasks and output."""

    def _common(self, model: str, folder: Path, device: torch.device, loading: Mapping[str, str]) -> list[str]:
        """What both harnesses call alike."""
        given = {"pretrained": str(folder), **loading, **self.model_args}
        joined = ",".join(f"{name}={value}" for name, value in given.items())
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return ["--model", model, "--model_args", joined, "--device", str(device), *limit, *self.arguments]

    @property
    def _interpreter(self) -> str:
        return self.python or sys.executable

    def _score(self, folder: Path, processes: Processes, device: torch.device, loading: Mapping[str, str]) -> Scores:
        if "," in str(folder):
            raise InputError("model.path", folder, f"{self.package} takes no comma in a path")
        if packing_of(CheckpointFolder(folder).config) is not None:
            problem = (
                f"is packed, which {self.package} cannot read in its own interpreter; `lvlm-prune unpack` it first"
            )
            raise InputError("model.path", folder, problem)
        share = self.tasks[processes.rank :: processes.count]
        mine = self._run(share, self._arguments(folder, device, loading), folder) if share else None
        found = [part for part in processes.gather(mine) if part is not None]
        known = {name: part for part in found for name in part.tasks}
        names = self.task_names()
        return Scores(
            {name: known[name].tasks[name] for name in names},
            {name: known[name].counts[name] for name in names},
            dict.fromkeys(names, self.package),
            {name: known[name].metrics[name] for name in names},
            {task: mark for task, mark in self.full_marks.items() if mark != 1},
        )

    def _run(self, tasks: Sequence[str], arguments: Sequence[str], folder: Path) -> Scores:
        """Run the child on some tasks and read its results.

        Raises:
            InputError: It knows no such task.
            RunError: It failed, or has no score for a task.
        """
        through = [_PATHWAYS, str(folder)] if (folder / PATHWAY_FILE).is_file() else []
        command = [self._interpreter, "-m", *through, self.package, *arguments, "--tasks", ",".join(tasks)]
        foreign = ("TORCHELASTIC_", "_LVLM_PRUNE_")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _OF_LAUNCHERS and not name.startswith(foreign)
        }
        with temporary_folder(self.package) as scratch:
            if through:
                environment["PYTHONPATH"] = _with_own_package(scratch / "own", environment.get("PYTHONPATH", ""))
            log = scratch / "log"
            with log.open("wb") as said:
                child = subprocess.run(
                    [*command, "--output_path", str(scratch)],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    check=False,
                )
            try:
                if child.returncode != 0:
                    raise RunError(f"{self.package} ended with status {child.returncode}")
                # Several files: one for each model, or of several calls; here there was one call.
                files = sorted(path for path in scratch.rglob("*results*.json"))
                if not files:
                    raise RunError(f"{self.package} wrote no results")
                return read_results(json.loads(files[-1].read_text()), tasks, self.metrics, self.package)
            except RunError as error:
                told = log.read_bytes()
                if unknown := _unknown_task(told, tasks):
                    raise InputError(TASKS, unknown, f"is no task of the {self.package} that ran") from None
                raise RunError(f"{error}; {_last_words(told, self.package)}") from None


class LMEvalEngine(HarnessEngine):
    """EleutherAI's `lm_eval` on any of its tasks, or on tasks of one's own.

    Args:
        tasks: Names of tasks or groups.
        python: Interpreter that has `lm_eval`; default: this one.
        model: Kind of model by its name there; default: `hf-multimodal` for checkpoints that take images, else `hf`.
        model_args: More arguments of the model, for example `{dtype: float32, max_images: "1"}`.
        include_path: Folder with definitions of tasks of one's own.
        chat_template: Whether questions go through the model's chat template.
        limit: Questions per task. Default: all.
        arguments: More of its command line, for example `[--batch_size, '8']`.
        metrics: Task -> metric that counts as its score; `a+b` is the sum of two, `a,b` two scores, `task:a` and
            `task:b`. Default: the first one reported.
        full_marks: Task -> best possible score, where that is not 1: the average is taken over shares of it.
    """

    package = "lm_eval"

    def __init__(
        self,
        tasks: list[str],
        python: str = "",
        model: str = "",
        model_args: dict[str, str] = {},  # noqa: B006  (never changed)
        include_path: str = "",
        chat_template: bool = True,
        limit: int | None = None,
        arguments: list[str] = [],  # noqa: B006
        metrics: dict[str, str] = {},  # noqa: B006
        full_marks: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(tasks, python, model, model_args, limit, arguments, metrics, full_marks)
        self.include_path, self.chat_template = include_path, chat_template

    def check(self) -> None:
        """Look for the harness in its interpreter, and for the folder of tasks."""
        super().check()
        if self.include_path and not Path(self.include_path).is_dir():
            raise ValueError(f"`include_path` {self.include_path}: no such folder")

    def _arguments(self, folder: Path, device: torch.device, loading: Mapping[str, str]) -> list[str]:
        model = self.model or ("hf-multimodal" if takes_images(folder) else "hf")
        own = ["--include_path", self.include_path] if self.include_path else []
        if self.chat_template:
            own.append("--apply_chat_template")
        return self._common(model, folder, device, loading) + own


class LMMSEvalEngine(HarnessEngine):
    """`lmms_eval` on the papers' nine benchmarks, or on any other of its tasks.

    MME counts as perception plus cognition, of 2800.

    Args:
        tasks: Names of tasks. Default: those of the papers.
        python: Interpreter that has `lmms_eval`; default: this one.
        model: Kind of model by its name there: `llava_hf`, `qwen2_vl`, `qwen2_5_vl`, ...
        model_args: More arguments of the model, for example `{device_map: cpu}`.
        limit: Questions per task. Default: all.
        arguments: More of its command line, for example `[--batch_size, '8']`.
        metrics: Task -> metric that counts as its score; `a+b` is the sum of two, `a,b` two scores, `task:a` and
            `task:b`. Default: that of the papers, else the first one reported.
        full_marks: Task -> best possible score, where that is not 1: the average is taken over shares of it. Default:
            2800 of MME, 100 of MMBench.
    """

    package = "lmms_eval"

    def __init__(
        self,
        tasks: list[str] = list(PAPER_TASKS),  # noqa: B006  (never changed)
        python: str = "",
        model: str = "llava_hf",
        model_args: dict[str, str] = {},  # noqa: B006
        limit: int | None = None,
        arguments: list[str] = [],  # noqa: B006
        metrics: dict[str, str] = {},  # noqa: B006
        full_marks: dict[str, float] = {},  # noqa: B006
    ) -> None:
        of_papers = {task: metric for task, metric in _PAPER_METRICS.items() if task in tasks}
        marks = {task: mark for task, mark in _PAPER_FULL_MARKS.items() if task in tasks}
        super().__init__(
            tasks, python, model, model_args, limit, arguments, {**of_papers, **metrics}, {**marks, **full_marks}
        )

    def _arguments(self, folder: Path, device: torch.device, loading: Mapping[str, str]) -> list[str]:
        return self._common(self.model, folder, device, loading)


def _with_own_package(folder: Path, known: str) -> str:
    """A search path on which another interpreter finds this package, and nothing that is installed beside it."""
    folder.mkdir()
    (folder / "lvlm_prune").symlink_to(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [str(folder), known]))


def _lines(log: bytes) -> list[str]:
    """What the child said, without the colours of its logger."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.decode(errors="replace"))
    return [line.strip() for line in plain.splitlines() if line.strip()]


def _unknown_task(log: bytes, tasks: Sequence[str]) -> str:
    """The first task that the child says it does not know; empty where it complains of something else.

    Example:
        >>> _unknown_task(b"ValueError: Tasks not found: gqaa, popee", ["pope", "popee"])
        'popee'
        >>> _unknown_task(b"Tasks were not found: gqaa.", ["gqaa"]), _unknown_task(b"no file gqaa", ["gqaa"])
        ('gqaa', '')
    """
    said = re.findall(
        r"Tasks? (?:were |was )?not found:(.*)|Tasks? (.*) (?:were|was) not found", "\n".join(_lines(log))
    )
    names = {name.strip("'\".") for one in said for name in re.split(r"[\s,\[\]]+", " ".join(one))}
    return next((task for task in tasks if task in names), "")


def _last_words(log: bytes, package: str) -> str:
    """The last line that the child said, and where all of it is kept."""
    lines = _lines(log)
    with NamedTemporaryFile(prefix=f"{package}-", suffix=".log", delete=False) as kept:
        kept.write(log)
    return f"its last words: {lines[-1][:200] if lines else '(none)'} (all of them in {kept.name})"
