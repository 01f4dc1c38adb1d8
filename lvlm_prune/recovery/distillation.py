"""Distillation: the recovered model is to say what the dense one said, not only the right answer.

    dense model ─► logits before each answer token ─► log-probabilities of the k largest, and of all others together
                   (a pass of its own)                teacher/part-00000.safetensors ...          (on disk)
    training    ─► (1 - w) cross-entropy + w T² KL(dense ‖ recovered), read from there

So the two models never share memory. What the dense model gives to the tokens beyond the k largest, its tail, counts as
one more outcome: the divergence is that of two distributions over k + 1 outcomes, exact at k = vocabulary and never
more than the exact one below it. Without it a model would learn to be too sure.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lvlm_prune.errors import InputError
from lvlm_prune.methods.patterns import lowest
from lvlm_prune.output.folder import refuse_full_disk
from lvlm_prune.output.manifest import replace_durably

SAMPLES_PER_PART = 64
_IDENTITY = "identity.json"


@dataclass
class Distillation:
    """Distillation from the dense model.

    Args:
        weight: Share w of the divergence in the loss, in [0, 1]; 0 trains on answers alone and needs no dense model.
        temperature: T by which both models' logits are divided (arXiv 1503.02531).
        top_k: Logits of the dense model that are kept for each answer token.

    Raises:
        InputError: A number is out of range.
    """

    weight: float = 0.0
    temperature: float = 2.0
    top_k: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError("distillation.weight", self.weight, "must lie in [0, 1]")
        if not self.temperature > 0:
            raise InputError("distillation.temperature", self.temperature, "must be positive")
        if self.top_k < 1:
            raise InputError("distillation.top_k", self.top_k, "must be at least 1")
        if self.weight == 0:
            for name, default in (("temperature", 2.0), ("top_k", 64)):
                if getattr(self, name) != default:
                    raise InputError(f"distillation.{name}", getattr(self, name), "does nothing without a weight")

    def mixed(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
        r""":math:`(1 - w) L + w T^2 D`; the square keeps the gradients of D at the size of those of L."""
        return (1 - self.weight) * cross_entropy + self.weight * self.temperature**2 * divergence


def largest(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the largest logits and, where these are not all, of all others together.

    Args:
        logits: Shape (n, vocabulary), float32.
        top_k: How many to keep, k.
        temperature: Divides the logits.

    Returns:
        Log-probabilities, (n, k + 1), or (n, vocabulary) if k is not smaller; the tokens of the first k, int32, the
        likeliest first. Of tokens that are equally likely those of lowest index are kept.

    Example:
        >>> values, tokens = largest(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), top_k=2, temperature=1.0)
        >>> values.exp(), tokens
        (tensor([[0.5000, 0.2500, 0.2500]]), tensor([[0, 1]], dtype=torch.int32))
    """
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    tokens = _likeliest(log_p, min(top_k, log_p.shape[1]))
    return _with_tail(log_p, log_p.gather(1, tokens), tokens), tokens.int()


