"""The embedded model as a LightningModule, and its data as a LightningDataModule.

Four losses are added:

- cross-entropy of the answers' tokens: what the model is for;
- *patches*: an image token must lie close to the word embeddings of the shape, the color or the digit that its patch
  shows. For the first ``tower_steps`` steps it and *scale* are alone, because a decoder learns
  nothing from a tower that sees nothing; and it finds a thing by its name where names and image tokens agree;
- *scale*: an image token must not be longer than word embeddings are. Nothing else holds its norm down, because
  whatever reads it normalises it first; and a long token is hardly turned by the blocks, unlike those of large models;
- *grounding*: at the last token of a phrase that names things in the image, a linear layer must read off the decoder's
  hidden state, half way up, in which cells they lie.

The two linear layers are dropped afterwards.
"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, rms_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lvlm_prune.demo.making.attention  # noqa: F401  (registers the attention "matmul")
from lvlm_prune.demo.making.optimizer import MasterAdam
from lvlm_prune.demo.making.packing import TASKS, PackedBatches, attention_mask
from lvlm_prune.demo.processing import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    VOCABULARY_SIZE,
    build_processor,
    build_tokenizer,
)
from lvlm_prune.demo.world import COLORS, IMAGE_SIZE, PATCH_SIZE, PATCHES, SHAPES

#: What an image token is taught to say, with the number of classes (0 is none) and the weight of patches without any,
#: of which there are many: shape, color and digit, read off the word embeddings, and the digit's place (tens or ones).
_PATCH_CLASSES = (1 + len(SHAPES), 1 + len(COLORS), 11, 3)
_NOTHING_WEIGHT = (0.25, 0.25, 0.05, 0.05)


def model_config(hidden_size: int, intermediate_size: int, blocks: int, tower_blocks: int, heads: int) -> LlavaConfig:
    """Configuration of the embedded model; tower and decoder have the same widths."""
    tower = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=tower_blocks,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=hidden_size,
        hidden_act="gelu_pytorch_tanh",
    )
    decoder = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES**2,
        tie_word_embeddings=True,
    )


class EmbeddedModelTraining(LightningModule):
    """Trains the embedded model from scratch.

    Args:
        hidden_size: Width of tower and decoder.
        intermediate_size: Width of their MLPs.
        blocks: Decoder blocks.
        tower_blocks: Blocks of the vision tower.
        heads: Attention heads of tower and decoder.
        learning_rate: Peak learning rate; linear warm-up, then a cosine down to 1%.
        warmup_steps: Length of the warm-up.
        tower_steps: Number of steps at the start in which only the tower is trained.
        patch_weight: Weight of the patch loss beside the answers' loss.
        grounding_weight: Weight of the grounding loss.
        scale_weight: Weight of the scale loss.
        weight_decay: Decoupled weight decay of the matrices.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        blocks: int = 6,
        tower_blocks: int = 4,
        heads: int = 4,
        learning_rate: float = 2e-3,
        warmup_steps: int = 60,
        tower_steps: int = 300,
        patch_weight: float = 0.1,
        grounding_weight: float = 0.5,
        scale_weight: float = 0.1,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.warmup_steps, self.tower_steps = learning_rate, warmup_steps, tower_steps
        self.patch_weight, self.grounding_weight, self.scale_weight = patch_weight, grounding_weight, scale_weight
        self.weight_decay = weight_decay
        self.model = LlavaForConditionalGeneration(
            model_config(hidden_size, intermediate_size, blocks, tower_blocks, heads)
        )
        self.digit_place_head = nn.Linear(hidden_size, _PATCH_CLASSES[3])
        tokenizer = build_tokenizer()
        words = [" empty", *(f" {shape}" for shape in SHAPES), " empty", *(f" {color}" for color in COLORS)]
        words += [" empty", *"0123456789"]
        self.patch_words = [tokenizer(word).input_ids[0] for word in words]
        self.grounding_head = nn.Linear(hidden_size, 9)
        self.grounding_block = blocks // 2
        self._initialize(blocks)
        self.model.set_attn_implementation("matmul")
        self._correct: dict[str, list[Tensor]] = {}

    def _initialize(self, blocks: int) -> None:
        """Scaled initialisation; transformers' own standard deviation of 0.02 is made for larger widths."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim < 2:
                continue
            if "vision_tower" in name:
                std = 0.05
            elif "embed_tokens" in name:
                std = 0.04
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * blocks)
            nn.init.normal_(parameter, std=std)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """What the decoder sees of images: (images, 144, hidden), from uint8 pixels (images, 144, 144, 3)."""
        scaled = pixels.permute(0, 3, 1, 2).to(self.model.dtype) / 127.5 - 1
        core = self.model.model
        return core.multi_modal_projector(core.vision_tower(scaled).last_hidden_state[:, 1:])

    def hidden_states(self, batch: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of the decoder, before the first block, after each but the last, and after the final norm."""
        core = self.model.model
        embedded = core.language_model.embed_tokens(batch["input_ids"])
        is_image = (batch["input_ids"] == IMAGE_ID)[..., None]
        embedded = embedded.masked_scatter(is_image, tokens)
        return core.language_model(
            inputs_embeds=embedded,
            attention_mask=attention_mask(batch["segments"]),
            position_ids=batch["position_ids"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    def patch_loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of shape, color and digit per patch, patches with nothing weighing less.

        ``tokens`` (images, 144, hidden) are the image tokens as the decoder gets them, ``labels`` (images, 3, 12, 12).
        """
        tokens = rms_norm(tokens, tokens.shape[-1:])  # as the decoder's first block sees them
        words = self.model.get_input_embeddings().weight[self.patch_words]
        logits = torch.cat([linear(tokens, words), self.digit_place_head(tokens)], dim=-1).float()
        shape, color, digit = labels.flatten(2).unbind(1)
        targets = (shape, color, ((digit - 1) % 10 + 1) * (digit > 0), (digit > 0).long() + (digit > 10).long())
        loss = tokens.new_zeros((), dtype=torch.float32)
        for part, target, nothing in zip(logits.split(_PATCH_CLASSES, dim=-1), targets, _NOTHING_WEIGHT):
            weight = torch.ones(part.shape[-1], dtype=torch.float32, device=tokens.device)
            weight[0] = nothing
            loss = loss + cross_entropy(part.flatten(0, 1), target.flatten(), weight=weight)
        return loss

    def scale_loss(self, tokens: Tensor) -> Tensor:
        """Mean squared excess, in nats, of the image tokens' root mean square over that of the word embeddings."""
        words = self.model.get_input_embeddings().weight.detach().float()
        excess = (tokens.float().square().mean(-1) + 1e-12).log() / 2 - words.square().mean().log() / 2
        return excess.relu().square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = self.image_tokens(batch["pixels"])
        patch_loss = self.patch_loss(tokens, batch["patch_labels"])
        scale_loss = self.scale_loss(tokens)
        self.log_dict({"patch_loss": patch_loss, "scale_loss": scale_loss})
        if self.global_step < self.tower_steps:
            return patch_loss + self.scale_weight * scale_loss
        hidden = self.hidden_states(batch, tokens)
        answered = batch["labels"] >= 0
        logits = self.model.lm_head(hidden[-1][answered]).float()
        weights = batch["weights"][answered]
        answer_loss = (
            cross_entropy(logits, batch["labels"][answered], reduction="none") * weights
        ).sum() / weights.sum()
        named = hidden[self.grounding_block][batch["grounding_rows"], batch["grounding_tokens"]]
        grounding_loss = binary_cross_entropy_with_logits(self.grounding_head(named).float(), batch["grounding_cells"])
        self.log_dict({"answer_loss": answer_loss, "grounding_loss": grounding_loss}, prog_bar=True)
        image_loss = self.patch_weight * patch_loss + self.scale_weight * scale_loss
        return answer_loss + image_loss + self.grounding_weight * grounding_loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect, per question, whether each token of its answer is the most likely one after the true ones before."""
        hidden = self.hidden_states(batch, self.image_tokens(batch["pixels"]))
        rows, tokens = torch.where(batch["labels"] >= 0)
        wrong = self.model.lm_head(hidden[-1][rows, tokens]).argmax(-1) != batch["labels"][rows, tokens]
        question = rows * 1000 + batch["segments"][rows, tokens]
        task = batch["tasks"][rows, tokens]
        for number, name in enumerate(TASKS):
            numbers, inverse = question[task == number].unique(return_inverse=True)
            errors = torch.zeros(len(numbers), dtype=torch.float32).index_add_(
                0, inverse, wrong[task == number].float()
            )
            self._correct.setdefault(name, []).append(errors == 0)

    def on_validation_epoch_end(self) -> None:
        for name, parts in self._correct.items():
            correct = torch.cat(parts).float()
            if len(correct):
                self.log(f"accuracy/{name}", correct.mean())
        self._correct.clear()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = int(self.trainer.estimated_stepping_batches)

        def schedule(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup_steps) * (
                0.99 * 0.5 * (1 + math.cos(math.pi * step / total)) + 0.01
            )

        optimizer = MasterAdam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }


class WorldDataModule(LightningDataModule):
    """The generated world as packed batches (`packing`), drawn while training goes on.

    Args:
        seed: Seed of scenes and questions.
        image_rows: Rows with an image per batch.
        text_rows: Rows of text-only questions per batch.
        row_length: Tokens per row.
        emphasis: Weight of a task in the choice of questions; 1 where not given.
        validation_batches: Batches of the validation split.
        workers: Processes that draw.
    """

    def __init__(
        self,
        seed: int = 0,
        image_rows: int = 20,
        text_rows: int = 5,
        row_length: int = 320,
        emphasis: dict[str, float] = {},  # noqa: B006  (jsonargparse shows it as {}; never changed)
        validation_batches: int = 12,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.seed, self.validation_batches, self.workers = seed, validation_batches, workers
        self.packing: dict[str, Any] = {
            "image_rows": image_rows,
            "text_rows": text_rows,
            "row_length": row_length,
            "emphasis": emphasis,
        }
        self.processor = build_processor(build_tokenizer())

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        data = PackedBatches(
            self.processor.tokenizer, "train", self.seed, batches=self.trainer.max_steps, **self.packing
        )
        return DataLoader(data, batch_size=None, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        data = PackedBatches(
            self.processor.tokenizer, "validation", self.seed, batches=self.validation_batches, **self.packing
        )
        return DataLoader(data, batch_size=None)
