"""One recovery from a pruned checkpoint to a better one with the same zeros.

check ─► load the base ─► inject adapters ─► Trainer.fit ─► merge into a copy, verify ─► adapter, record, scores
(nothing written)                            checkpoints/                                checkpoints/ removed
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

from lvlm_prune.blocks import CheckpointFolder, StreamedWeights
from lvlm_prune.data import RecoveryDataModule, load_processor
from lvlm_prune.errors import InputError, RunError
from lvlm_prune.manifest import FILE_NAME, Manifest, replace_durably
from lvlm_prune.output_folder import choose_folder, copy_checkpoint, refuse_unusable, release
from lvlm_prune.patterns import Pattern, parse_pattern
from lvlm_prune.recovery.merging import verify_merged, write_merged
from lvlm_prune.recovery.optimization import Optimization

if TYPE_CHECKING:
    from lvlm_prune.callbacks import FrozenMasks, SparseLoRA
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer

RECORD_NAME = "recovery.json"
DEMO_SPARSITY = 0.7
Method = Literal["lora", "full"]

# Of the run that made the base; they would be taken for records of this run.
_RECORDS = (FILE_NAME, RECORD_NAME, "config.yaml", "report.html", "statistics.safetensors", "adapter", "checkpoints")


class RecoveryRun:
    """See `LVLMTrainer.recover` for the arguments."""

    def __init__(
        self,
        trainer: LVLMTrainer,
        model: LVLMModule,
        datamodule: RecoveryDataModule,
        output: str,
        resume: bool,
        evaluate: bool,
        method: Method,
        optimization: Optimization,
    ) -> None:
        self.trainer, self.model, self.datamodule = trainer, model, datamodule
        self.resume, self.evaluate, self.method = resume, evaluate, method
        self.started = time.perf_counter()
        model.optimization = optimization
        self.folder = self._output_folder(output)
        self.record = Manifest()

    def __call__(self) -> Manifest:
        """Do all of it, or what an interrupted run left."""
        earlier = Manifest.read(self.folder, RECORD_NAME) if self.resume else None
        self._find_base(earlier)
        weights = self._prepare(earlier)
        if earlier is not None and earlier.get("status") == "complete":
            self._say(f"{self.folder} is complete already")
            return earlier
        masks = self._compose()
        self._fit()
        if self.trainer.is_global_zero:
            try:
                self._write(weights, masks)
            except OSError as error:
                reason = f"{error.strerror or error} (nothing is lost; resume with --resume true)"
                raise RunError(f"--output {self.folder}: {reason}") from None
            self._score()
            self._finish()
        return self.record

    # ---- before training ---------------------------------------------------------------------------------------------
    def _output_folder(self, output: str) -> Path:
        label = "demo-atv-70" if self.model.path == "demo" else self.model.label
        return choose_folder(output, f"{label}-recovered", self.resume)

    def _find_base(self, earlier: Manifest | None) -> None:
        """The pruned checkpoint; the embedded model is dense, so it is pruned first."""
        if self.model.path != "demo":
            return
        if earlier is not None:
            self.model.path = earlier["model"]["path"]
        elif self.trainer.is_global_zero:
            self.model.path = str(self._prune_embedded())
        else:
            problem = "is pruned by one process only; prune it first and give the folder as --model.path"
            raise InputError("model.path", "demo", problem)

    def _prune_embedded(self) -> Path:
        from lvlm_prune.callbacks import BlockwisePruning, PruneProgressBar
        from lvlm_prune.data import CalibrationDataModule
        from lvlm_prune.module import LVLMModule

        self._refuse_unusable(CheckpointFolder(_embedded()))
        self._say(f"no pruned model given: the embedded one is pruned by ATV to {DEMO_SPARSITY:.0%} first")
        bar = [PruneProgressBar()] if self.trainer.progress_bar_callback is not None else []
        pruner = type(self.trainer)(
            accelerator=self.trainer.accelerator_name(),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=bool(bar),
            enable_model_summary=False,
            callbacks=[BlockwisePruning(sparsity=DEMO_SPARSITY, name="ATV"), *bar],
        )
        pruner.quiet = self.trainer.quiet
        pruner.prune(LVLMModule("demo"), CalibrationDataModule(), evaluate=self.evaluate)
        assert pruner.output_folder is not None
        return pruner.output_folder

    def _prepare(self, earlier: Manifest | None) -> StreamedWeights:
        """Check everything that can be checked, then load the base.

        Returns:
            Where the base keeps its weights; made before adapters change the names of modules.
        """
        model, data = self.model, self.datamodule
        if self.method == "full" and model.dtype_option == "auto":
            model.dtype_option = "float32"  # in bfloat16 most updates of a weight would be rounded away
        model.open()
        assert model.folder is not None
        if self.trainer.is_global_zero:
            self._refuse_unusable(model.folder)
        if data.source.needs_processor and model.processor is None:
            model.processor = load_processor(model.folder.path, model.trust_remote_code)
        data.connect(model.processor, model.context_length)
        data.setup("fit")
        self.base_record = _record_of(model.folder.path)
        if not self.trainer.max_epochs and self.trainer.max_steps == -1:
            raise InputError("trainer.max_epochs", self.trainer.max_epochs, "nothing would be trained")
        self.record.update(self._provenance())
        if earlier is not None:
            earlier.refuse_other(self.record, self.folder)
        weights = StreamedWeights(model.model, model.runner.decoder, model.folder, "cpu")
        model.load()
        return weights

    def _refuse_unusable(self, base: CheckpointFolder) -> None:
        refuse_unusable(self.folder, base.path, RECORD_NAME, self.resume)

    def _provenance(self) -> dict[str, Any]:
        model = self.model
        assert model.folder is not None
        config = dict(self.trainer.run_config or {})
        if "model" in config:
            config["model"] = dict(config["model"]) | {"path": model.path}
        found = self.trainer._provenance(model, self.datamodule)
        return {
            "config": config or {"method": self.method, "optimization": vars(model.optimization)},
            "model": found["model"],
            "data": found["calibration"] | {"samples": len(self.datamodule.train_indices)},
            "method": self.method,
            "versions": found["versions"] | {"peft": _version("peft")},
            "processes": found["processes"],
            "device": found["device"],
        }

    # ---- training ----------------------------------------------------------------------------------------------------
    def _compose(self) -> FrozenMasks:
        """Callbacks: the user's, `FrozenMasks`, `SparseLoRA` for the method `lora`, checkpoints to go on from."""
        from lvlm_prune.callbacks import FrozenMasks, SparseLoRA

        trainer = self.trainer
        callbacks: list[Callback] = [
            callback
            for callback in trainer.callbacks
            if not _is_lightnings_own(callback) and not (self.method == "full" and isinstance(callback, SparseLoRA))
        ]
        masks = next((callback for callback in callbacks if isinstance(callback, FrozenMasks)), None)
        if masks is None:
            masks = FrozenMasks()
            callbacks.append(masks)
        if self.method == "lora":
            lora = next((callback for callback in callbacks if isinstance(callback, SparseLoRA)), None)
            if lora is None:
                lora = SparseLoRA()
                callbacks.append(lora)
            lora.select(self.model)
            self.lora: SparseLoRA | None = lora
        else:
            self.lora = None
            for linear in self.model.pruned.values():
                linear.weight.requires_grad_(True)
        self.checkpoints = ModelCheckpoint(
            dirpath=self.folder / "checkpoints",
            filename="best",
            monitor="validation_loss" if self.datamodule.validation_indices else None,
            save_last=True,
            enable_version_counter=False,
        )
        trainer.callbacks = _CallbackConnector._reorder_callbacks([*callbacks, self.checkpoints])
        return masks

    def _fit(self) -> None:
        if self.trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.record["status"] = "training"
            self.record.write(self.folder, RECORD_NAME)
            if self.record["config"]:
                replace_durably(
                    self.folder / "config.yaml", yaml.safe_dump(self.record["config"], sort_keys=False).encode()
                )
        last = self.folder / "checkpoints" / "last.ckpt"
        clock = time.perf_counter()
        try:
            self.trainer.fit(
                self.model, datamodule=self.datamodule, ckpt_path=last if self.resume and last.is_file() else None
            )
        except SystemExit:  # how Lightning passes on an interruption
            raise KeyboardInterrupt(f"go on with --resume true --output {self.folder}") from None
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
            "train_loss": metrics.get("train_loss"),
            "validation_loss": score.item() if best and score is not None else metrics.get("validation_loss"),
            "seconds": time.perf_counter() - clock,
        }

    # ---- after training ----------------------------------------------------------------------------------------------
    def _write(self, weights: StreamedWeights, masks: FrozenMasks) -> None:
        base = self.model.folder
        assert base is not None
        self.record["status"] = "writing"
        self.record.write(self.folder, RECORD_NAME)
        copy_checkpoint(base.path, self.folder, leave_out=_RECORDS)
        written = base.at(self.folder)
        write_merged(self.model, base, written, weights, masks.masks)
        pattern = self._pattern()
        found = verify_merged(base, written, weights, masks.masks, pattern)
        zeros = found.pop("zeros")
        self.record["verified"] = found
        self.record["pattern"] = str(pattern) if pattern is not None else "unstructured"
        self.record["linears"] = {
            name: {
                "shape": list(mask.shape),
                "zeros": zeros[name],
                "achieved": zeros[name] / (mask.shape[0] * mask.shape[1]),
            }
            for name, mask in masks.masks.items()
        }
        if self.lora is not None:
            from lvlm_prune.recovery.adapter_folder import mask_digest, save_sparse_adapter

            digests = {name: mask_digest(self.model.pruned[name].weight) for name in self.model.adapted}
            save_sparse_adapter(self.model.model, self.folder / "adapter", digests, self.lora.gradient)
        release(self.folder)

    def _pattern(self) -> Pattern | None:
        """The pattern that the base was pruned to, where its record says so."""
        text = self.base_record.get("pattern")
        try:
            return parse_pattern(text) if text else None
        except ValueError:
            return None

    def _score(self) -> None:
        """The embedded model dense, pruned and recovered, on the embedded benchmark; other models are not scored."""
        origin = self.base_record.get("origin") or self.base_record.get("model", {}).get("path")
        self.record["origin"] = origin
        if not (self.evaluate and origin == "demo"):
            return
        from lvlm_prune.callbacks.evaluation import score_checkpoint
        from lvlm_prune.evaluation.scores import Scores, retention

        assert self.model.folder is not None
        earlier = self.base_record.get("evaluation", {})
        folders = {"dense": _embedded(), "pruned": self.model.folder.path, "recovered": self.folder}
        known = {"dense": earlier.get("dense"), "pruned": earlier.get("recovered", earlier.get("pruned"))}
        scores = {
            name: Scores.from_dict(saved) if (saved := known.get(name)) else score_checkpoint(str(folder))
            for name, folder in folders.items()
        }
        self.record["evaluation"] = {name: found.to_dict() for name, found in scores.items()}
        self.record["evaluation"]["retention"] = {
            name: retention(scores[name], scores["dense"]).to_dict() for name in ("pruned", "recovered")
        }

    def _finish(self) -> None:
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.record["seconds"] = time.perf_counter() - self.started
        self.record["status"] = "complete"
        self.record.write(self.folder, RECORD_NAME)
        self._say(summary(self.record, self.folder))

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero and not self.trainer.quiet:
            print(text, flush=True)


