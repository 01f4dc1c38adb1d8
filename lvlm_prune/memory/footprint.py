"""Memory that a run is going to need, from sizes that are known before it starts.

    catching    non-block        + inputs and tower of one batch          + samples caught so far
    survey      block, next one  + forward, what is recorded of it        + samples, twice
                or: block, statistics, changed weights, their hidden states; and three blocks as they pass by,
                or the output embedding and logits in the place of what changes weights
    gathering   block            + forward, statistics, held candidates   + samples
    scoring     block            + statistics of what is dense still, masks, one weight's scores + samples
    passing on  block, next one  + forward, masks                         + samples
    verifying   one weight, dense and pruned

The peak is the largest of these lines. What plugins take they say themselves (`nbytes`, `working_bytes`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from lvlm_prune.blocks import BlockRunner, ExpertMatrix, Part, Place, find_expert_stacks, prunable_linears
from lvlm_prune.blocks.attention import HELD_ATTENTION
from lvlm_prune.blocks.remaining import ANSWERS, HELD_BYTES
from lvlm_prune.memory.hidden_states import Wanted, choose_place
from lvlm_prune.memory.sizes import BatchSize, MemoryDemand, Peak, larger_phases
from lvlm_prune.methods.pools import Pool
from lvlm_prune.methods.solvers import Solver
from lvlm_prune.methods.survey import Surveyor, surveyed_samples
from lvlm_prune.methods.tokens import ATTENTION_NEEDS
from lvlm_prune.module import LVLMModule

# What libraries set up in the first forwards, in bytes.
_WARM_UP = 2**24

# Rows of a weight before and after, in float32, that tell how far its outputs move.
_EFFECTS = 2**24


# What configurations call the number of experts that a token is sent to.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


class Footprint:
    """Predicts the memory that one process takes while the decoder, or a vision tower, is in work.

    Args:
        module: The opened model; no weights are read.
        part: The blocks that are in work.
        method: What prunes it.
        batches: The calibration batches of this process.
        device: Where blocks run.
        baseline: Anonymous memory of the process before anything is read, in bytes.
        output_bytes: Size of the output folder.
    """

    def __init__(
        self,
        module: LVLMModule,
        part: Part,
        method: MemoryDemand,
        batches: Sequence[BatchSize],
        device: torch.device,
        baseline: int,
        output_bytes: int,
    ) -> None:
        self.method, self.batches, self.output_bytes = method, batches, output_bytes
        self.baseline = baseline + _WARM_UP
        self.on_gpu = device.type == "cuda"
        self._label = "vision tower, " if part.target == "vision" else ""
        runner = part.runner
        config: Any = module.model.config.get_text_config(decoder=True)
        self.width: int = config.hidden_size
        if part.target == "vision":
            # What `hidden_size` means differs from tower to tower; their first Linear is that of the attention.
            config = getattr(runner.model, "config", None)
            self.width = next(iter(prunable_linears(runner.block(0)).values())).weight.shape[1]
        self.itemsize = torch.empty((), dtype=module.compute_dtype).element_size()
        self._heads = max(_largest(config, name, 1) for name in ("num_attention_heads", "num_heads"))
        self._head_width = _largest(config, "head_dim", self.width // self._heads)
        rotary = getattr(config, "rope_parameters", None) or {}
        self._experts_per_token = max(_largest(config, name, 1) for name in _EXPERTS_PER_TOKEN)
        self._rotary_axes = 3 if "mrope_section" in rotary else 1
        self._eager = getattr(config, "_attn_implementation", "") == "eager"
        head = module.model.get_output_embeddings()
        self._vocabulary = 0 if head is None else int(head.weight.shape[0])
        self.head_bytes = 0 if head is None else sum(one.numel() * one.element_size() for one in head.parameters())
        sizes_of_weights = _weight_sizes(module, runner, self.head_bytes)
        self.non_block_bytes, self.block_bytes, self._tower_width = sizes_of_weights
        if module.folder is None:  # the weights are in memory already, part of the baseline
            self.non_block_bytes, self.head_bytes, self.block_bytes = 0, 0, [0] * len(self.block_bytes)
        sizes = (_BlockSize.of(runner.block(index), self.width) for index in range(len(runner)))
        self._blocks = [size if method.prunes_experts else replace(size, experts=()) for size in sizes]

    # ---- what is held all along --------------------------------------------------------------------------------------
    def held_bytes(self) -> int:
        """Bytes of all calibration samples at the input of a block."""
        return sum(self._held(batch) for batch in self.batches)

    def _held(self, batch: BatchSize) -> int:
        # Hidden states; cosine and sine; ids, mask and three positions as int64, modality as int8.
        rotary = 2 * self._rotary_axes * self._head_width * self.itemsize
        return batch.positions * (self.width * self.itemsize + rotary + 5 * 8 + 1) + self._mask(batch)

    def _mask(self, batch: BatchSize) -> int:
        samples, length = batch.shape
        padded = samples > 1 and sum(batch.text) + sum(batch.visual) < batch.positions
        return samples * length**2 * (self.itemsize if self._eager else padded)

    # ---- phases, in bytes beside the samples -------------------------------------------------------------------------
    def phases(self) -> dict[str, int]:
        """Bytes that each phase of the run takes where blocks run, besides what waits."""
        pool, solver = self.method.pool, self.method.solver
        found = {
            "catching": max(map(self._catching, self.batches), default=0) + self.non_block_bytes * bool(self.batches)
        }
        for size, block in zip(self.block_bytes, self._blocks):
            statistics = 0 if pool is None else block.statistics(solver, pool, self.method.by_site)
            forward = max((self._forward(block, one) for one in self.batches), default=0)
            # Dense weights of what is pruned already, where the dense block is to run once more.
            kept = size if self.method.by_site and self.method.follows_dense else 0
            matrices = (*block.shapes, *block.experts)
            masks = sum(map(prod, matrices))
            phases = {
                "scoring": size + kept + masks + self._scoring(block),
                "passing on": 2 * size + kept + masks + forward,
            }
            if pool is not None:
                gathering = max((self._gathering(block, batch, self.method.needs) for batch in self.batches), default=0)
                phases["gathering"] = size + kept + statistics + self._candidates(block, pool) + gathering
            if self.method.surveys:
                phases["survey"] = self._survey(size, block, forward)
            found = larger_phases(found, phases)
        return {f"{self._label}{name}": count for name, count in found.items()}

    def _scoring(self, block: _BlockSize) -> int:
        """Statistics of sites with Linears that are dense still, and what the solver takes for one of the next site."""
        pool, solver = self.method.pool, self.method.solver
        matrices = (*block.shapes, *block.experts)
        held = [] if pool is None else block.statistics_of_sites(solver, pool)
        if not held:
            working = (solver.working_bytes(shape, self.itemsize, self.on_gpu) for shape in matrices)
            return max(working, default=0) + _EFFECTS
        most = 0
        for number, (channels, statistic) in enumerate(held):
            fed = (shape for shape in matrices if shape[1] == channels)
            working = (solver.working_bytes(shape, self.itemsize, self.on_gpu) for shape in fed)
            later = 0 if self.method.by_site else sum(count for _, count in held[number + 1 :])
            most = max(most, statistic + later + max(working, default=0))
        return most + _EFFECTS

    def _catching(self, batch: BatchSize) -> int:
        inputs = batch.input_elements * (4 + self.itemsize)
        tower = batch.patches * self._tower_width * 3 * self.itemsize
        return inputs + tower + 4 * batch.positions * self.width * self.itemsize

    def _forward(self, block: _BlockSize, batch: BatchSize) -> int:
        wide = sorted((rows for rows, _ in block.shapes), reverse=True)[:2] or [self.width]
        # Two gates and their product, or one layer and its activation.
        feed_forward = 3 * wide[0] if len(wide) == 2 and wide[0] == wide[1] else 2 * wide[0]
        attention = 2 * sum(rows for rows, _ in block.shapes if rows < wide[0]) + 4 * self.width // self.itemsize
        maps = 2 * self._heads * batch.shape[1] * batch.positions * 4 if self._eager else 0
        return batch.positions * self.itemsize * (3 * self.width + max(feed_forward, attention)) + maps

    def _gathering(self, block: _BlockSize, batch: BatchSize, needs: frozenset[str]) -> int:
        """A forward whose inputs of Linears are recorded, and what is made of one sample's afterwards."""
        inputs = sum(channels for channels, _ in block.sites)
        recorded = inputs + 2 * self.width + (inputs if self.method.follows_dense else 0)
        if "outputs" in needs:
            recorded += sum(rows for rows, _ in block.shapes)
        if needs & ATTENTION_NEEDS:
            recorded += 2 * self.width
        longest = batch.shape[1]
        statistic = self.method.solver.statistic
        adding = (
            max((statistic.adding_bytes(longest, channels, self.itemsize) for channels, _ in block.sites), default=0)
            if statistic is not None and self.method.pool is not None
            else 0
        )
        widest = max((rows for rows, _ in block.shapes), default=self.width)
        choosing = (
            self.method.pool.working_bytes(longest, max(batch.visual), self.width, widest, self.itemsize)
            if self.method.pool is not None
            else 0
        )
        if attention := needs & ATTENTION_NEEDS:
            looking = {"attention_last": 1, "attention_text_to_visual": max(batch.text)}
            rows = max(looking.get(name, longest) for name in attention)
            keys = self._heads * self._head_width * longest * (4 + 2 * self.itemsize)
            choosing = max(choosing, keys + 3 * 4 * min(HELD_ATTENTION, self._heads * rows * longest))
        made = batch.positions * recorded * self.itemsize
        return max(self._forward(block, batch) + made // 2, made + max(adding, choosing))

    def _candidates(self, block: _BlockSize, pool: Pool) -> int:
        """Activations of tokens whose turn is decided once all samples have run."""
        tokens = sum(
            pool.held_tokens(text, visual) for batch in self.batches for text, visual in zip(batch.text, batch.visual)
        )
        channels = sum(channels for channels, _ in block.sites)
        # A token is sent to a few experts, and goes through each matrix of theirs.
        channels += self._experts_per_token * sum({shape: shape[1] for shape in block.experts}.values())
        return tokens * channels * self.itemsize

    def _survey(self, size: int, block: _BlockSize, forward: int) -> int:
        """What looking at a dense block takes: with the next one, or with statistics and plugins that try changes."""
        surveyors, pool, solver = self.method.surveyors, self.method.pool, self.method.solver
        statistics = 0
        if pool is not None and any(plugin.wants_survey_statistics for plugin in surveyors):
            statistics = max(block.statistics(one, pool) for one in (solver, solver.quick()))
        shapes = dict(zip(block.names, block.shapes))
        gathering = max((self._gathering(block, one, self.method.survey_needs) for one in self.batches), default=0)
        most = size + gathering + max(size, statistics)
        for plugin in surveyors:
            taken = plugin.survey_bytes(shapes, self.itemsize, self.on_gpu)
            if plugin.wants_survey_losses:
                later = max(2 * size + forward, self.head_bytes + self._logits())
                taken = max(taken, later) + self._held_changes(plugin, list(shapes))
            most = max(most, size + statistics + taken)
        return most

    def _held_changes(self, plugin: Surveyor, names: list[str]) -> int:
        """Hidden states of the samples that go on together, once for each change of a block."""
        numbers = range(sum(batch.shape[0] for batch in self.batches))
        share = len(surveyed_samples(plugin.survey_samples, numbers)) / max(len(numbers), 1)
        changes = plugin.survey_cost({"": names}, 1).losses
        return min(int(changes * share * sum(map(self._hidden, self.batches))), HELD_BYTES)

    def _logits(self) -> int:
        """Two sets of them in float32, and what their divergence takes."""
        positions = max((max(batch.text) for batch in self.batches), default=0)
        return min(positions, ANSWERS) * self._vocabulary * 16

    # ---- the peak ----------------------------------------------------------------------------------------------------
    def working(self) -> tuple[int, int]:
        """Bytes beside the samples: (on the device, in the host's memory); the same number twice on a CPU."""
        most = max(self.phases().values())
        verifying = max((prod(shape) for block in self._blocks for shape in block.shapes), default=0)
        if not self.on_gpu:
            most = max(most, verifying * (2 * self.itemsize + 4)) + self.baseline
            return most, most
        largest = max((self._hidden(batch) for batch in self.batches), default=0)
        host = max(self.block_bytes, default=0) + verifying * (2 * self.itemsize + 4)
        return most + 3 * largest, self.baseline + host

    def _hidden(self, batch: BatchSize) -> int:
        return batch.positions * self.width * self.itemsize

    def waiting_bytes(self) -> int:
        """Bytes of the samples as they wait, twice where they go through the dense model too."""
        return sum(self._waiting())

    def _waiting(self) -> list[int]:
        """Bytes of each batch as it waits, and of its hidden states in a survey, or in the dense model."""
        again = map(self._hidden, self.batches) if self.method.surveys or self.method.follows_dense else ()
        return [*map(self._held, self.batches), *again]

    def place(self, wanted: Wanted, on_device: int, in_host: int) -> Place:
        """Where the samples are to wait.

        Args:
            wanted: What the user asked for.
            on_device: Bytes that are free where blocks run.
            in_host: Bytes that are free in host memory.
        """
        device, host = self.working()
        if not self.on_gpu:
            device -= self.baseline  # which is taken already
        return choose_place(
            wanted, self.waiting_bytes(), on_device - device, in_host - (host - self.baseline), in_host // 2
        )

    def peak(self, place: Place) -> Peak:
        """The largest memory at any time, with the samples in `place`."""
        device, host = self.working()
        held = self.waiting_bytes()
        disk = self.output_bytes
        if place == "disk":
            disk += held
            host += 0 if self.on_gpu else 2 * max(map(self._hidden, self.batches), default=0)
        elif place == "device" and self.on_gpu:
            device += held
        elif self.on_gpu:
            host += sum(map(_power_of_two, self._waiting()))  # as pinned memory is dealt out
        else:
            host += held
        return Peak(device if self.on_gpu else None, host, disk)


@dataclass(frozen=True)
class _BlockSize:
    """Linears of a block.

    Args:
        names: Of the Linears, relative to the block.
        shapes: (C_out, C_in) of each.
        sites: (C_in, Linears that share this input) of each input site.
        experts: (C_out, C_in) of each matrix of a routed expert.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sites: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, block: nn.Module, width: int) -> _BlockSize:
        """Linears of one parent with inputs of one width share them, but for the one that ends it."""
        parents: dict[str, list[nn.Linear]] = {}
        linears = prunable_linears(block)
        for name, linear in linears.items():
            parents.setdefault(name.rpartition(".")[0], []).append(linear)
        sites: list[tuple[int, int]] = []
        for group in parents.values():
            ends = len(group) > 1 and group[-1].out_features == width
            inputs: dict[int, int] = {}
            for linear in group[:-1] if ends else group:
                inputs[linear.in_features] = inputs.get(linear.in_features, 0) + 1
            sites += inputs.items()
            if ends:
                sites.append((group[-1].in_features, 1))
        experts = [matrix for stack in find_expert_stacks(block) for matrix in stack.matrices()]
        return cls(tuple(linears), _shapes(linears.values()), tuple(sites), _shapes(experts))

    def statistics(self, solver: Solver, pool: Pool, by_site: bool = False) -> int:
        """Bytes of the statistics that are gathered together: those of all sites, or of the largest one."""
        held = [count for _, count in self.statistics_of_sites(solver, pool)]
        return max(held, default=0) if by_site else sum(held)

    def statistics_of_sites(self, solver: Solver, pool: Pool) -> list[tuple[int, int]]:
        """(C_in, bytes of its statistics) of each site; all experts of a stack are one, but for their last matrices."""
        if solver.statistic is None:
            return []
        sites = [
            (channels, solver.statistic_bytes(channels) * (shared if pool.per_linear else 1))
            for channels, shared in self.sites
        ]
        experts: dict[tuple[int, int], int] = {}
        for shape in self.experts:
            experts[shape] = experts.get(shape, 0) + solver.statistic_bytes(shape[1])
        return sites + [(channels, count) for (_, channels), count in experts.items()]


def _shapes(matrices: Iterable[nn.Linear | ExpertMatrix]) -> tuple[tuple[int, int], ...]:
    return tuple((matrix.out_features, matrix.in_features) for matrix in matrices)


def _weight_sizes(module: LVLMModule, runner: BlockRunner, head_bytes: int) -> tuple[int, list[int], int]:
    """Bytes of the frame, of each of the runner's blocks, and the widest Linear of a tower."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in module.model.state_dict().items()}
    paths = tuple(f"{module.runner.name(index)}." for index in range(len(module.runner)))
    decoder = sum(size for name, size in sizes.items() if name.startswith(paths))
    names = [f"{runner.name(index)}." for index in range(len(runner))]
    blocks = [sum(size for name, size in sizes.items() if name.startswith(path)) for path in names]
    output = module.model.get_output_embeddings()
    tied = output is not None and output.weight is module.model.get_input_embeddings().weight
    # By the weight: families write widths that they compute as tensors.
    widths: list[int] = [
        max(linear.weight.shape)
        for name, linear in module.model.named_modules()
        if isinstance(linear, nn.Linear) and linear is not output and not name.startswith(paths)
    ]
    return sum(sizes.values()) - decoder - (0 if tied else head_bytes), blocks, max(widths, default=0)


def _largest(config: Any, name: str, default: int) -> int:
    """A value of a configuration; the largest where layers have configurations of their own."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(getattr(layer, name, None) or default for layer in layers)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
