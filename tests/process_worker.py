"""One of several processes, as torchrun starts them, that runs commands one after the other: imports are paid for once.

    python -m tests.process_worker JOBS.json        with RANK, WORLD_SIZE, ... in the environment

Each job is {"name", "arguments", "port"}; what comes of it is written to {name}.{rank}.json in the working directory.
"""

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from lvlm_prune.cli import main


def run(arguments: list[str]) -> dict[str, object]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(arguments)
        except Exception:
            status = 1
            traceback.print_exc(file=err)
    return {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        found = run(job["arguments"])
        Path(f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(found))
    # As the program itself ends: threads of libraries can abort a process that lets go of everything in order.
    os._exit(0)
