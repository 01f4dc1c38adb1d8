"""Turns the emulated CUDA device on when Python starts, in every process that has this folder on its path."""

import os
import sys
from pathlib import Path

if os.environ.get("EMULATED_CUDA_DEVICES", "0") != "0":
    sys.path.append(str(Path(__file__).parents[3]))
    from tests.emulated_cuda.device import turn_on

    turn_on()
