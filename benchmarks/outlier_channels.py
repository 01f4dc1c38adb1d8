"""Weights and activations of a decoder, and the embedded model rescaled towards those of real ones.

    python -m benchmarks.outlier_channels statistics demo GEMMA_FOLDER RESCALED --json OUT
    python -m benchmarks.outlier_channels rescale RESCALED --strength 0.75 --share 0.02 --factor 8

Real decoders have a few input channels that are many times as loud as the median, and heavy-tailed weights. The
embedded model has neither, which is why magnitude beats Wanda on it. A rescaling moves loudness between two neighbours
that are linear in it, so that the model stays the same function:

    gain of a norm   x s     columns of the Linears that it feeds   / s
    rows of up       x s     columns of down                        / s
    rows of v        x s     columns of o                           / s

Every s is a power of two, by which floating-point numbers of any width are multiplied without rounding: the rescaled
model gives the answers of the dense one bit by bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarks.pretrained import CARD
from benchmarks.real_weights import Text
from lvlm_prune.data import CalibrationDataModule, EmbeddedSource
from lvlm_prune.demo import CHECKPOINT

SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""One Linear of each input site of a Llama-like block."""


def channel_statistics(layers: Iterable[nn.Module], model: nn.Module, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What makes Wanda differ from magnitude, median over the blocks, for each input site.

    Args:
        layers: The decoder's blocks.
        model: What is run.
        samples: Model inputs.

    Returns:
        Site -> `loudest_channel` (largest over median norm of an input channel), `weight_kurtosis`, `largest_column`
        (largest over median column norm), `correlation` of the logarithms of both norms.
    """
    layers = list(layers)
    squares: dict[tuple[int, str], Tensor] = {}
    hooks = [
        layer.get_submodule(site).register_forward_pre_hook(_adder(squares, (number, site)))
        for number, layer in enumerate(layers)
        for site in SITES
    ]
    with torch.inference_mode():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    found: dict[str, Any] = {}
    for site in SITES:
        rows = [_of_site(layer.get_submodule(site).weight, squares[n, site]) for n, layer in enumerate(layers)]
        found[site] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return found


def _adder(squares: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total = inputs[0].detach().flatten(0, -2).double().square().sum(0)
        squares[key] = squares[key] + total if key in squares else total

    return add


def _of_site(weight: Tensor, squares: Tensor) -> dict[str, float]:
    loudness, columns = squares.sqrt(), weight.detach().double().norm(dim=0)
    both = torch.stack([loudness.clamp(min=1e-9).log(), columns.clamp(min=1e-9).log()])
    return {
        "loudest_channel": float(loudness.max() / loudness.median()),
        "weight_kurtosis": kurtosis(weight),
        "largest_column": float(columns.max() / columns.median()),
        "correlation": float(torch.corrcoef(both)[0, 1]),
    }


def kurtosis(values: Tensor) -> float:
    """Fourth moment over the squared variance: 3 for normally distributed values.

    Example:
        >>> kurtosis(torch.tensor([-1.0, 1.0]))
        1.0
    """
    centred = values.detach().double() - values.detach().double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def powers_of_two(count: int, strength: float, share: float, factor: float, generator: torch.Generator) -> Tensor:
    """Scales of channels: log-normal, a few of them louder still, rounded to powers of two.

    Args:
        count: Number of channels.
        strength: Standard deviation of the natural logarithm.
        share: Share of the channels that are outliers.
        factor: By how much those are louder.
        generator: Source of the draw.

    Example:
        >>> scales = powers_of_two(1000, 0.5, 0.02, 8.0, torch.Generator().manual_seed(0))
        >>> bool((scales.log2() == scales.log2().round()).all()), float(scales.median())
        (True, 1.0)
    """
    scales = torch.exp(strength * torch.randn(count, generator=generator))
    scales[torch.rand(count, generator=generator) < share] *= factor
    return torch.exp2(scales.log2().round())


def rescale(layers: Iterable[nn.Module], strength: float, share: float, factor: float, seed: int = 0) -> None:
    """Move loudness between neighbours, in place; the model computes what it did before.

    Args:
        layers: Blocks of a Llama-like decoder with as many key and value heads as heads.
        strength: See `powers_of_two`.
        share: See `powers_of_two`.
        factor: See `powers_of_two`.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def scales(like: Tensor) -> Tensor:
        return powers_of_two(len(like), strength, share, factor, generator).to(like.dtype)

    with torch.no_grad():
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, fed in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                by = scales(norm.weight)
                norm.weight *= by
                for linear in fed:
                    linear.weight /= by
            for before, after in ((mlp.up_proj, mlp.down_proj), (attention.v_proj, attention.o_proj)):
                by = scales(before.weight)
                before.weight *= by[:, None]
                after.weight /= by


def loaded(name: str) -> tuple[nn.Module, Iterable[nn.Module], list[dict[str, Any]]]:
    """A model, its decoder's blocks, and samples: captions of the embedded model, or prose for a package's."""
    folder = CHECKPOINT if name == "demo" else Path(name)
    if (folder / CARD).is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, model.model.layers, Text(AutoTokenizer.from_pretrained(folder), 256).samples(8, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    data = CalibrationDataModule(EmbeddedSource(), num_samples=16)
    data.setup()
    samples = [dict(batch.inputs) for batch in data.calibration_batches(AutoProcessor.from_pretrained(folder))]
    return model, model.model.language_model.layers, samples


def write_rescaled(folder: Path, strength: float, share: float, factor: float) -> None:
    """The embedded model's folder with the rescaled weights."""
    shutil.copytree(CHECKPOINT, folder)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto")
    rescale(model.model.language_model.layers, strength, share, factor)
    model.save_pretrained(folder)


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """All statistics as a Markdown table."""
    names = ("loudest_channel", "weight_kurtosis", "largest_column", "correlation")
    lines = ["| model | input of | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * 6 + "|"]
    for model, sites in found.items():
        for site, values in sites.items():
            lines.append(f"| {model} | {site} | " + " | ".join(f"{values[name]:.2f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("statistics")
    measure.add_argument("models", nargs="+", help="demo, or folders")
    measure.add_argument("--json", type=Path)
    change = commands.add_parser("rescale")
    change.add_argument("folder", type=Path, help="to write")
    change.add_argument("--strength", type=float, default=0.75)
    change.add_argument("--share", type=float, default=0.02)
    change.add_argument("--factor", type=float, default=8.0)
    options = parser.parse_args()
    if options.command == "rescale":
        write_rescaled(options.folder, options.strength, options.share, options.factor)
        return
    found = {}
    for name in options.models:
        model, layers, samples = loaded(name)
        found[Path(name).name] = channel_statistics(layers, model, samples)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