def _likeliest(log_p: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of each row, largest first; ties by lowest index, unlike `topk`."""
    values, tokens = log_p.topk(count, dim=-1)
    tied = ((log_p >= values[:, -1:]).sum(dim=1) > count).nonzero().flatten()
    if len(tied):
        tokens[tied] = lowest(-log_p[tied], count).nonzero()[:, 1].view(-1, count)
    tokens = tokens.sort(dim=1).values
    return tokens.gather(1, log_p.gather(1, tokens).argsort(dim=1, descending=True, stable=True))


def divergence(logits: Tensor, log_probabilities: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    r"""Divergence of a model from what `largest` kept of another one, summed over positions.

    .. math:: D = \sum_{i \in \text{top } k} p_i \log \frac{p_i}{q_i} + p_t \log \frac{p_t}{q_t}

    with :math:`p_t` and :math:`q_t` what each model gives to all tokens that are not among the top k of p.

    Args:
        logits: Shape (n, vocabulary), float32, of the model that is trained: q.
        log_probabilities: As `largest` gives them: p.
        tokens: As `largest` gives them, shape (n, k).
        temperature: Divides the logits, the one that `largest` was called with.

    Returns:
        In nats, a scalar.
    """
    log_q = torch.log_softmax(logits / temperature, dim=-1)
    tokens = tokens.long()
    log_q = _with_tail(log_q, log_q.gather(1, tokens), tokens)
    return torch.nn.functional.kl_div(log_q, log_probabilities, reduction="sum", log_target=True)


def _with_tail(log_p: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """`values` and, as one more column, the logarithm of what is left to all tokens but `tokens`."""
    if tokens.shape[1] == log_p.shape[1]:
        return values
    tail = log_p.scatter(1, tokens, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([values, tail], dim=1)


class Teacher:
    """What the dense model says before each answer token, on disk.

    Args:
        folder: Folder in which its parts lie.
        options: What is kept, and how it is mixed into the loss.
        samples: Numbers of the samples.
        identity: Fingerprints of the dense model and of the data; a cache of another identity is made anew.
    """

    def __init__(self, folder: Path, options: Distillation, samples: Sequence[int], identity: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        kept = {name: value for name, value in asdict(options).items() if name != "weight"}
        self.identity = identity | kept
        self._place = {sample: divmod(index, SAMPLES_PER_PART) for index, sample in enumerate(samples)}
        self._parts = [samples[start : start + SAMPLES_PER_PART] for start in range(0, len(samples), SAMPLES_PER_PART)]
        self._open: dict[int, Any] = {}

    @classmethod
    def wait_for(cls, folder: Path, options: Distillation, samples: Sequence[int]) -> Teacher:
        """What another process makes; returns when it is complete."""
        while not (folder / _IDENTITY).is_file():
            time.sleep(0.5)
        teacher = cls(folder, options, samples, json.loads((folder / _IDENTITY).read_text()))
        while not teacher.complete:
            time.sleep(0.5)
        return teacher

    @property
    def complete(self) -> bool:
        """Whether everything that is to be kept lies on disk."""
        return self._stored_identity() == self.identity and not self.missing()

    def missing(self) -> list[int]:
        """Parts that are not on disk."""
        return [part for part in range(len(self._parts)) if not self._path(part).is_file()]

    def check_room(self, answers: int, vocabulary: int) -> int:
        """Bytes that the cache takes.

        Args:
            answers: Answer tokens of all samples.
            vocabulary: Number of tokens there are.

        Raises:
            InputError: They are not free on the disk.
        """
        kept = min(self.options.top_k, vocabulary)
        needed = answers * (kept * 8 + 4)
        refuse_full_disk(self.folder, needed, "distillation.top_k", self.options.top_k, of="the dense model's logits")
        return needed

    @torch.no_grad()
    def write(
        self, logits_of: Callable[[Sequence[int]], Mapping[int, Tensor]], progress: Callable[[int], object]
    ) -> None:
        """Make what is missing; parts that an interrupted run finished stay.

        Args:
            logits_of: Numbers of samples -> the dense model's logits (answer tokens, vocabulary) of each.
            progress: Called with the number of samples done.
        """
        if self._stored_identity() != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            replace_durably(self.folder / _IDENTITY, json.dumps(self.identity).encode())
        missing = set(self.missing())
        for number, samples in enumerate(self._parts):
            if number in missing:
                tensors: dict[str, Tensor] = {}
                logits = logits_of(samples)
                for index, sample in enumerate(samples):
                    values, tokens = largest(logits[sample], self.options.top_k, self.options.temperature)
                    tensors |= {f"{index}.log_probabilities": values.cpu(), f"{index}.tokens": tokens.cpu()}
                replace_durably(self._path(number), save(tensors))
            progress(len(samples))

    def divergence(self, logits: Tensor, samples: Sequence[int]) -> Tensor:
        """Summed divergence of a model's logits before the answer tokens of some samples, in their order."""
        values, tokens = zip(*(self._read(sample) for sample in samples))
        device = logits.device
        return divergence(logits, torch.cat(values).to(device), torch.cat(tokens).to(device), self.options.temperature)

    def _read(self, sample: int) -> tuple[Tensor, Tensor]:
        part, index = self._place[sample]
        if part not in self._open:
            self._open[part] = safe_open(self._path(part), framework="pt")
        file = self._open[part]
        return file.get_tensor(f"{index}.log_probabilities"), file.get_tensor(f"{index}.tokens")

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.safetensors"

    def _stored_identity(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / _IDENTITY).read_text()))
        except (OSError, ValueError):
            return None
