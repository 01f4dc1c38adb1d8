"""What runs say when they are done."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lvlm_prune.output.base_record import was_pruned_before
from lvlm_prune.output.manifest import Manifest
from lvlm_prune.output.names import PAGE_NAME, PRIVATE_SUFFIX, RECOVERY_RECORD
from lvlm_prune.output.units import readable_percent


def readable_count(count: int) -> str:
    """A number of weights in the unit in which it is a small number.

    Example:
        >>> readable_count(30_720), readable_count(7_000_000_000), readable_count(12)
        ('30.7 k', '7.0 B', '12')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)


def summary(record: Manifest, folder: Path) -> str:
    """What a recovery did, in about a hundred words."""
    training, verified = record["training"], record["verified"]
    how = {"lora": "LoRA", "full": "full fine-tuning", "blockwise": "block-wise reconstruction"}[record["method"]]
    if "teacher" in record:
        how += " with distillation"
    losses = [
        f"{name.replace('_', ' ')}{_mixed(record, name)} {training[name]:.3g}"
        for name in ("train_loss", "validation_loss", "error_before", "error_after")
        if training.get(name) is not None
    ]
    lines = [
        f"recovered by {how}: {readable_count(training['trainable_parameters'])} trainable parameters · "
        f"{training['steps']} steps in {training['seconds']:.0f} s · {' · '.join(losses)}",
        f"verified: sparsity {readable_percent(verified['sparsity'])} ({record['pattern']}), every pruned weight "
        f"+0.0 in {len(record['linears'])} Linears, {verified['untouched_tensors']} other tensors untouched",
    ]
    if "evaluation" in record:
        lines.append(_scores_table(record["evaluation"]))
    if "quality" in record:
        lines.append(recovered_line(record["quality"], was_pruned_before(record)))
    more = [name for name in ("adapter", PAGE_NAME, RECOVERY_RECORD) if (folder / name).exists()]
    written = " · ".join(["merged checkpoint", *more])
    return "\n".join([*lines, f"wrote {folder} ({written}) · {record['seconds']:.0f} s"])


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


def quality_line(quality: Mapping[str, Any], before: str = "dense") -> str:
    """What was measured, in a line.

    Args:
        quality: What was measured.
        before: What the model that was pruned is called: `dense`, or `input` where it was pruned before.

    Example:
        >>> print(quality_line({"samples": 8, "tokens": 900, "held_back": True, "dense_perplexity": 5.0,
        ...                     "perplexity": 6.25, "kl": 0.21, "agreement": 0.91}))
        on 8 samples held back from calibration (900 text tokens): perplexity 5 → 6.25, KL(dense ‖ pruned) 0.21 nats
        per token, the dense model's most likely token at 91.0%
    """
    if "not_measured" in quality:
        return f"perplexity and KL not measured: {quality['not_measured']}"
    then, now, apart = (measure_text(quality[name]) for name in ("dense_perplexity", "perplexity", "kl"))
    line = (
        f"on {measured_on(quality)} ({quality['tokens']} text tokens): "
        f"perplexity {then} → {now}, KL({before} ‖ pruned) {apart} nats per token"
    )
    if "agreement" in quality:
        line += f", the {before} model's most likely token at {quality['agreement']:.1%}"
    return line


def recovered_line(quality: Mapping[str, Any], was_sparse: bool = False) -> str:
    """What recovery gave back, in a line.

    Args:
        quality: What was measured.
        was_sparse: Whether the model that was pruned, which is compared with, had been pruned before.

    Example:
        >>> print(recovered_line({"samples": 8, "tokens": 900, "held_back": True, "dense_perplexity": 5.0, "kl": 0.1,
        ...     "perplexity": 5.5, "agreement": 0.96, "pruned_perplexity": 6.25, "pruned_kl": 0.21,
        ...     "pruned_agreement": 0.91}))
        on 8 samples that did not train (900 text tokens): perplexity 6.25 → 5.5 (dense: 5), KL from the dense model
        0.21 → 0.1 nats per token, its most likely token at 91.0% → 96.0%
    """
    if "not_measured" in quality:
        return f"perplexity and KL not measured: {quality['not_measured']}"
    names = ("pruned_perplexity", "perplexity", "dense_perplexity", "pruned_kl", "kl")
    before, after, dense, apart, nearer = (measure_text(quality[name]) for name in names)
    same = f"{quality['pruned_agreement']:.1%} → {quality['agreement']:.1%}"
    short, model = ("input of pruning",) * 2 if was_sparse else ("dense", "dense model")
    return (
        f"on {measured_on(quality, 'recovery')} ({quality['tokens']} text tokens): perplexity {before} → {after} "
        f"({short}: {dense}), KL from the {model} {apart} → {nearer} nats per token, its most likely token at {same}"
    )


DENSE_MODEL = "dense model"
"""What a pruned model is measured against, where it was made from a dense one."""


