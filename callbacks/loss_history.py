"""Losses of a training run, step by step, for its record and its page."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule

_MOST_POINTS = 400


class LossHistory(Callback):
    """Keeps `train_loss` of optimizer steps and `validation_loss` of validations; goes on where a resumed run left.

    Of long runs every other point is left out whenever there are 400, so that the record stays short.
    """

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {"train_loss": [], "validation_loss": []}
        self.last: Any = None
        self._every = 1

    def on_train_start(self, trainer: Trainer, pl_module: "LVLMModule") -> None:  # type: ignore[override]
        """Have loggers hear of a step of each epoch at least, however few it has."""
        steps = max(trainer.num_training_batches // trainer.accumulate_grad_batches, 1)
        trainer.log_every_n_steps = int(min(trainer.log_every_n_steps, steps))  # type: ignore[attr-defined]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: "LVLMModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of an optimizer step."""
        points, step = self.points["train_loss"], trainer.global_step
        self.last = trainer.callback_metrics["train_loss"]
        if step == 0 or step % self._every or (points and points[-1][0] == step):
            return
        points.append((step, float(trainer.callback_metrics["train_loss"])))
        if len(points) >= _MOST_POINTS:
            self._every *= 2
            self.points["train_loss"] = [point for point in points if point[0] % self._every == 0]

    def on_validation_end(self, trainer: Trainer, pl_module: "LVLMModule") -> None:  # type: ignore[override]
        """Note the loss of a validation."""
        if not trainer.sanity_checking and "validation_loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["validation_loss"])
            self.points["validation_loss"].append((trainer.global_step, loss))

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, for the training checkpoint."""
        last = None if self.last is None else float(self.last)
        return {"points": self.points, "every": self._every, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the losses of an interrupted training from its checkpoint."""
        self.points = {name: [tuple(point) for point in points] for name, points in state_dict["points"].items()}
        self._every, self.last = state_dict["every"], state_dict.get("last")
