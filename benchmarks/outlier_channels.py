"""Weights and activations of a decoder, and how the embedded model is given the outlier channels of real ones.

    python -m benchmarks.outlier_channels statistics GEMMA_FOLDER demo demo-outliers --json OUT --markdown
    python -m benchmarks.outlier_channels fit benchmarks/outlier_channels.json lvlm_prune/demo/outliers.safetensors

Real decoders have a few input channels that are many times as loud as the median, and heavy-tailed weights. The
embedded model has neither, which is why magnitude beats Wanda on it. `lvlm_prune/demo/outliers.py` moves loudness
between two neighbours that are linear in it; `fit` chooses how far, so that the statistics below come as close to those
of the first model in the JSON file as they can. No score of any method of pruning takes part in the choice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarks.pretrained import CARD
from benchmarks.real_weights import Text
from lvlm_prune.checkpoints import resolve
from lvlm_prune.data import CalibrationDataModule, EmbeddedSource
from lvlm_prune.demo.outliers import PAIRS

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NAMES = ("loudest_channel", "weight_kurtosis", "correlation", "largest_column")
# How far each channel's binary logarithm spreads; share of the channels, the loudest ones, that become louder; by how
# many powers of two.
_SPREADS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_OUTLIERS = ((0.0, 0), (0.005, 1), (0.005, 2), (0.01, 1), (0.01, 2), (0.02, 1), (0.02, 2))
_ROUNDS = 3

Choice = tuple[float, float, int]
Exponents = dict[str, Tensor]


class Observed:
    """Linears of a decoder's blocks, and how loud their input channels are.

    Args:
        layers: The blocks.
        model: What is run.
        samples: Model inputs.

    Attributes:
        weights: Block and Linear -> weight, float64 of shape (C_out, C_in).
        loudness: Block and Linear -> norm of each input channel over all tokens, float64 of shape (C_in,).
    """

    def __init__(self, layers: Iterable[nn.Module], model: nn.Module, samples: list[dict[str, Any]]) -> None:
        found = [((number, name), layer.get_submodule(name)) for number, layer in enumerate(layers) for name in LINEARS]
        squares: dict[tuple[int, str], Tensor] = {}
        hooks = [linear.register_forward_pre_hook(_adder(squares, key)) for key, linear in found]
        with torch.inference_mode():
            for sample in samples:
                model(**sample)
        for hook in hooks:
            hook.remove()
        self.weights = {key: linear.weight.detach().double() for key, linear in found}
        self.loudness = {key: total.sqrt().clamp(min=1e-9) for key, total in squares.items()}
        self.blocks = 1 + max(number for number, _ in self.weights)

    def statistics(self, exponents: Exponents) -> dict[str, dict[str, list[float]]]:
        """What makes Wanda differ from magnitude: Linear -> statistic -> median, least and greatest over the blocks.

        `loudest_channel` is the largest over the median norm of an input channel, `largest_column` the same of the
        weight's columns, `correlation` that of the logarithms of both.

        Args:
            exponents: As `lvlm_prune.demo.outliers.rescaled` takes them; empty for the model as it is.
        """
        weights, loudness = self._rescaled(exponents)
        found = {}
        for name in LINEARS:
            rows = [_of_linear(weights[n, name], loudness[n, name]) for n in range(self.blocks)]
            found[name] = {
                one: [statistics.median(values), min(values), max(values)]
                for one, values in zip(NAMES, zip(*rows, strict=True), strict=True)
            }
        return found

    def _rescaled(self, exponents: Exponents) -> tuple[dict[tuple[int, str], Tensor], dict[tuple[int, str], Tensor]]:
        weights, loudness = dict(self.weights), dict(self.loudness)
        for key, powers in exponents.items():
            block, _, name = key.partition(".")
            number, pair, scale = int(block), PAIRS[name], torch.exp2(powers.double())
            if pair.louder in LINEARS:
                weights[number, pair.louder] = weights[number, pair.louder] * scale[:, None]
            for quieter in pair.quieter:
                by = scale if pair.dim else scale[:, None]
                weights[number, quieter] = weights[number, quieter] / by
                if pair.dim:
                    loudness[number, quieter] = loudness[number, quieter] * scale
        return weights, loudness


def _adder(squares: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total = inputs[0].detach().flatten(0, -2).double().square().sum(0)
        squares[key] = squares[key] + total if key in squares else total

    return add


def _of_linear(weight: Tensor, loudness: Tensor) -> tuple[float, ...]:
    """The four statistics in the order of `NAMES`."""
    columns = weight.norm(dim=0).clamp(min=1e-9)
    correlation = torch.corrcoef(torch.stack([loudness.log(), columns.log()]))[0, 1]
    loudest, largest = loudness.max() / loudness.median(), columns.max() / columns.median()
    return float(loudest), kurtosis(weight), float(correlation), float(largest)


def kurtosis(values: Tensor) -> float:
    """Fourth moment over the squared variance: 3 for normally distributed values.

    Example:
        >>> kurtosis(torch.tensor([-1.0, 1.0]))
        1.0
    """
    centred = values.double() - values.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def distance(found: Mapping[str, Mapping[str, list[float]]], target: Mapping[str, Mapping[str, list[float]]]) -> float:
    """How far apart the medians are: squared differences of the logarithms, and of the correlations' Fisher z."""
    total = 0.0
    for linear, values in found.items():
        for name in NAMES[:3]:
            one, other = values[name][0], target[linear][name][0]
            total += (math.atanh(one) - math.atanh(other) if name == "correlation" else math.log(one / other)) ** 2
    return total


