"""One tool prunes one model in one environment, and is measured; started by `peers.py`, in the peer's environment.

    python benchmarks/peer_worker.py --tool llmcompressor --method wanda --folder FOLDER --sparsity 0.5 --threads 1

`FOLDER` holds `dense/` (a Llama checkpoint) and `samples.safetensors` (`input_ids` of shape (n, T)). The pruned weights
go to `FOLDER/<tool>-<method>.safetensors`; the measurements are the last line that is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Work = Callable[[nn.Module, list[dict[str, Tensor]], float], Any]


def ours(method: str) -> Work:
    """lvlm-prune, all tokens calibrate."""
    from lvlm_prune import prune
    from lvlm_prune.callbacks import BlockwisePruning
    from lvlm_prune.methods.pools import MixedPool
    from lvlm_prune.methods.scorers import SparseGPTScorer, WandaScorer

    scorer = {"wanda": WandaScorer, "sparsegpt": SparseGPTScorer}[method]()
    return lambda model, samples, sparsity: prune(
        model, samples, BlockwisePruning(sparsity=sparsity, pool=MixedPool(), scorer=scorer)
    )


def llmcompressor(method: str) -> Work:
    """llm-compressor's modifiers on the Linears of the decoder blocks."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    # It asks for a tokenizer, though the samples are token ids already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, unk_token="word")))
    return lambda model, samples, sparsity: oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(samples, batch_size=None),
        recipe=modifier(sparsity=sparsity, targets=[r"re:.*layers.*_proj$"]),
        num_calibration_samples=len(samples),
        pipeline="sequential",
    )


def torchao(method: str) -> Work:
    """torchao's WandaSparsifier: masks from one pass through the dense model, compared over a whole matrix."""
    from torchao.sparsity import WandaSparsifier

    if method != "wanda":
        raise NotImplementedError("torchao has no SparseGPT")

    def work(model: nn.Module, samples: list[dict[str, Tensor]], sparsity: float) -> None:
        sparsifier = WandaSparsifier(sparsity_level=sparsity)
        linears = [name for name, module in model.named_modules() if name.endswith("_proj")]
        sparsifier.prepare(model, config=[{"tensor_fqn": f"{name}.weight"} for name in linears])
        with torch.no_grad():
            for sample in samples:
                model.get_decoder()(**sample, use_cache=False)  # type: ignore[operator]
        sparsifier.step()
        sparsifier.squash_mask()

    return work


TOOLS = {"lvlm-prune": ours, "llmcompressor": llmcompressor, "torchao": torchao}


def clocks() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since `clocks()` was called."""
    return {name: now - then for name, now, then in zip(("wall", "cpu"), clocks(), start)}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def two_forwards(model: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, float]:
    """The floor: every sample twice through the decoder."""
    start = clocks()
    for _ in range(2):
        for sample in samples:
            model.get_decoder()(**sample, use_cache=False)  # type: ignore[operator]
    return since(start)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = TOOLS[options.tool](options.method)
    model = AutoModelForCausalLM.from_pretrained(options.folder / "dense", dtype=torch.float32).eval()
    ids = load_file(options.folder / "samples.safetensors")["input_ids"]
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    two_forwards(model, samples[:2])  # warms up
    floor, before = two_forwards(model, samples), peak_bytes()
    start = clocks()
    work(model, samples, options.sparsity)
    seconds, after = since(start), peak_bytes()
    pruned = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_file(pruned, options.folder / f"{options.tool}-{options.method}.safetensors")
    found = {
        "versions": {name: version(name) for name in (options.tool, "torch", "transformers")},
        "floor": floor,
        "seconds": seconds,
        "peak_bytes": after,
        "peak_added_bytes": after - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
