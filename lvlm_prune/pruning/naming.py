"""What a method is called: in what is printed, and as part of a folder's name."""

import re

from lvlm_prune.methods.allocation import Allocation
from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.methods.pools import AsymmetricPool, Pool
from lvlm_prune.methods.saliency import DriftSaliency
from lvlm_prune.methods.scorers import Scorer, WandaScorer
from lvlm_prune.methods.solvers import Solver
from lvlm_prune.plugins import plugin_class
from lvlm_prune.recipes import recipe_called


def method_name(
    pool: Pool, scorer: Scorer, allocation: Allocation, solver: Solver | None = None, sequential: bool = False
) -> str:
    """Name of a method after its parts, for example `mixed Wanda`; ATV where the parts are those of the paper.

    Example:
        >>> from lvlm_prune.methods.allocation import UniformAllocation
        >>> from lvlm_prune.methods.pools import MixedPool
        >>> from lvlm_prune.methods.solvers import ALPSSolver, RefitSolver, SparseSwapsSolver
        >>> method_name(MixedPool(), WandaScorer(), UniformAllocation())
        'mixed Wanda'
        >>> method_name(MixedPool(), WandaScorer(), UniformAllocation(), RefitSolver())
        'mixed Wanda + Refit'
        >>> method_name(MixedPool(), WandaScorer(), UniformAllocation(), RefitSolver(SparseSwapsSolver()))
        'mixed Wanda + SparseSwaps + Refit'
        >>> method_name(MixedPool(), WandaScorer(), UniformAllocation(), ALPSSolver())
        'mixed ALPS'
        >>> method_name(MixedPool(), WandaScorer(), UniformAllocation(), sequential=True)
        'mixed Wanda + sequential'
    """
    if (
        type(pool) is AsymmetricPool
        and type(pool.saliency) is DriftSaliency
        and (pool.k, pool.text_retention) == (None, 1.0)
        and type(scorer) is WandaScorer
        and not scorer.variant
        and allocation.uniform
        and solver is None
        and not sequential
    ):
        return "ATV"
    needs_tokens = (scorer if solver is None else solver).statistic is not None
    later: list[str] = []
    while solver is not None and solver.continues:
        later.insert(0, "+ " + plugin_class(solver).__name__.removesuffix("Solver"))
        solver = getattr(solver, "start", None)
    named: Scorer | Solver = scorer if solver is None else solver
    words = [plugin_class(named).__name__.removesuffix("Scorer").removesuffix("Solver")]
    if needs_tokens:
        pool_name = plugin_class(pool).__name__.removesuffix("Pool")
        words.insert(0, re.sub(r"(?<=[a-z])(?=[A-Z])", "-", pool_name).lower())
    words += later
    if sequential:
        words.append("+ sequential")
    if not allocation.uniform:
        words.append("+ " + plugin_class(allocation).__name__.removesuffix("Allocation"))
    return " ".join(words)


def folder_label(name: str, sparsity: float, pattern: Pattern) -> str:
    """Method and sparsity as part of a folder name; the method as a user types it where a recipe is called so.

    Example:
        >>> from lvlm_prune.methods.patterns import parse_pattern
        >>> folder_label("mixed Wanda", 0.6, parse_pattern("unstructured"))
        'mixed-wanda-60'
        >>> folder_label("ATV", 0.5, parse_pattern("2:4"))
        'atv-2of4'
        >>> folder_label("ALPS", 0.4, parse_pattern("2:4"))
        'alps-2of4-40'
        >>> folder_label("ALPS", 0.5, parse_pattern("2:4,1:4"))
        'alps-2of4-1of4-50'
        >>> folder_label("ALPS + KL (best)", 0.6, parse_pattern("unstructured"))
        'best-60'
    """
    method = re.sub(r"[^a-z0-9]+", "-", (recipe_called(name) or name).lower()).strip("-")
    if pattern.levels:
        label = f"{method}-{str(pattern).replace(':', 'of').replace(',', '-')}"
        return f"{label}-{100 * sparsity:g}" if pattern.mixes(sparsity) else label
    return f"{method}-{100 * sparsity:g}"
