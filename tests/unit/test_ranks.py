"""What launchers put into the environment is understood, or refused before anything reads it."""

import time

import pytest
import torch

from lvlm_prune.cli import main
from lvlm_prune.distributed import launching
from lvlm_prune.distributed.ranks import refuse_wrong_port, refuse_wrong_ranks
from lvlm_prune.errors import InputError, RunError

_WRONG = [
    {"LOCAL_RANK": "x"},
    {"RANK": ""},
    {"RANK": "-1", "WORLD_SIZE": "2"},
    {"SLURM_PROCID": "1.5"},
    {"NODE_RANK": "²"},
    {"WORLD_SIZE": "two"},
    {"LOCAL_RANK": "1"},  # of how many?
    {"RANK": "2", "WORLD_SIZE": "2"},
    {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"},
    # Half of what a launcher sets, left over in a shell.
    {"RANK": "3", "WORLD_SIZE": "8"},
    {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    {"LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    {"SLURM_NTASKS": "4"},
    {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
    {"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0"},
    {"NODE_RANK": "1"},
]


def test_a_number_left_over_is_not_waited_for_where_several_devices_are_asked(monkeypatch, tmp_path, capsys):
    """With one device it is harmless; Lightning takes it for the sign that somebody else starts the processes."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    asked = ["prune", "--trainer.accelerator=cpu", "--trainer.devices=2", f"--output={tmp_path / 'out'}"]
    assert main(asked) == 2
    assert capsys.readouterr().err.startswith("error: LOCAL_RANK=0: set without WORLD_SIZE")
    assert not list(tmp_path.iterdir())


def test_who_waits_for_other_processes_says_where_and_in_the_end_ends_in_one_line(monkeypatch, capsys):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "_SAID_AFTER", 0)

    def nobody_comes():
        with launching.meeting():
            time.sleep(0.2)
            raise torch.distributed.DistStoreError("no reply")

    with pytest.raises(RunError, match=r"do not meet at 127\.0\.0\.1:29500: no reply"):
        nobody_comes()
    assert capsys.readouterr().err.startswith("waiting at 127.0.0.1:29500 for the other processes, 2 in all; ")


@pytest.mark.parametrize("variables", _WRONG, ids=str)
def test_an_environment_without_a_number_for_this_process_is_one_line(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["prune", "--output", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"error: {name}={value}: ") for name, value in variables.items())


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"},  # torchrun
        {
            "LOCAL_RANK": "1",
            "NODE_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "node0",
            "MASTER_PORT": "1",
        },  # Lightning
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "7"},
        {"RANK": "3", "WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
        | {"SLURM_NODEID": "1", "SLURM_JOB_ID": "7"},  # a job's script sets the first two
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"},
        {"SLURM_PROCID": "0"},
        {"NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
        {"NODE_RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "8"},
    ],
    ids=str,
)
def test_what_launchers_set_is_taken(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse_wrong_ranks()


def test_the_number_of_a_node_without_other_nodes_is_one_line(monkeypatch, capsys):
    """A process on a node that is not the first says nothing, and would be alone."""
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(["prune", "--trainer.accelerator=cpu", "--trainer.devices=1", "--output", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --trainer.num_nodes 1: NODE_RANK is 1: give the number of nodes, or unset it"


@pytest.mark.parametrize("port", ["x", "", "0", "65536", "tcp://10.0.0.1:80"])
def test_processes_meet_at_a_port(port, monkeypatch):
    refuse_wrong_port()
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match=r"^MASTER_PORT="):
        refuse_wrong_port()
