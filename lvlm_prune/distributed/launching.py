"""The processes of a run: started by torchrun or SLURM, or by the first of them as copies of itself.

    torchrun, srun      ●  ●  ●  ●      each joins the group first, and all check their options together
    one command         ● ─ checks ─► starts ●  ●  ●      only if its checks found nothing; each child checks again

A child that ends before its time ends its parent, and the other way round, also while the other one computes.
"""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as _TrainerLauncher

from lvlm_prune.distributed.hardware import Hardware
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.distributed.ranks import is_first_process, refuse_wrong_port
from lvlm_prune.errors import InputError, ProcessLost, RunError, first_line

_PARENT = "_LVLM_PRUNE_PARENT"
# How long a process may take to end by itself once the run is over, in seconds.
_GRACE = 20.0
# How long it waits for the others in silence.
_SAID_AFTER = 30.0


class Children:
    """Processes that this one started to share its run; at first there are none.

    Attributes:
        lost_child: Whether one of them ended before its time.
    """

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self.lost_child = False

    def watch(self, children: list[subprocess.Popen[bytes]]) -> None:
        """Interrupt this process when one of `children` is gone that did not end with the others."""
        self._children = children
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            # What a child says before it ends reaches this process at its next message; what it does not say, never.
            if any(child.poll() for child in self._children):
                if not self._over.wait(2.0):
                    self.lost_child = True
                    _thread.interrupt_main()
                return

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the context is open, all processes end alike; one that started no others ends as it does."""
        yield

    def release(self) -> None:
        """From now on they may end."""
        self._over.set()

    def error_to_show(self, error: BaseException) -> BaseException:
        """The error to end with: the loss of a child instead of what it led to."""
        if self.lost_child or isinstance(error, ProcessLost):
            self.lost_child = True
            for rank, child in enumerate(self._children, start=1):
                if code := child.poll():
                    how = f"signal {-code}" if code < 0 else f"status {code}"
                    return ProcessLost(f"process {rank} of this run ended before its time ({how})")
        return error


class TrainingLauncher(_TrainerLauncher):
    """Starts the other processes of `Trainer.fit`, and says so where one is lost.

    Lightning's own kills this process without a word then.

    Args:
        launcher: Lightning's own.
        children: What watches them.
    """

    def __init__(self, launcher: _TrainerLauncher, children: Children) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self._watched = children

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the others where no launcher did, and call `function`."""
        if not self.cluster_environment.creates_processes_externally:
            be_followed()
            _meet_here(self.num_nodes)
            self._call_children_scripts()  # after which Lightning takes them for started by somebody else
            self._watched.watch(self.procs)
        with meeting():
            return super().launch(function, *args, trainer=trainer, **kwargs)


class Launch(Children):
    """Fabric on the Trainer's devices, and the processes that it needs.

    Args:
        hardware: Devices, nodes, accelerator, loggers.
        callbacks: Whose hooks Fabric is to raise.

    Attributes:
        fabric: The Fabric; launched once `start` was called.
        processes: All processes of the run; a single one before.

    Raises:
        InputError: The strategy cannot be used, or a launcher started another number of processes.
    """

    def __init__(self, hardware: Hardware, callbacks: Sequence[Callback]) -> None:
        super().__init__()
        if hardware.strategy not in ("ddp", "auto"):
            problem = "pruning knows `ddp` and a single device; a block always fits on one device"
            raise InputError("trainer.strategy", hardware.strategy, problem)
        refuse_mismatch(hardware)
        devices: Any = hardware.devices if hardware.accelerator == "cpu" else list(hardware.device_ids)
        self.fabric = Fabric(
            accelerator=hardware.accelerator,
            devices=devices,
            num_nodes=hardware.nodes,
            strategy=hardware.strategy,
            callbacks=list(callbacks),
            loggers=list(hardware.loggers),
        )
        self.processes = Processes()
        self._per_node, self._nodes = hardware.devices, hardware.nodes
        self._count = self._per_node * self._nodes
        self._environment = getattr(self.fabric.strategy, "cluster_environment", None)
        self._variables = dict(os.environ)

    @property
    def joins(self) -> bool:
        """True where somebody else started all processes, and this one is to join them before anything else."""
        return self._count > 1 and bool(self._environment and self._environment.creates_processes_externally)

    def start(self) -> None:
        """Bring all processes together; with several devices and no launcher, start the others first."""
        if self.processes.count > 1:
            return
        if self._count > 1 and not self.joins:
            self._start_children()
        follow_parent()
        with meeting():
            self.fabric.launch()
        self.processes = Processes(self.fabric)

    def _start_children(self) -> None:
        _meet_here(self._nodes)
        if self._nodes == 1 and "MASTER_PORT" not in os.environ:
            # A port that is held from the start cannot be taken by another program before the processes meet.
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            os.environ["MASTER_PORT"] = str(self._store.port)
        launcher = _SubprocessScriptLauncher(LightningEnvironment(), self._per_node, self._nodes)
        be_followed()
        launcher._call_children_scripts()
        self.watch(launcher.procs)

    @contextmanager
    def together(self) -> Iterator[None]:
        """While the context is open, all processes end alike: with the error of the first that fails, shown by it."""
        try:
            yield
        except BaseException as problem:
            error = self.error_to_show(problem)
            if error is problem:
                raise
            raise error from None
        finally:
            self.close(at_once=isinstance(sys.exception(), KeyboardInterrupt))

    def error_to_show(self, error: BaseException) -> BaseException:
        """The error to end with: agreed with the other processes; the loss of a child instead of what it led to."""
        if self.lost_child or isinstance(error, ProcessLost):
            return super().error_to_show(error)
        self.release()
        return self.processes.error_to_show(error)

    def close(self, at_once: bool = False) -> None:
        """Leave the group of processes and see the children end.

        Args:
            at_once: Give the children no time to end by themselves.
        """
        self.release()
        if dist.is_initialized() and self._count > 1:
            dist.destroy_process_group()
        deadline = time.monotonic() + (0 if at_once or self.lost_child else _GRACE)
        for child in self._children:
            try:
                child.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                child.kill()
        for name in os.environ.keys() - self._variables.keys():
            del os.environ[name]
        os.environ.update(self._variables)


