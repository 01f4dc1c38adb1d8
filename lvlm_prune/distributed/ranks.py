"""What launchers (torchrun, SLURM, Lightning) put into the environment: read before Lightning is, which trusts it."""

from __future__ import annotations

import os
import re

from lvlm_prune.errors import InputError

_COUNTS = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
"""Number of a process -> how many there are."""
_OTHERS = ("NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID", "SLURM_NODEID", "JSM_NAMESPACE_RANK")
_OF_TORCHRUN = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_NODES = ("MASTER_ADDR", "MASTER_PORT")
_OF_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")


def refuse_wrong_ranks() -> None:
    """Refuse an environment in which this process has no number, or none of a known count.

    Raises:
        InputError: A variable holds what no launcher sets; names it.
    """
    for name in sorted({*_COUNTS, *_COUNTS.values(), *_OTHERS} & os.environ.keys()):
        if re.fullmatch(r"\d{1,9}", os.environ[name], re.ASCII) is None:
            raise InputError("", f"{name}={os.environ[name]}", "expected a number, as launchers set it, or no variable")
    for name, count in _COUNTS.items():
        if name in os.environ and int(os.environ[name]) >= int(os.environ.get(count, 1)):
            problem = f"there is no such process with {count}={os.environ.get(count, '')}; unset both to run alone"
            raise InputError("", f"{name}={os.environ[name]}", problem)
    _refuse_half_a_launch()


def _refuse_half_a_launch() -> None:
    """Refuse what is left over of a launch: a process that takes itself for one of eight waits for them, or is silent.

    torchrun and Lightning say where the processes meet and what number each has on its node; srun, which says otherwise
    where they meet, gives all four numbers of a task.

    Raises:
        InputError: A part of what a launcher sets is missing; names it.
    """
    launchers: list[tuple[str, str, tuple[str, ...]]] = []
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    # The script of a job may number its tasks as SLURM does.
    if not is_alone and os.environ.get("RANK") != os.environ.get("SLURM_PROCID", ""):
        launchers += [("torchrun", name, _OF_TORCHRUN) for name in ("RANK", "LOCAL_RANK")]
    # A shell in an allocation knows how many tasks there may be, and is none of them; Lightning knows it by its name.
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launchers.append(("srun", "SLURM_NTASKS", _OF_SRUN))
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        launchers.append(("who starts a process on each node", "NODE_RANK", _OF_NODES))
    for launcher, name, others in launchers:
        missing = [other for other in others if other not in os.environ]
        if name in os.environ and missing:
            problem = f"set without {', '.join(missing)}: {launcher} sets all of them; unset {name} to run alone"
            raise InputError("", f"{name}={os.environ[name]}", problem)


def refuse_wrong_port() -> None:
    """Refuse a port at which several processes cannot meet.

    Raises:
        InputError: `MASTER_PORT` is none.
    """
    port = os.environ.get("MASTER_PORT", "1")
    if re.fullmatch(r"\d{1,5}", port, re.ASCII) is None or not 0 < int(port) < 2**16:
        raise InputError("", f"MASTER_PORT={port}", "expected the number of a port, or no variable")


def is_first_process() -> bool:
    """Whether this is the first of all processes of its run, by what launchers put into the environment.

    It tells who speaks before the processes know of each other.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
