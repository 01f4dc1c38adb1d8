"""Which families of transformers are pruned exactly: every name of its image-text-to-text mapping, on a tiny model.

    python -m benchmarks.families.coverage                        all that are not in coverage.json yet, and the table
    python -m benchmarks.families.coverage qwen3_vl gemma4        these, again
    python -m benchmarks.families.coverage --all                  everything again

Each name runs in a process of its own with a time limit, so that one that hangs or dies does not take the others along.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from benchmarks.families import timm_stand_in
from benchmarks.families.checks import check
from benchmarks.families.tiny_config import names
from benchmarks.families.verdicts import table, verdict

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "coverage.json", HERE.parents[1] / "docs" / "families.md"


def run(name: str, seconds: float, work: Callable[[str], dict[str, Any]] = check) -> dict[str, Any]:
    """Check one name in a process of its own, forked from this one.

    Args:
        name: Of the family.
        seconds: Time limit.
        work: What is done there.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_check, args=(name, work, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"reason": f"not done after {seconds:.0f} s"}
    except EOFError:
        child.join()
        return {"reason": f"the check ended early with exit status {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _send_check(name: str, work: Callable[[str], dict[str, Any]], sender: Connection) -> None:
    timm_stand_in.install()
    sender.send(work(name))


def quiet() -> None:
    """Nothing on the screen but the verdicts; one thread, which a forked process can go on with."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Check the names that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="also those that stand in the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file with one line for each name")
    parser.add_argument("--table", type=Path, default=TABLE, help="Markdown file")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a name")
    options = parser.parse_args()
    quiet()
    file: Path = options.results
    found = json.loads(file.read_text()) if file.is_file() else {"results": {}}
    if found.get("transformers") != transformers.__version__:
        found = {"transformers": transformers.__version__, "results": {}}
    results = found["results"]
    for name in options.names or names():
        if name in results and not options.all and not options.names:
            continue
        results[name] = run(name, options.seconds)
        print(f"{name:28s} {verdict(name, results[name])}", flush=True)
        file.write_text(_one_line_each(found))
    options.table.write_text(table(results, found["transformers"]))


def _one_line_each(found: dict[str, Any]) -> str:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(found["results"].items()))
    return f'{{"transformers": {json.dumps(found["transformers"])}, "results": {{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    main()