class SharedLaunch(Launch):
    """Another Fabric, with other callbacks, for processes that an earlier launch brought together and will end.

    Args:
        hardware: As for `Launch`.
        callbacks: Whose hooks Fabric is to raise.
        launch: The launch that was started.
    """

    def __init__(self, hardware: Hardware, callbacks: Sequence[Callback], launch: Launch) -> None:
        super().__init__(hardware, callbacks)
        self.processes = launch.processes

    @property
    def joins(self) -> bool:
        """The processes are together already."""
        return False

    def start(self) -> None:
        """Nothing is left to do."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """The launch that brought the processes together sees to their end."""
        yield


@contextmanager
def meeting() -> Iterator[None]:
    """Within, this process meets the others of its run; where they do not come, it says for whom it waits.

    Raises:
        RunError: They did not come for half an hour, or cannot reach each other.
    """
    over = threading.Event()
    if is_first_process():
        threading.Thread(target=_say_of_waiting, args=(over,), daemon=True).start()
    try:
        yield
    except dist.DistError as error:
        if dist.is_initialized():  # they met, and lost each other later
            raise
        raise RunError(f"the processes of this run do not meet at {_place()}: {first_line(error)}") from None
    finally:
        over.set()


def _say_of_waiting(over: threading.Event) -> None:
    if not over.wait(_SAID_AFTER) and not dist.is_initialized() and "MASTER_PORT" in os.environ:
        count = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS", "several")
        way_out = "where the environment is left over of another launch, unset RANK, LOCAL_RANK and WORLD_SIZE"
        print(f"waiting at {_place()} for the other processes, {count} in all; {way_out}", file=sys.stderr, flush=True)


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '')}"


def _meet_here(nodes: int) -> None:
    """Of processes that this one starts on its own machine none need another one's address, left over of a launch."""
    if nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def be_followed() -> None:
    """Processes that this one starts from now on to share its run end with it, whatever ends it."""
    os.environ[_PARENT] = str(os.getpid())


def follow_parent() -> None:
    """End with the process that started this one to share its run, where there is one."""
    parent = int(os.environ.get(_PARENT, os.getpid()))
    if parent != os.getpid():
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def refuse_mismatch(hardware: Hardware) -> None:
    """Refuse another number of processes than devices times nodes, before they wait for each other in vain.

    Raises:
        InputError: A launcher started more or fewer, or several are wanted and nothing right says where they meet.
    """
    started = _started_processes()
    wanted = hardware.world_size
    if wanted > 1:
        refuse_wrong_port()
        if started is None and "LOCAL_RANK" in os.environ:  # by which Lightning knows that others were started
            problem = (
                "set without WORLD_SIZE: who starts several processes sets both; unset LOCAL_RANK to start them here"
            )
            raise InputError("", f"LOCAL_RANK={os.environ['LOCAL_RANK']}", problem)
    if started is not None and started[1] != wanted:
        launcher, count = started
        asked = f"{hardware.devices} x {hardware.nodes}"
        counted = f"{count} process" + ("es" if count > 1 else "")
        problem = f"{launcher} started {counted}, devices x num_nodes is {asked} = {wanted}"
        raise InputError("trainer.devices", hardware.devices, problem)
    if started is None and hardware.nodes == 1 and (node := os.environ.get("NODE_RANK", "0")) != "0":
        error = InputError("trainer.num_nodes", 1, f"NODE_RANK is {node}: give the number of nodes, or unset it")
        error.agreed = True  # of the process of each node, since they never meet
        raise error
    if started is None and hardware.nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing and isinstance(hardware.environment, LightningEnvironment):
            problem = f"needs torchrun or srun, or {', '.join(missing)} in the environment of each node's process"
            raise InputError("trainer.num_nodes", hardware.nodes, problem)


def _started_processes() -> tuple[str, int] | None:
    """Who started all processes, and how many; None where this process is to start the others."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return "srun", int(os.environ["SLURM_NTASKS"])
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "the launcher", int(os.environ["WORLD_SIZE"])
    return None
