"""Recovery through `Trainer.fit`: sparse LoRA, or the pruned Linears themselves, on answer tokens."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

from lvlm_prune.distributed.launching import TrainingLauncher
from lvlm_prune.distributed.processes import is_lost_connection
from lvlm_prune.errors import InputError, LVLMPruneError, ProcessLost, RunError, first_line
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import RECOVERY_RECORD
from lvlm_prune.output.own_files import records_of
from lvlm_prune.output.progress import Progress
from lvlm_prune.output.units import readable_size
from lvlm_prune.recovery.distillation import Teacher
from lvlm_prune.recovery.masks import load_pruned
from lvlm_prune.recovery.merging import write_merged
from lvlm_prune.recovery.training_checkpoint import DurableCheckpointIO, refuse_unreadable
from lvlm_prune.runs.recover.run import CHECKPOINTS, TEACHER, RecoveryRun

if TYPE_CHECKING:
    from lvlm_prune.callbacks import FrozenMasks, LossHistory
    from lvlm_prune.module import LVLMModule


class FittingRun(RecoveryRun):
    """The methods `lora` and `full`."""

    masks: FrozenMasks
    history: LossHistory

    def _check(self, earlier: Manifest | None) -> None:
        if self.recovery.method == "full" and self.model.dtype_option == "auto":
            self.model.dtype_option = "float32"  # in bfloat16 most updates of a weight would be rounded away
        super()._check(earlier)
        self._check_batches()

    def _check_batches(self) -> None:
        """Refuse shares and intervals of batches that there are not, at which Lightning fails only behind the data."""
        trainer, data = self.trainer, self.datamodule

        def batches(samples: list[int], limit: float, option: str) -> int:
            share = len(samples) // trainer.world_size if trainer.world_size > 1 else len(samples)
            every = -(-share // data.batch_size)
            kept = min(limit, every) if isinstance(limit, int) else int(every * limit)
            if every and limit and not kept:
                raise InputError(f"trainer.{option}", limit, f"leaves no batch of {every}")
            return kept

        share = "overfit_batches" if getattr(trainer, "overfit_batches", 0) else "limit_train_batches"
        steps = batches(data.train_indices, trainer.limit_train_batches, share)
        batches(data.validation_indices, trainer.limit_val_batches, "limit_val_batches")
        interval = trainer.val_check_interval
        heeded = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
        if isinstance(interval, int) and interval > steps and heeded:
            problem = f"an epoch has {steps} batch{'' if steps == 1 else 'es'}; a share of it is written 0.5"
            raise InputError("trainer.val_check_interval", interval, problem)

    def _check_options(self) -> None:
        """Refuse options of the trainer with which nothing would be trained, or that Lightning fails at later on."""
        trainer = self.trainer
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            value = getattr(trainer, name)
            if value == 0:
                raise InputError(f"trainer.{name}", value, "nothing would be trained")
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and timer.time_remaining() == 0:
                raise InputError("trainer.max_time", 0, "nothing would be trained")
        if not trainer.max_epochs and trainer.max_steps == -1:
            raise InputError("trainer.max_epochs", trainer.max_epochs, "nothing would be trained")
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            value = getattr(trainer, name)
            if value is not None and value < 1:
                raise InputError(f"trainer.{name}", value, "must be at least 1")
        if trainer.val_check_interval == 0:
            raise InputError("trainer.val_check_interval", trainer.val_check_interval, "must be larger than 0")
        if trainer.global_step:
            problem = "has trained before, and would only go on from there; make a new one"
            raise InputError("trainer", type(trainer).__name__, problem)
        if trainer.barebones:
            raise InputError("trainer.barebones", True, "measures no loss and keeps nothing to go on from")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            given = f"ddp_{trainer.strategy.launcher._start_method}"
            problem = "trains in processes that give nothing back to this one; `ddp` trains in several"
            raise InputError("trainer.strategy", given, problem)
        clip = trainer.gradient_clip_val
        if clip is not None and not (math.isfinite(clip) and clip >= 0):
            raise InputError("trainer.gradient_clip_val", clip, "must be a finite number, 0 or larger")

    def _examine(self, earlier: Manifest | None) -> None:
        super()._examine(earlier)
        if self.dense is not None and self.trainer.is_global_zero:
            examined = self.record["data"]["examined"]
            identity = {"dense": self.record["dense"]["fingerprint"], "data": examined["fingerprint"]}
            self.teacher = Teacher(self.folder / TEACHER, self.recovery.distillation, self._samples(), identity)
            vocabulary = self.dense.model.config.get_text_config(decoder=True).vocab_size
            self.teacher_bytes = self.teacher.check_room(examined["answers"], vocabulary)

    def _samples(self) -> list[int]:
        return [*self.datamodule.train_indices, *self.datamodule.validation_indices]

    def _train(self) -> None:
        if self.dense is not None:
            # Before the pruned model is in memory.
            self._ask_dense(self.dense)
        load_pruned(self.model)
        with self._trainer_left_alone():
            self._compose()
            self._fit()

    @contextmanager
    def _trainer_left_alone(self) -> Iterator[None]:
        """Afterwards the trainer has its own callbacks, launcher and way to write checkpoints again."""
        trainer, strategy = self.trainer, self.trainer.strategy
        callbacks, launcher, checkpoint_io = trainer.callbacks, strategy.launcher, strategy.checkpoint_io
        try:
            yield
        finally:
            trainer.callbacks, strategy._launcher, strategy.checkpoint_io = callbacks, launcher, checkpoint_io

    def _ask_dense(self, dense: LVLMModule) -> None:
        """What the dense model says before each answer token."""
        if not self.trainer.is_global_zero:
            self.objective.teacher = Teacher.wait_for(
                self.folder / TEACHER, self.recovery.distillation, self._samples()
            )
            return
        self.objective.teacher = self.teacher
        if self.teacher.complete:
            return
        from lvlm_prune.recovery.dense import write_teacher

        clock = time.perf_counter()
        shown = self.trainer.progress_bar_callback is not None
        with Progress("Asking the dense model", len(self._samples()), "samples", shown=shown) as progress:
            write_teacher(dense, self.datamodule, self.teacher, self.trainer.strategy.root_device, progress.update)
        asked, seconds = self.record["data"]["examined"]["answers"], time.perf_counter() - clock
        self._say(
            f"dense model asked before {asked} answer tokens in {seconds:.0f} s ({readable_size(self.teacher_bytes)})"
        )
        self.record["teacher"] = {"seconds": seconds, "bytes": self.teacher_bytes}
        self.record.write(self.folder, RECOVERY_RECORD)  # a run that goes on does not ask again

    def _compose(self) -> None:
        """Callbacks: the user's, `FrozenMasks`, `SparseLoRA` for the method `lora`, checkpoints to go on from."""
        from lvlm_prune.callbacks import FrozenMasks, LossHistory, SparseLoRA, TrainingProgress

        trainer = self.trainer
        callbacks: list[Callback] = [
            callback
            for callback in trainer.callbacks
            if not _is_lightnings_own(callback) and not isinstance(callback, SparseLoRA)
        ]
        if trainer.progress_bar_callback is not None and trainer.progress_bar_callback not in callbacks:
            callbacks.append(TrainingProgress())
        masks = next((callback for callback in callbacks if isinstance(callback, FrozenMasks)), None)
        if masks is None:
            masks = FrozenMasks()
            callbacks.append(masks)
        self.masks = masks
        if self.lora is not None:
            callbacks.append(self.lora)
        else:
            for linear in self.model.pruned.values():
                linear.weight.requires_grad_(True)
        self.history = LossHistory()
        callbacks.append(self.history)
        self.checkpoints = ModelCheckpoint(
            dirpath=self.folder / CHECKPOINTS,
            filename="best",
            monitor="validation_loss" if self.datamodule.validation_indices else None,
            save_last=True,
            enable_version_counter=False,
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody chose another
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        trainer.callbacks = _CallbackConnector._reorder_callbacks([*callbacks, self.checkpoints])

    def _fit(self) -> None:
        last = self.folder / CHECKPOINTS / "last.ckpt"
        if self.resume and last.is_file():
            refuse_unreadable(last)
        clock, handler = time.perf_counter(), signal.getsignal(signal.SIGINT)
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            self.trainer.strategy._launcher = TrainingLauncher(launcher, self.children)
        try:
            self.trainer.fit(
                self.model, datamodule=self.datamodule, ckpt_path=last if self.resume and last.is_file() else None
            )
        except SystemExit as error:  # how Lightning passes on an interruption; it ignores any other from then on
            signal.signal(signal.SIGINT, handler)
            if isinstance(error.__context__, KeyboardInterrupt):
                raise self.children.error_to_show(error.__context__) from None
            raise
        except (OSError, LVLMPruneError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and is_lost_connection(error):
                raise self.children.error_to_show(ProcessLost()) from None
            if "validation_loss" in str(error) and self.checkpoints.monitor is None:
                problem = "watch validation_loss, and no sample is held back to measure it on; use more samples"
                raise RunError(f"--trainer.callbacks: {problem}, or --data.validation_samples") from None
            if said := self._said_by_lightning(error):
                raise RunError(said) from None
            raise
        self.children.release()
        if not self.trainer.global_step:
            raise RunError("--trainer.max_time, or a callback that stops: nothing was trained, not a single step")
        best = self.checkpoints.best_model_path if self.checkpoints.monitor else ""
        if best:
            trained = torch.load(best, weights_only=True, map_location="cpu")["state_dict"]
            self.model.load_state_dict(trained, strict=False)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        score = self.checkpoints.best_model_score
        metrics = {name: value.item() for name, value in self.trainer.logged_metrics.items()}
        self.record["training"] = {
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "steps": self.trainer.global_step,
            "epochs": self.trainer.current_epoch,
            "train_loss": None if self.history.last is None else float(self.history.last),
            "validation_loss": score.item() if best and score is not None else metrics.get("validation_loss"),
            "history": self.history.points,
            "seconds": time.perf_counter() - clock,
        }

    def _refuse_diverged(self) -> None:
        """Ask once more for the loss of a batch: a step is only known to have gone wrong by the loss behind it.

        Raises:
            RunError: It is NaN or infinite, or by 1 larger than both what a guess among all tokens gives, the logarithm
                of the vocabulary, and what it was at first.
        """
        device, batch_size = self.trainer.strategy.root_device, self.datamodule.batch_size
        model = self.model.to(device)
        batch = next(iter(self.datamodule.batches(self.datamodule.train_indices[:batch_size])))
        model.eval()
        with torch.inference_mode(), self.trainer.precision_plugin.forward_context():
            total, _, count = model.answer_losses(model.transfer_batch_to_device(batch, device, 0))
        loss, at_first = (total / count).item(), [loss for _, loss in self.history.points["train_loss"][:1]]
        useless = max([math.log(model.model.config.get_text_config(decoder=True).vocab_size), *at_first]) + 1
        if not loss <= useless:
            found = f"{loss:.3g}, more than that of a guess" if math.isfinite(loss) else "NaN or infinite"
            rate = self.recovery.optimization.learning_rate
            problem = f"the loss is {found}, after the last step; lower --optimization.learning_rate {rate:g}"
            raise RunError(problem)

    def _said_by_lightning(self, error: Exception) -> str:
        """The option at which Lightning fails, and why, in a line; empty for an error of ours or of a user's plugin.

        What its options come to is known to Lightning only once it has seen the data, and whether one of its callbacks
        suits this training only once that is called.
        """
        frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        why = first_line(error)
        in_callbacks = any(parts[-4:-1] == ("lightning", "pytorch", "callbacks") for parts in frames)
        if not isinstance(error, MisconfigurationException) and not in_callbacks and "lightning" not in frames[-1]:
            return ""
        trainer, given = self.trainer, None
        for name in re.findall(r"`(\w+)`", why):
            if name == "limit_train_batches" and getattr(trainer, "overfit_batches", 0):
                name = "overfit_batches"  # Lightning turns the one into the other
            if given is None and isinstance(getattr(trainer, name, None), (int, float)):
                given = f"trainer.{name} {getattr(trainer, name)}"
        return f"--{given or 'trainer.callbacks'}: {why}"

    def _write(self) -> None:
        base = self.model.folder
        assert base is not None
        self._refuse_diverged()
        self.record["status"] = "writing"
        self.record.write(self.folder, RECOVERY_RECORD)
        masks = self.masks.masks
        write_merged(self.model, base, self._copy_base(), self.weights, masks)
        self._verify(masks)
        if not self.record["verified"]["changed_linears"]:
            rate = self.recovery.optimization.learning_rate
            problem = "training changed no weight, each change is rounded away as weights are stored"
            raise RunError(f"{problem}; raise --optimization.learning_rate {rate:g}")
        if self.lora is not None:
            from peft import get_peft_model_state_dict

            from lvlm_prune.recovery.adapter_folder import mask_digest, save_sparse_adapter

            save_sparse_adapter(
                self.folder / "adapter",
                self.model.model.peft_config["default"],
                get_peft_model_state_dict(self.model.model, adapter_name="default"),
                {name: mask_digest(self.model.pruned[name].weight) for name in self.model.adapted},
                self.lora.gradient,
                self.model.path,
            )
            self.record["files"] |= records_of(self.folder, [self.folder / "adapter"])
        self._release()


def _is_lightnings_own(callback: Callback) -> bool:
    """What nobody asked for: Lightning's default checkpoint callback, and its bar where that would fill a file."""
    if type(callback) in (RichProgressBar, TQDMProgressBar):
        return not sys.stdout.isatty()
    return type(callback) is ModelCheckpoint and callback.dirpath is None and callback.monitor is None
