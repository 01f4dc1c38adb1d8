"""What launching needs to know of a Trainer: accelerator, devices, nodes, strategy, loggers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lvlm_prune.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Args:
        accelerator: `cpu` or `cuda`.
        device: The device of this process.
        devices: Devices, and so processes, on this machine.
        device_ids: Their numbers; as many as there are devices.
        nodes: Number of machines.
        strategy: `ddp` for several processes, `auto` for one device, or the name of a strategy that runs blocks in no
            way known here.
        environment: Lightning's cluster environment: who starts the processes; None where there is only one.
        loggers: Lightning loggers.
    """

    accelerator: str
    device: torch.device
    devices: int = 1
    device_ids: tuple[int, ...] = (0,)
    nodes: int = 1
    strategy: str = "auto"
    environment: Any = None
    loggers: tuple[Any, ...] = ()

    @classmethod
    def of(cls, trainer: L.Trainer) -> Hardware:
        """The hardware that a Trainer was made for."""
        strategy = type(trainer.strategy).__name__
        if isinstance(trainer.strategy, DDPStrategy):
            strategy = "ddp"
        elif isinstance(trainer.strategy, SingleDeviceStrategy):
            strategy = "auto"
        device = trainer.strategy.root_device
        environment = getattr(trainer.strategy, "cluster_environment", None)
        ids, loggers = tuple(trainer.device_ids), tuple(trainer.loggers)
        return cls(device.type, device, trainer.num_devices, ids, trainer.num_nodes, strategy, environment, loggers)

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.devices * self.nodes

    def alone(self) -> Hardware:
        """The first device only, without loggers."""
        return replace(
            self, devices=1, device_ids=self.device_ids[:1], nodes=1, strategy="auto", environment=None, loggers=()
        )


def checked_accelerator(wanted: Any) -> Any:
    """The option `--trainer.accelerator`: `auto` is a CUDA GPU or else the CPU.

    Raises:
        InputError: It is an Apple GPU, which has no float64: sums over calibration tokens need it.
    """
    on_apple = torch.backends.mps.is_available() and not torch.cuda.is_available()
    if wanted == "auto" and on_apple:
        return "cpu"
    if wanted == "mps" or (wanted == "gpu" and on_apple):
        problem = "sums over tokens are in float64, which Apple's GPUs do not have; use `cpu`"
        raise InputError("trainer.accelerator", wanted, problem)
    return wanted


def names_of(option: str) -> list[str]:
    """Names that an option of Lightning's Trainer takes: of strategies and accelerators; of others none are known.

    Example:
        >>> names_of("strategy")[:2], names_of("accelerator")[:2], names_of("devices")
        (['auto', 'ddp'], ['auto', 'cpu'], [])
    """
    if option == "strategy":
        return ["auto", *StrategyRegistry.available_strategies()]
    return ["auto", "cpu", "cuda", "gpu"] if option == "accelerator" else []
