"""Verification: the written checkpoint is read again and held against the dense one and the promised pattern."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_prune.blocks import ExpertMatrix, StreamedWeights
from lvlm_prune.checkpoints import CheckpointFolder
from lvlm_prune.checkpoints.bits import bits_of
from lvlm_prune.errors import RunError
from lvlm_prune.methods.patterns import IN_CACHES, ZeroCount


@dataclass(frozen=True)
class Expectation:
    """What is promised of the weight of one pruned Linear.

    Args:
        pruned: Number of its weights that were set to zero.
        zeros: How they spread over the weights that were compared with each other.
        updated: Whether remaining weights may differ from the dense ones.
    """

    pruned: int
    zeros: Sequence[ZeroCount] = ()
    updated: bool = False


def verify_checkpoint(
    dense: CheckpointFolder,
    pruned: CheckpointFolder,
    weights: StreamedWeights,
    expectations: Mapping[str, Expectation],
    experts: Mapping[str, ExpertMatrix] = {},
) -> dict[str, Any]:
    """Read both checkpoints tensor by tensor and compare.

    Every pruned weight has as many zeros as were made, in all and in every comparison group (more only where the dense
    weight had zeros of its own); they are +0.0. All other tensors are byte-identical, and so are the other entries of a
    weight that was not to be updated.

    Args:
        dense: The input checkpoint.
        pruned: The output checkpoint.
        weights: Knows where on disk a weight of the model is, fused with others or not.
        expectations: Full name of each pruned Linear or expert matrix -> what is promised of it.
        experts: Full name of each matrix of a routed expert -> where it is. Those of which nothing is promised are to
            be as they were.

    Returns:
        Zeros per pruned Linear, digests of those whose remaining weights were updated, the share of zeros, and the
        number of untouched tensors.

    Raises:
        RunError: A promise is broken; names the tensor.
    """
    refuse_same_files(dense, pruned)
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    digests: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for name, matrix in experts.items():
        stacks.setdefault(matrix.parameter_of(name), []).append(name)
    stacks = {parameter: names for parameter, names in stacks.items() if not expectations.keys().isdisjoint(names)}
    linears = {f"{name}.weight": name for name in expectations if name not in experts}
    touched = {key for parameter in (*linears, *stacks) for key in weights.keys_of(parameter)}
    untouched = verify_untouched(dense, pruned, touched)
    for parameter, name in linears.items():
        before, after = (weights.stored(parameter, folder) for folder in (dense, pruned))
        zeros[name], sizes[name] = _zeros(name, before, after, expectations[name]), after.numel()
        if expectations[name].updated:
            digests[name] = digest_of(after)
    for parameter, names in stacks.items():
        both = [weights.stored(parameter, folder) for folder in (dense, pruned)]
        for name in names:
            before, after = (experts[name].of(stack).contiguous() for stack in both)
            if name in expectations:
                zeros[name], sizes[name] = _zeros(name, before, after, expectations[name]), after.numel()
                if expectations[name].updated:
                    digests[name] = digest_of(after)
            elif not bits_of(before).equal(bits_of(after)):
                raise RunError(f"verification failed: expert {name} was to stay as it is, and differs")
    return {
        "zeros": zeros,
        "digests": digests,
        "sparsity": sum(zeros.values()) / max(sum(sizes.values()), 1),
        "untouched_tensors": untouched,
    }


def verify_untouched(before: CheckpointFolder, after: CheckpointFolder, touched: Set[str]) -> int:
    """Hold all other tensors than those that were to change against what they were, in pieces that stay in caches.

    Returns:
        How many there are.

    Raises:
        RunError: One differs; names it.
    """
    for key in before:
        if key not in touched and not before.same_bytes(key, after):
            raise RunError(f"verification failed: tensor {key} was to stay as it is, and differs")
    return len(before) - len(touched)


def digest_of(weight: Tensor) -> str:
    """Digest of a weight on the CPU: what was updated cannot be held against the dense weight."""
    return hashlib.blake2b(bits_of(weight.contiguous()).numpy().data, digest_size=16).hexdigest()


def refuse_other_findings(recorded: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold what is found in a complete folder against what was found when it was written.

    Args:
        recorded: Name of each pruned Linear -> `zeros`, and `digest` where its remaining weights were updated.
        found: `zeros` and `digests` as verification gives them.

    Raises:
        RunError: They differ, or nothing is recorded of one; names it.
    """
    for name, zeros in found["zeros"].items():
        known, digest = recorded.get(name), found["digests"].get(name)
        if known is None or "zeros" not in known or (digest is not None and "digest" not in known):
            raise RunError(f"verification failed: the record does not say how {name} was written")
        if known["zeros"] != zeros or known.get("digest", digest) != digest:
            raise RunError(f"verification failed: {name} is not as it was written")


def refuse_same_files(dense: CheckpointFolder, pruned: CheckpointFolder) -> None:
    """Raise where a checkpoint would be compared with itself, or a shard is missing.

    Raises:
        RunError: It would.
    """
    for shard in dense.shards:
        try:
            same = (dense.path / shard).samefile(pruned.path / shard)
        except OSError as error:
            raise RunError(f"verification failed: {shard} cannot be read: {error.strerror}") from None
        if same:
            raise RunError(f"verification failed: {shard} is the same file in {dense.path} and in {pruned.path}")


def _zeros(name: str, before: Tensor, after: Tensor, expected: Expectation) -> int:
    """Number of zeros in a pruned weight that is as promised; raises where it is not."""
    bits_before, bits_after = bits_of(before), bits_of(after)
    if not expected.updated and not _same_or_zero(bits_before, bits_after):
        raise RunError(f"verification failed: remaining weights of {name} changed")
    if expected.updated and ((after == 0) & (bits_after != 0)).any():
        raise RunError(f"verification failed: {name} holds -0.0 where +0.0 was to be written")
    if expected.updated and not torch.isfinite(after).all():
        raise RunError(f"verification failed: {name} holds NaN or infinity")
    whole = ZeroCount(after.numel(), expected.pruned, expected.pruned)
    for count in (*expected.zeros, whole):
        zeros = count.of(after)
        wrong = zeros < count.least
        if count.most is not None and (zeros > count.most).any():
            wrong |= zeros > count.most + count.of(before)
        if wrong.any():
            where = "all" if count is whole else "a group"
            found = f"{int(zeros[wrong][0])} zeros in {where}, {count.least} were to be there"
            raise RunError(f"verification failed: {name} has {found}")
    return int(zeros)


def _same_or_zero(before: Tensor, after: Tensor) -> bool:
    """Whether every entry is as it was, or zero."""
    pieces = zip(before.flatten().split(IN_CACHES), after.flatten().split(IN_CACHES), strict=True)
    return all(bool(((new == 0) | (new == old)).all()) for old, new in pieces)
