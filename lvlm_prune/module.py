"""The model that is pruned or recovered, as a LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lvlm_prune.blocks import (
    BlockRunner,
    ExpertMatrix,
    Part,
    ResidentWeights,
    StreamedWeights,
    Target,
    TowerRunner,
    Weights,
    find_expert_stacks,
    find_towers,
    prunable_linears,
)
from lvlm_prune.checkpoints import CheckpointFolder, build_skeleton, resolve
from lvlm_prune.checkpoints.whole import load_whole_model
from lvlm_prune.data.batches import Inputs
from lvlm_prune.data.bucketing import Batch
from lvlm_prune.data.labels import IGNORED
from lvlm_prune.data.processing import load_processor
from lvlm_prune.data.recovery import SAMPLE_NUMBER
from lvlm_prune.errors import InputError, RunError


class Objective(Protocol):
    """What training makes small beside the answers' cross-entropy, and how; who trains hands it to the model."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks run once more in backward."""

    def divergence(self, logits: Tensor, samples: list[int]) -> Tensor | None:
        """A second loss, summed over answer tokens; None where there is none.

        Args:
            logits: float32 of shape (answer tokens, vocabulary), sample by sample.
            samples: Number of each sample.
        """

    def mixed(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """What is made small, of the mean cross-entropy and the mean divergence."""

    def optimizers(self, parameters: Iterable[nn.Parameter], steps: int) -> dict[str, Any]:
        """What `configure_optimizers` returns, for a number of steps."""


class LVLMModule(L.LightningModule):
    """A large vision-language model in a Hugging Face checkpoint folder, one decoder block in memory at a time.

    Args:
        path: Local checkpoint folder, hub id, `demo` for the embedded model, or `demo-outliers` for the same function
            with the outlier channels of real weights. Weights in safetensors only.
        dtype: Precision in which blocks run; `auto` takes the checkpoint's own. Weights are written as they are stored.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run modelling code that comes with the checkpoint.
        attn_implementation: Attention implementation of transformers, for example `sdpa` or `eager`; default: its own
            choice.
        targets: What is pruned: the `language` decoder, the `vision` tower, or both. The tower goes first, so that the
            decoder is calibrated on what the pruned tower gives it.

    Raises:
        InputError: `targets` is empty, or names something else.
    """

    def __init__(
        self,
        path: str = "demo",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str = "main",
        trust_remote_code: bool = False,
        attn_implementation: str = "",
        targets: list[Target] = ["language"],  # noqa: B006
    ) -> None:
        super().__init__()
        if not targets or not set(targets) <= {"language", "vision"}:
            raise InputError("model.targets", targets, "must be a list of `language`, `vision` or both")
        self.targets: list[Target] = sorted(set(targets))
        self.path, self.dtype_option, self.revision = path, dtype, revision
        self.trust_remote_code, self.attn_implementation = trust_remote_code, attn_implementation
        self.folder: CheckpointFolder | None = None
        self.model: Any = None
        self.processor: Any = None
        self.runner: BlockRunner
        self.towers: list[TowerRunner] = []
        self.objective: Objective | None = None
        self.pruned: dict[str, nn.Linear] = {}
        self.adapted: dict[str, nn.Module] = {}
        # Answer tokens of each batch since the last step of the optimizer.
        self._accumulated: list[Tensor] = []
        # A training checkpoint holds what is trained; the base is read from its own folder.
        self.strict_loading = False

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        processor: Any = None,
        targets: list[Target] = ["language"],  # noqa: B006
    ) -> LVLMModule:
        """Wrap a transformers model that is already in memory; pruning then changes it in place.

        Args:
            model: A transformers image-text-to-text model.
            processor: Its processor; not needed where the calibration source gives ready-made inputs.
            targets: What is pruned.

        Raises:
            InputError: There is no vision tower to prune.
        """
        module = cls(path=str(getattr(model, "name_or_path", "") or type(model).__name__), targets=targets)
        if getattr(model, "quantization_method", None) is not None:
            problem = f"is packed or quantized ({model.quantization_method}); call `dequantize()` first"
            raise InputError("model", type(model).__name__, problem)
        module.model = model.eval().requires_grad_(False)
        module.processor = processor
        module._find_blocks()
        return module

    def options(self) -> dict[str, Any]:
        """What the module was made with, under the names of its options, as plain data."""
        return {
            "path": self.path,
            "dtype": self.dtype_option,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attn_implementation,
            "targets": list(self.targets),
        }

    def require_processor(self) -> None:
        """Load the checkpoint's processor, unless there is one already.

        Raises:
            InputError: It cannot be loaded.
        """
        if self.processor is None:
            assert self.folder is not None
            self.processor = load_processor(self.folder.path, self.trust_remote_code)

    @property
    def label(self) -> str:
        """Short name of the model for what is printed and for the default output folder."""
        return Path(self.path).name or "model"

    def open(self, read: Callable[[Path], CheckpointFolder] = CheckpointFolder) -> None:
        """Find the checkpoint and build the model on the meta device; no weights are read.

        Args:
            read: Opens the folder; for verbs that take folders of other formats as well.

        Raises:
            InputError: The folder, its files or its architecture cannot be used.
        """
        if self.model is not None:
            return
        self.folder = read(resolve(self.path, None if self.revision == "main" else self.revision))
        dtype = "auto" if self.dtype_option == "auto" else getattr(torch, self.dtype_option)
        self.model = build_skeleton(
            self.folder,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation or None,
        )
        self._find_blocks()
        self._refuse_incomplete()

    def _find_blocks(self) -> None:
        self.runner = BlockRunner(self.model)
        if "vision" in self.targets:
            self.towers = self._all_towers()
            if not self.towers:
                raise InputError("model.targets", "vision", f"{type(self.model).__name__} has no vision tower")

    def _all_towers(self) -> list[TowerRunner]:
        decoder = self.runner.decoder
        return [TowerRunner(self.model, decoder, tower) for tower in find_towers(self.model, decoder)]

    @property
    def parts(self) -> list[Part]:
        """What is pruned, in order: the lists of blocks of the vision tower, the blocks of the decoder."""
        found: list[Part] = []
        first = 0
        for tower in self.towers:
            found.append(Part("vision", tower, first))
            first += len(tower)
        return [*found, Part("language", self.runner, first)] if "language" in self.targets else found

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are pruned."""
        return sum(len(part.runner) for part in self.parts)

    @property
    def block_weights(self) -> int:
        """Number of weights of the largest block, pruned or not."""
        return max(sum(weight.numel() for weight in block.parameters()) for block in self.runner.decoder.layers)

    def refuse_vision(self, verb: str) -> None:
        """Raise where the vision tower is a target of a verb that knows only the decoder.

        Raises:
            InputError: It is.
        """
        if "vision" in self.targets:
            raise InputError("model.targets", "vision", f"`{verb}` works on the language decoder")

    def load_whole(self) -> None:
        """Bring the whole model into memory, pruned or not.

        Raises:
            InputError: The checkpoint cannot be used.
        """
        self.open()
        if self.folder is not None:
            self.model = load_whole_model(self.model, self.folder, self.trust_remote_code, self.attn_implementation)
            self._find_blocks()
            self._refuse_incomplete()

    def _refuse_incomplete(self) -> None:
        """Raise for tensors that the checkpoint lacks; transformers would draw them at random and go on."""
        self.weights(torch.device("cpu"))

    def unload(self) -> None:
        """Let the whole model go, and the memory that it took."""
        self.model = None
        del self.runner
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def linears(self) -> dict[str, nn.Linear]:
        """Full name of every Linear of the decoder blocks that could be pruned, in the order of the blocks."""
        return _linears_of(self.runner)

    def tower_linears(self) -> dict[str, nn.Linear]:
        """Full name of every Linear of the vision tower that could be pruned; none where it is no target."""
        return {name: linear for tower in self.towers for name, linear in _linears_of(tower).items()}

    def linears_beside_targets(self) -> dict[Target, dict[str, nn.Linear]]:
        """Part of the model that is no target -> full name of every Linear of its blocks that could be pruned."""
        towers = self._all_towers()
        of_towers = {name: linear for tower in towers for name, linear in _linears_of(tower).items()}
        found: dict[Target, dict[str, nn.Linear]] = {"vision": of_towers, "language": self.linears()}
        return {part: linears for part, linears in found.items() if part not in self.targets}

    def expert_matrices(self) -> dict[str, ExpertMatrix]:
        """Full name of every matrix of a routed expert, in the order of the blocks."""
        return {
            f"{self.runner.name(index)}.{matrix.name}": matrix
            for index in range(len(self.runner))
            for stack in find_expert_stacks(self.runner.block(index))
            for matrix in stack.matrices()
        }

    def weights(self, device: torch.device) -> Weights:
        """How blocks come into memory: streamed from the checkpoint, or already there."""
        if self.folder is None:
            return ResidentWeights()
        return StreamedWeights(self.model, self.runner.decoder, self.folder, device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of weights and activations while blocks run; what is written keeps its own."""
        return next(self.runner.block(0).parameters()).dtype

    # ---- training ----------------------------------------------------------------------------------------------------
    def on_fit_start(self) -> None:
        """Let blocks run again in backward, if asked; also models that could not do so themselves."""
        if self.objective is not None and self.objective.gradient_checkpointing:
            for index in range(len(self.runner)):
                block: Any = self.runner.block(index)
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def on_fit_end(self) -> None:
        """Blocks as they were."""
        if self.objective is not None and self.objective.gradient_checkpointing:
            for index in range(len(self.runner)):
                self.runner.block(index).__dict__.pop("forward", None)

    def answer_logits(self, group: Inputs, cache: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """What the model says where answer tokens follow, in a group that can be stacked, behind what a cache holds.

        Returns:
            Logits, float32 of shape (answer tokens, vocabulary), sample by sample; the tokens, int64.
        """
        inputs = {name: self._cast(value) for name, value in group.items() if name not in ("labels", SAMPLE_NUMBER)}
        predicted = group["labels"][:, 1:]
        # Nobody asks for logits before the first answer token: behind an image they are the most.
        first = int((predicted != IGNORED).any(dim=0).nonzero()[0])
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = predicted.shape[1] - first + 1
        logits = self.model(**inputs, **(cache or {}), use_cache=bool(cache)).logits
        answers = predicted[:, first:] != IGNORED
        return logits[:, -(predicted.shape[1] - first + 1) : -1][answers].float(), predicted[:, first:][answers]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch's answer tokens, mixed with the divergence from the dense model if asked.

        With several processes, whose gradients are averaged, the mean is over the answer tokens of all of them; over
        those of all batches where gradients of several are accumulated. What is returned is weighted for that.

        Raises:
            RunError: The loss is not finite: on one process, and all of them stop.
        """
        total, divergence, count = self.answer_losses(batch)
        own = torch.stack([torch.tensor(float(count), device=self.device), total.detach().float()])
        tokens, everywhere = self.trainer.strategy.reduce(own, reduce_op="mean")
        loss = total / tokens
        if not torch.isfinite(everywhere):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            step = f"at step {self.trainer.global_step + 1}, where the learning rate is {rate:.3g}"
            raise RunError(f"the loss is NaN or infinite {step}; lower --optimization.learning_rate")
        if divergence is not None and self.objective is not None:
            self.log("train_cross_entropy", loss, batch_size=count)
            self.log("train_divergence", divergence / tokens, batch_size=count)
            loss = self.objective.mixed(loss, divergence / tokens)
        self.log("train_loss", loss, prog_bar=True, batch_size=count)
        self._accumulated.append(tokens)
        return loss * (tokens / self._accumulated[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let accumulated gradients be those of the mean over all their answer tokens, not of a mean of means."""
        tokens, self._accumulated = self._accumulated, []
        if self.trainer.accumulate_grad_batches > 1:
            scale = self.trainer.accumulate_grad_batches * tokens[0] / torch.stack(tokens).sum()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad *= scale

    def answer_losses(self, batch: Batch) -> tuple[Tensor, Tensor | None, int]:
        """Cross-entropy and divergence (where the objective has one), summed over answer tokens; their number."""
        total, divergence, count = torch.zeros((), device=self.device), None, 0
        for group in batch:
            logits, target = self.answer_logits(group)
            total = total + cross_entropy(logits, target, reduction="sum")
            count += len(target)
            numbers = group[SAMPLE_NUMBER].tolist()
            if self.objective is not None and (more := self.objective.divergence(logits, numbers)) is not None:
                divergence = more if divergence is None else divergence + more
        return total, divergence, count

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `validation_loss`, the mean cross-entropy of all answer tokens of the validation samples."""
        total, divergence, count = self.answer_losses(batch)
        self.log("validation_loss", total / count, prog_bar=True, batch_size=count, sync_dist=True)
        if divergence is not None:
            self.log("validation_divergence", divergence / count, batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """What the objective says, over what is trainable."""
        assert self.objective is not None
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.objective.optimizers(trainable, int(self.trainer.estimated_stepping_batches))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and say which base it belongs to."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in sorted(trained)}
        checkpoint["base"] = self.folder.fingerprint() if self.folder is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what was trained on another base.

        Raises:
            InputError: Another base, or other trained weights.
        """
        if checkpoint.get("base") != (self.folder.fingerprint() if self.folder is not None else None):
            raise InputError("model.path", self.path, "the training checkpoint belongs to another base")
        shapes = {name: parameter.shape for name, parameter in self.named_parameters() if parameter.requires_grad}
        if shapes != {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}:
            raise InputError(
                "resume", "true", "the training checkpoint has other trainable weights; repeat its options"
            )

    def _cast(self, value: Any) -> Any:
        return value.to(self.compute_dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _linears_of(runner: BlockRunner) -> dict[str, nn.Linear]:
    return {
        f"{runner.name(index)}.{name}": linear
        for index in range(len(runner))
        for name, linear in prunable_linears(runner.block(index)).items()
    }
