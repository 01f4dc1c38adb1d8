"""An output folder of `prune` or `recover`: its record, its scores, and which weights it kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lvlm_prune.blocks import ExpertMatrix, StreamedWeights
from lvlm_prune.errors import InputError
from lvlm_prune.evaluation.record import read_record
from lvlm_prune.module import LVLMModule
from lvlm_prune.output.base_record import fingerprint_of_first, was_pruned_before
from lvlm_prune.output.manifest import FREE_TO_CHANGE, Manifest, leaves
from lvlm_prune.output.names import PRIVATE_SUFFIX, PRUNING_RECORD, RECOVERY_RECORD
from lvlm_prune.output.private import public_tasks
from lvlm_prune.output.summaries import measured_on
from lvlm_prune.output.units import plain_number
from lvlm_prune.packed.folder import open_checkpoint
from lvlm_prune.report.block_names import numbers_in_parts

_OPTION = ""  # folders are given without one
# Options that say nothing about the checkpoint; how long a recovery trained does.
_BESIDE = {*FREE_TO_CHANGE, "plan"} - {"trainer"}

_OF_QUALITY = {"perplexity", "kl", "samples", "tokens", "held_back"}


class ComparedFolder:
    """A finished run.

    Args:
        path: The folder that it wrote.

    Raises:
        InputError: It is none.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        name = next((name for name in (RECOVERY_RECORD, PRUNING_RECORD) if (self.path / name).is_file()), None)
        if self.path.name.endswith(PRIVATE_SUFFIX):
            whose = str(path).rstrip("/").removesuffix(PRIVATE_SUFFIX)
            raise InputError(_OPTION, path, f"holds only what is private of {whose}; compare that")
        if name is None:
            problem = f"has no {PRUNING_RECORD} and no {RECOVERY_RECORD}: not a folder that prune or recover wrote"
            problem = problem if self.path.is_dir() else "no such folder"
            raise InputError(_OPTION, path, problem)
        try:
            self.record: Mapping[str, Any] = Manifest.read(self.path, name)
        except InputError as error:
            raise InputError(_OPTION, path, error.problem) from None
        if self.record.get("status") != "complete":
            raise InputError(_OPTION, path, "its run is not finished; go on with --resume true first")
        self.verb = "prune" if name == PRUNING_RECORD else "recover"
        self.linears: Mapping[str, Mapping[str, Any]] = self.record.get("linears", {})
        if not self.linears or not all(map(_is_measured, self.linears.values())):
            raise InputError(_OPTION, path, f"its {name} does not say which weights were pruned")

    @property
    def origin(self) -> str | None:
        """Fingerprint of the dense model that the folder comes from; None where nothing says so."""
        return fingerprint_of_first(self.record)

    @property
    def settings(self) -> dict[str, str]:
        """Options of the run, and what its data and versions were, by their full names."""
        record = self.record
        found = {key: value for key, value in leaves(record.get("config", {})) if key.split(".")[0] not in _BESIDE}
        data = record.get("calibration") or record.get("data", {}).get("examined", {})
        if found.get("data.num_samples") is None and "num_samples" in data:
            found["data.num_samples"] = data["num_samples"]  # the default takes as many as there are
        found |= {"command": self.verb, "fingerprint of the data": data.get("fingerprint")}
        found["fingerprint of the input"] = record.get("model", {}).get("fingerprint")
        found |= {f"versions.{name}": version for name, version in record.get("versions", {}).items()}
        # Of a class without options that is all: the class itself has its own entry.
        return {_option(key): _text(key, value) for key, value in found.items() if not key.endswith(".init_args")}

    @property
    def scores(self) -> dict[str, Any] | None:
        """What the checkpoint scores; None where nobody scored it.

        What `evaluate` wrote comes before what the run itself found.

        Returns:
            `average`; `retention`, or None; `tasks`: task -> score; `questions`: task -> how many were asked; `asked`:
            what else tells the questions from others, or None.
        """
        if (found := read_record(self.path)) is not None:
            of_tasks = public_tasks(found["tasks"], found.get("engine")).items()  # as published folders have them
            engine = found.get("engine", {}).get("init_args", {})
            return {
                "average": found["average"],
                "retention": found["retention"],
                "tasks": {task: entry["score"] for task, entry in of_tasks},
                "questions": {task: entry["questions"] for task, entry in of_tasks},
                "asked": found.get("asked") or engine.get("benchmark"),
            }
        scored = self.record.get("evaluation")
        if scored is None:
            return None
        which = "pruned" if self.verb == "prune" else "recovered"
        kept = scored["retention"] if self.verb == "prune" else scored["retention"][which]
        own = scored[which]
        return {
            "average": own["average"],
            "retention": kept["average"],
            "tasks": own["tasks"],
            "questions": own["counts"],
            "asked": None,
        }

    @property
    def quality(self) -> dict[str, Any] | None:
        """How near the checkpoint was to the model that was pruned when the run ended; None where nobody measured.

        Returns:
            `perplexity`, `kl`, `agreement` (or None); `measured_on`, which samples and how many tokens; `input`: the
            model that was pruned was `dense`, or `sparse` already.
        """
        found = self.record.get("quality")
        if not isinstance(found, Mapping) or not found.keys() >= _OF_QUALITY:
            return None
        kind: Literal["pruning", "recovery"] = "pruning" if self.verb == "prune" else "recovery"
        which = f"{measured_on(found, kind)} ({found['tokens']} text tokens)"
        told = {"measured_on": which, "input": "sparse" if was_pruned_before(self.record) else "dense"}
        return {name: found.get(name) for name in ("perplexity", "kl", "agreement")} | told

    def place_of(self, name: str) -> tuple[str, int]:
        """Kind of a Linear (the last part of its name, after `vision` in a vision tower), and its block.

        Blocks of the decoder count from 0, also where a vision tower was pruned before them.
        """
        kind, block = name.rpartition(".")[2], self.linears[name].get("block")
        if block is None:
            return kind, next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        kind = f"vision {kind}" if block in self._in_tower else kind
        return kind, self._numbers.get(block, block)

    def sparsity(self) -> dict[str, dict[int, float]]:
        """Kind of Linear -> block -> share of zeros; `all` over all kinds, of the decoder where that was pruned."""
        places = {name: self.place_of(name) for name in self.linears}
        has_decoder = not all(kind.startswith("vision ") for kind, _ in places.values())
        zeros: dict[str, dict[int, float]] = {}
        sizes: dict[str, dict[int, int]] = {}
        for name, entry in self.linears.items():
            kind, block = places[name]
            size = entry["shape"][0] * entry["shape"][1]
            for key in (kind,) if has_decoder and kind.startswith("vision ") else (kind, "all"):
                zeros.setdefault(key, {}).setdefault(block, 0.0)
                sizes.setdefault(key, {}).setdefault(block, 0)
                zeros[key][block] += entry["achieved"] * size
                sizes[key][block] += size
        return {kind: {block: zeros[kind][block] / size for block, size in of.items()} for kind, of in sizes.items()}

    @property
    def mean_sparsity(self) -> float:
        """Share of zeros over all Linears of the record."""
        sizes = {name: entry["shape"][0] * entry["shape"][1] for name, entry in self.linears.items()}
        zeros = sum(entry["achieved"] * sizes[name] for name, entry in self.linears.items())
        return zeros / max(sum(sizes.values()), 1)

    def kept(self, name: str) -> Tensor:
        """Bool of the shape of a Linear, or of an expert's matrix: True where its weight is not zero.

        Raises:
            InputError: The checkpoint has none of that name and shape.
        """
        matrix = self._experts.get(name)
        try:
            weight = self._weights.stored(f"{name}.weight" if matrix is None else matrix.parameter_of(name))
        except KeyError:
            weight = torch.empty(0)
        weight = weight if matrix is None else matrix.of(weight)
        if list(weight.shape) != list(self.linears[name]["shape"]):
            raise InputError(_OPTION, self.path, f"its record names {name}, which its weights have otherwise")
        return weight != 0

    @cached_property
    def _in_tower(self) -> set[int]:
        return {block["index"] for block in self.record.get("blocks", []) if block.get("target") == "vision"}

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return numbers_in_parts(self.record)

    @cached_property
    def _module(self) -> LVLMModule:
        options = self.record.get("config", {}).get("model", {})
        trusted = bool(options.get("trust_remote_code", False)) if isinstance(options, Mapping) else False
        module = LVLMModule(str(self.path), trust_remote_code=trusted)
        try:
            module.open(open_checkpoint)
        except InputError as error:
            raise InputError(_OPTION, self.path, error.problem) from None
        return module

    @cached_property
    def _experts(self) -> dict[str, ExpertMatrix]:
        return self._module.expert_matrices()

    @cached_property
    def _weights(self) -> StreamedWeights:
        module = self._module
        assert module.folder is not None
        return StreamedWeights(module.model, module.runner.decoder, module.folder, "cpu")


def _is_measured(linear: Mapping[str, Any]) -> bool:
    return "achieved" in linear and all(linear.get("shape", ()) or [0])


def _option(key: str) -> str:
    """Name of an option on the command line: `pruning.pool.alpha` for `pruning.pool.init_args.alpha`."""
    return key.replace(".init_args", "").removesuffix(".class_path")


def _text(key: str, value: Any) -> str:
    if key.endswith(".class_path"):
        return str(value).rpartition(".")[2]
    return "–" if value in (None, "", {}, []) else value if isinstance(value, str) else json.dumps(plain_number(value))
