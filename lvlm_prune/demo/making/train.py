"""Train the embedded model from scratch: tokenizer, vision tower, decoder, in one run.

    python -m lvlm_prune.demo.making.train --config configs/demo/train.yaml --output runs/demo/checkpoint

The output is a checkpoint folder in the Hugging Face layout with weights in bfloat16, tokenizer and processor.
"""

import json
import platform
import resource
import time
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from lvlm_prune.demo.making.training import EmbeddedModelTraining, WorldDataModule
from lvlm_prune.demo.processing import BOS_ID, EOS_ID, PAD_ID


class TrainingCLI(LightningCLI):
    """Options of the two modules and of the Trainer, and two of our own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="runs/demo/checkpoint", help="Folder to be written.")
        parser.add_argument("--threads", type=int, default=2, help="Threads of the matrix products.")

    def before_instantiate_classes(self) -> None:
        torch.set_num_threads(self.config.threads)


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the checkpoint folder: bfloat16 weights, configuration, tokenizer, processor."""
    model = model.to(torch.bfloat16).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(args: list[str] | None = None) -> None:
    """Train from random weights and write the checkpoint folder; `args` as on the command line."""
    start = time.perf_counter()
    cli = TrainingCLI(
        EmbeddedModelTraining, WorldDataModule, run=False, args=args, save_config_kwargs={"overwrite": True}
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    output = Path(cli.config.output)
    export(cli.model.model, cli.datamodule.processor, output)
    summary = {
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "steps": cli.trainer.global_step,
        "threads": cli.config.threads,
        "cpu": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