def exponents_of(observed: Observed, choices: Mapping[str, Choice], head: int) -> Exponents:
    """Exponents of every block for a choice of each pair: normal ones, and more for the loudest channels.

    Args:
        observed: The embedded model.
        choices: Pair -> spread, share of outliers, and by how many powers of two these are louder.
        head: Channels in a head, whose halves a rotary embedding turns into one another.
    """
    found: Exponents = {}
    for number, (name, (spread, share, louder)) in product(range(observed.blocks), choices.items()):
        pair = PAIRS[name]
        loudness = observed.loudness[number, pair.quieter[0]]
        draw = random.Random(f"{name} {number}")
        normal = NormalDist(0, spread) if spread else None
        count = len(observed.weights[number, pair.louder]) if not pair.dim else len(loudness)
        powers = torch.tensor([round(normal.inv_cdf(draw.random())) if normal else 0 for _ in range(count)])
        if pair.dim:
            powers[loudness.argsort(descending=True)[: round(share * count)]] += louder
        else:
            first = powers.reshape(-1, 2, head // 2)[:, :1]
            powers = first.expand(-1, 2, -1).reshape(-1)
        if powers.any():
            found[f"{number}.{name}"] = powers.to(torch.int8).contiguous()
    return found


def fit(
    observed: Observed, target: Mapping[str, Mapping[str, list[float]]], head: int
) -> tuple[dict[str, Choice], Exponents]:
    """The choice for each pair that brings the statistics closest to those of real weights, one pair after the other.

    Args:
        observed: The embedded model.
        target: Statistics of the real one.
        head: Channels in a head.
    """
    choices: dict[str, Choice] = dict.fromkeys(PAIRS, (0.0, 0.0, 0))

    def error(name: str, choice: Choice) -> float:
        return distance(observed.statistics(exponents_of(observed, {**choices, name: choice}, head)), target)

    for _ in range(_ROUNDS):
        for name, pair in PAIRS.items():
            outliers = _OUTLIERS if pair.dim else _OUTLIERS[:1]
            offered = [(spread, *outlier) for spread, outlier in product(_SPREADS, outliers)]
            choices[name] = min(offered, key=lambda choice: error(name, choice))
    return choices, exponents_of(observed, choices, head)


def observe(name: str) -> tuple[Observed, int]:
    """A decoder on captions of the embedded model, or on prose for a package's; and the channels of a head."""
    folder = resolve(name)
    if (folder / CARD).is_file():
        text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        samples = Text(AutoTokenizer.from_pretrained(folder), 256).samples(8, seed=0)
        return Observed(text.model.layers, text, samples), text.config.head_dim
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    data = CalibrationDataModule(EmbeddedSource(), num_samples=16)
    data.setup()
    samples = [dict(batch.inputs) for batch in data.calibration_batches(AutoProcessor.from_pretrained(folder))]
    return Observed(model.model.language_model.layers, model, samples), model.config.text_config.head_dim


def table(found: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> str:
    """Medians over the blocks as a Markdown table, with the range of the first model."""
    first, *others = found
    heads = [
        "Linear",
        "statistic",
        *(f"{first}, median (range)" if name == first else name for name in (first, *others)),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for linear, name in product(LINEARS, NAMES):
        median, least, greatest = found[first][linear][name]
        cells = [f"{median:.2f} ({least:.2f} to {greatest:.2f})", *(f"{found[m][linear][name][0]:.2f}" for m in others)]
        lines.append("| " + " | ".join([linear.partition(".")[2], name.replace("_", " "), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("statistics")
    measure.add_argument("models", nargs="+", help="demo, demo-outliers, or folders")
    measure.add_argument("--json", type=Path)
    measure.add_argument("--markdown", action="store_true")
    choose = commands.add_parser("fit")
    choose.add_argument("target", type=Path, help="written by `statistics`; its first model is the target")
    choose.add_argument("output", type=Path, help="exponents to write")
    options = parser.parse_args()
    if options.command == "fit":
        target = json.loads(options.target.read_text())
        observed, head = observe("demo")
        choices, exponents = fit(observed, next(iter(target.values())), head)
        save_file(exponents, options.output)
        print(json.dumps(choices, indent=1))
        return
    found = {Path(name).name: observe(name)[0].statistics({}) for name in options.models}
    if options.markdown:
        print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
