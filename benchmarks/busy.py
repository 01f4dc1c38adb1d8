"""How much longer the quick start takes beside a program that keeps a core busy.

    python -m benchmarks.busy --json benchmarks/busy.json
    python -m benchmarks.busy --samples 96 --scored     the whole quick start, of which most is the same over and over
    python -m benchmarks.busy --spinning        also as it would be with threads that spin while they wait (minutes)

Prunes the embedded model in turns with nothing beside it and one thread (1.00), and beside busy neighbours as a user's
command does, with nothing set. Every run must give the same weights. The machine should have nothing else to do.
Where the CPU has no instructions for bfloat16, a run with 8 samples takes twenty seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What a user may have set, and what the runs are to set by themselves.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ONE_THREAD, AS_IT_IS = {"OMP_NUM_THREADS": "1"}, {}
# Two variables: with the first, threads spin; with the second, there are as many as torch has by itself.
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": str(os.cpu_count())}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that do nothing else than keep a core busy each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def quick_start(variables: Mapping[str, str], samples: int, scored: bool) -> tuple[float, str]:
    """Run the README's first command; seconds by the clock, and a digest of the weights that it writes."""
    environment = {name: value for name, value in os.environ.items() if name not in _THREADS} | variables
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "out")
        command = [sys.executable, "-m", "lvlm_prune.cli", "prune", "--pruning.sparsity=0.6", f"--output={output}"]
        command += [f"--data.num_samples={samples}"]
        command += [] if scored else ["--evaluate=false", "--report=false"]
        clock = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - clock
        weights = b"".join(shard.read_bytes() for shard in sorted(output.glob("*.safetensors")))
    return seconds, hashlib.sha256(weights).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each kind, in turns")
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--scored", action="store_true", help="with the benchmark before and after, and the page")
    parser.add_argument("--spinning", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds: dict[str, tuple[int, Mapping[str, str]]] = {
        "quiet, one thread": (0, ONE_THREAD),
        "busy, as it is": (options.neighbours, AS_IT_IS),
    }
    if options.spinning:
        kinds["busy, spinning"] = (options.neighbours, SPINNING)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    digests = set()
    for _ in range(options.runs):
        for kind, (count, variables) in kinds.items():
            with neighbours(count):
                taken, digest = quick_start(variables, options.samples, options.scored)
            seconds[kind].append(taken)
            digests.add(digest)
            print(f"{kind:20} {taken / seconds['quiet, one thread'][-1]:6.2f}", flush=True)
    quiet = statistics.median(seconds["quiet, one thread"])
    ratios = {kind: statistics.median(taken) / quiet for kind, taken in seconds.items()}
    print(*(f"{kind:20} {ratio:6.2f} (median)" for kind, ratio in ratios.items()), sep="\n")
    if len(digests) > 1:
        sys.exit("the runs wrote different weights")
    if options.json is not None:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        record: dict[str, Any] = {"date": date.today().isoformat(), "options": asked, "ratios": ratios}
        record["machine"] = f"{_processor()}, {os.cpu_count()} cores, torch {version('torch')}"
        options.json.write_text(json.dumps(record | {"seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
