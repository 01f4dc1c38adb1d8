"""The interface of an allocation."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.methods.solvers import Solver
from lvlm_prune.methods.survey import Surveyor


class Allocation(Surveyor, ABC):
    """Deals the target sparsity out over the Linears. Subclass it, write `allocate`, name the class in YAML.

    An allocation that looks at the dense model first sets `wants_survey` and overrides the methods of `Surveyor`; then
    `allocate` is called after `use_survey`.

    Example:
        >>> class DownProjectionsLess(Allocation):
        ...     def allocate(self, shapes, sparsity):
        ...         sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        ...         less = {name: 0.9 if name.endswith("down_proj") else 1.0 for name in shapes}
        ...         scale = sparsity * sum(sizes.values()) / sum(sizes[name] * less[name] for name in shapes)
        ...         return {name: scale * less[name] for name in shapes}
        >>> shapes = {"mlp.up_proj": (30, 10), "mlp.down_proj": (10, 30)}
        >>> {name: round(value, 3) for name, value in DownProjectionsLess().allocate(shapes, 0.57).items()}
        {'mlp.up_proj': 0.6, 'mlp.down_proj': 0.54}
    """

    uniform: ClassVar[bool] = False
    """True where every Linear gets the target itself, which N:M patterns require."""

    chooses_levels: ClassVar[bool] = False
    """True where `allocate` gives each Linear one of the levels of an N:M pattern, or leaves it dense."""

    def check(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> None:
        """Refuse what can be seen to be wrong before anything is read or written; arguments as for `allocate`.

        Raises:
            ValueError: For example, the target cannot be reached under the allocation's maximum.
        """

    def use_method(self, solver: Solver, pattern: Pattern, sparsity: float) -> None:
        """Not required: learn, before a survey, how and how much is going to be pruned.

        Args:
            solver: What prunes each Linear.
            pattern: Which weights may go together.
            sparsity: Target share of zeros over all Linears.
        """

    def under(self, pattern: Pattern) -> Allocation:
        """Not required: what deals out under a pattern; default: this allocation, whatever the pattern."""
        return self

    @abstractmethod
    def allocate(self, shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
        """Target sparsity of each Linear, whose parameter-weighted mean is `sparsity` within 1e-6.

        Where it `chooses_levels`, under N:M: one of `pattern.levels` or 0, and the mean is at least `sparsity`.

        Args:
            shapes: Full name of each Linear -> (C_out, C_in), in the order of the blocks.
            sparsity: Target share of zeros over all of them.
        """


def block_of(linear: str) -> str:
    """Path of the block that a Linear belongs to: all up to the first number.

    Example:
        >>> block_of("model.language_model.layers.3.self_attn.q_proj")
        'model.language_model.layers.3'
    """
    match = re.match(r"(?:.*?\.)??\d+(?=\.)", linear)
    return match[0] if match else ""