def compared_with(qualities: Iterable[Mapping[str, Any] | None]) -> str:
    """What the model is called that several pruned ones are measured against, each its own.

    Args:
        qualities: Of each, with `input`: `dense`, or `sparse` where what was pruned had been pruned before; None where
            nothing was measured.

    Example:
        >>> compared_with([{"input": "dense"}, None]), compared_with([{"input": "dense"}, {"input": "sparse"}])
        ('dense model', 'input of pruning')
    """
    return "input of pruning" if any(one and one["input"] == "sparse" for one in qualities) else DENSE_MODEL


_HELD_BACK = {"pruning": "held back from calibration", "recovery": "that did not train"}
_USED = {
    "pruning": "of the calibration set (there are no others)",
    "recovery": "that trained (there are no others)",
}


def measured_on(quality: Mapping[str, Any], of: Literal["pruning", "recovery"] = "pruning") -> str:
    """Which samples a quality is of.

    Example:
        >>> measured_on({"samples": 8, "held_back": False})
        '8 samples of the calibration set (there are no others)'
        >>> measured_on({"samples": 1, "held_back": True}, "recovery")
        '1 sample that did not train'
    """
    which = (_HELD_BACK if quality["held_back"] else _USED)[of]
    return f"{quality['samples']} sample{'s' * (quality['samples'] != 1)} {which}"


def measure_text(value: float | None) -> str:
    """A perplexity or KL as people read it; records have None where it is infinite."""
    return "infinite" if value is None else f"{value:.4g}"


def private_line(folder: Path) -> str:
    """Where the private part of a folder is.

    Example:
        >>> print(private_line(Path("out")))
        private: local paths, ids and pictures of samples are in out.private, and not in out
    """
    return f"private: local paths, ids and pictures of samples are in {folder}{PRIVATE_SUFFIX}, and not in {folder}"


def _mixed(record: Mapping[str, Any], name: str) -> str:
    """What a loss of training has in it besides cross-entropy, which that of validation is."""
    return " with divergence" if name == "train_loss" and "teacher" in record else ""


def next_commands(
    folder: Path, dense: str, config: Mapping[str, Any], recovers: bool = True, packed: bool = False
) -> str:
    """What can be done with a sparse checkpoint, a command in each line; words in capitals are the user's to fill in.

    Args:
        folder: The checkpoint.
        dense: What it was made from, as the user named it.
        config: What repeats the run that made it: where the images of the user's data are is asked again.
        recovers: Whether `recover` is among them.
        packed: Whether it is packed: then it is unpacked before it is recovered.

    Example:
        >>> print(next_commands(Path("out"), "me/llava", {"data": {"image_folder": "photos"}}, packed=True))
        next: lvlm-prune evaluate --model.path out --baseline me/llava --engine.benchmark LocalBenchmark \\
                --engine.benchmark.source LlavaJsonSource --engine.benchmark.source.path QUESTIONS.json \\
                --engine.benchmark.source.image_folder photos
              lvlm-prune unpack --model.path out
    """
    sparse, origin = shlex.quote(str(folder)), shlex.quote(dense)
    images = "".join(f".image_folder {shlex.quote(one)}" for one in [*_image_folders(config.get("data"))][:1])
    questions = "--engine.benchmark.source LlavaJsonSource --engine.benchmark.source.path QUESTIONS.json"
    questions += f" \\\n        --engine.benchmark.source{images}" if images else ""
    commands = [
        f"evaluate --model.path {sparse} --baseline {origin} --engine.benchmark LocalBenchmark \\\n        {questions}"
    ]
    if packed:
        commands.append(f"unpack --model.path {sparse}")
    else:
        if recovers:
            answers = "--data.source LlavaJsonSource --data.source.path ANSWERS.json"
            answers += f" --data.source{images}" if images else ""
            commands.append(f"recover --model.path {sparse} {answers}")
        commands.append(f"pack --model.path {sparse}")
    return "next: " + "\n      ".join(f"lvlm-prune {command}" for command in commands)


def _image_folders(options: Any) -> Iterator[str]:
    """Where the images of a source are, or those of the first part of a mixture."""
    if isinstance(options, Mapping):
        if isinstance(folder := options.get("image_folder"), str | Path) and str(folder):
            yield str(folder)
        options = list(options.values())
    if isinstance(options, list):
        for one in options:
            yield from _image_folders(one)


def size_ratio(sizes: Mapping[str, int]) -> str:
    """What packing brought, for people.

    Args:
        sizes: `dense` and `packed`, in bytes.

    Example:
        >>> size_ratio({"dense": 300, "packed": 200}), size_ratio({"dense": 96, "packed": 100})
        ('1.50x smaller', '1.04x larger')
    """
    dense, packed = sizes["dense"], sizes["packed"]
    return f"{dense / packed:.2f}x smaller" if packed <= dense else f"{packed / dense:.2f}x larger"