def summary(record: Manifest, folder: Path) -> str:
    """What a recovery did, in about a hundred words."""
    training, verified = record["training"], record["verified"]
    how = "LoRA" if record["method"] == "lora" else "full fine-tuning"
    losses = [
        f"{name.replace('_', ' ')} {training[name]:.3f}" for name in ("train_loss", "validation_loss") if training[name]
    ]
    lines = [
        f"recovered by {how}: {training['trainable_parameters'] / 1e6:.2f} M trainable parameters · "
        f"{training['steps']} steps in {training['seconds']:.0f} s · {' · '.join(losses)}",
        f"verified: sparsity {verified['sparsity']:.4g} ({record['pattern']}), every pruned weight +0.0 in "
        f"{len(record['linears'])} Linears, {verified['untouched_tensors']} other tensors untouched",
    ]
    if "evaluation" in record:
        lines.append(_scores_table(record["evaluation"]))
    written = "merged checkpoint" + (" · adapter/" if (folder / "adapter").is_dir() else "")
    return "\n".join([*lines, f"wrote {folder} ({written} · {RECORD_NAME}) · {record['seconds']:.0f} s"])


def _scores_table(evaluation: dict[str, Any]) -> str:
    kept = evaluation["retention"]
    lines = [f"{'':16}{'dense':>8}{'pruned':>9}{'recovered':>11}{'retained':>20}"]
    rows = {group: ("groups", group) for group in evaluation["dense"]["groups"]} | {"average": ("average", "")}
    for label, (kind, group) in rows.items():
        values = [
            scores[kind][group] if group else scores[kind]
            for scores in (
                evaluation["dense"],
                evaluation["pruned"],
                evaluation["recovered"],
                kept["pruned"],
                kept["recovered"],
            )
        ]
        dense, pruned, recovered, before, after = (100 * value for value in values)
        lines.append(f"{label:16}{dense:8.1f}{pruned:9.1f}{recovered:11.1f}{before:11.1f}% → {after:.1f}%")
    return "\n".join(lines)


def _record_of(base: Path) -> dict[str, Any]:
    """What the run that made the base wrote about it; empty where it was made by other tools."""
    for name in (RECORD_NAME, FILE_NAME):
        if (base / name).is_file():
            try:
                return dict(json.loads((base / name).read_text()))
            except ValueError:
                continue
    return {}


def _is_lightnings_own(callback: Callback) -> bool:
    """Lightning's default checkpoint callback, which nobody asked for."""
    return type(callback) is ModelCheckpoint and callback.dirpath is None and callback.monitor is None


def _embedded() -> Path:
    from lvlm_prune.demo import CHECKPOINT

    return Path(CHECKPOINT)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
