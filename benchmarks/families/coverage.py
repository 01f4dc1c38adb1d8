"""Which families of transformers are pruned exactly: every name of its image-text-to-text mapping, on a tiny model.

    python -m benchmarks.families.coverage --folder benchmarks/families      all, into coverage.json and COVERAGE.md
    python -m benchmarks.families.coverage qwen3_vl gemma4          only some, from the root of the repository

Each name runs in a process of its own with a time limit. Finished ones stand in the JSON
file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "result: "
EXACT = "exact"
REPOSITORY = Path(__file__).parents[2]


def run(name: str, seconds: int) -> dict[str, Any]:
    """Check one name in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.families.coverage", "--child", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    try:
        child = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {seconds} s"}
    line = next((line for line in child.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        return {"reason": f"the check ended early: {last[0][:200]}"}
    return json.loads(line.removeprefix(MARK))


def _child(name: str) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.families import timm_stand_in
    from benchmarks.families.checks import check

    disable_progress_bar()
    timm_stand_in.install()
    print(MARK + json.dumps(check(name)), flush=True)


def verdict(found: dict[str, Any]) -> str:
    """`exact`, or in one line why not."""
    if "reason" in found:
        return found["reason"]
    kinds = {**found["float32"], "blocks pruned on the way": found["pruned"]}
    kinds |= {f"bfloat16, {kind}": text for kind, text in found["bfloat16"].items() if text != "own forward fails"}
    wrong = [f"{kind}: {text}" for kind, text in kinds.items() if text != EXACT]
    folder = found["folder"]
    if isinstance(folder, str):
        wrong.append(f"folder: {folder}")
    else:
        if folder["different"] > max(2, 1e-4 * folder["weights"]) or not folder["same_linears"]:
            wrong.append(f"folder: {folder['different']} of {folder['weights']} weights differ")
        if not folder["reloads"]:
            wrong.append("folder: keys are lost")
    return "; ".join(wrong) or EXACT


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    verdicts = {name: verdict(found) for name, found in results.items()}
    decoders = [name for name, found in results.items() if "blocks" in found and ":" not in name]
    exact = [name for name in decoders if verdicts[name] == EXACT]
    lines = [
        "# Families",
        "",
        f"Of the {sum(':' not in name for name in results)} names of the image-text-to-text mapping of transformers "
        f"{_version()}, {len(decoders)} have a decoder of the kind that this package prunes; {len(exact)} of them are "
        "exact. Each is a tiny random model made from the default configuration:",
        "",
        "- chained blocks equal the model's own forward bit by bit, in float32 and bfloat16, for single samples, "
        "batches padded on either side, and text; also when blocks are pruned on the way (float32);",
        "- a checkpoint folder pruned with Wanda at 50% has the masks that whole forwards of the model give (up to one "
        "weight in ten thousand, for ties), and loads with no missing or unexpected key.",
        "",
        "Where no form of image input that was tried fits the family, only text was checked. A name with a colon is a "
        "variant. Made by `python -m benchmarks.families.coverage`; numbers in `coverage.json`.",
        "",
        "| family | checked with | Linears | result |",
        "|---|---|---|---|",
    ]
    for name, found in sorted(results.items()):
        folder = found.get("folder")
        linears = folder["linears"] if isinstance(folder, dict) else ""
        kind = "" if "images" not in found else "images, text" if "text" in found.get("float32", {}) else "images"
        if found.get("images") is False:
            kind = "text"
        lines.append(f"| `{name}` | {kind} | {linears} | {verdicts[name].replace('|', '/')} |")
    return "\n".join([*lines, ""])


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")


def main() -> None:
    """Check the names that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--folder", type=Path, help="of coverage.json, whose names are not repeated, and COVERAGE.md")
    parser.add_argument("--seconds", type=int, default=300, help="time limit of a name")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child)
        return
    from benchmarks.families.tiny_config import names

    file = options.folder / "coverage.json" if options.folder else None
    results = json.loads(file.read_text()) if file and file.is_file() else {}
    for name in options.names or names():
        if name not in results or options.names:
            results[name] = run(name, options.seconds)
            print(f"{name:28s} {verdict(results[name])}", flush=True)
            if file:
                file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    if options.folder:
        (options.folder / "COVERAGE.md").write_text(table(results))


if __name__ == "__main__":
    main()
