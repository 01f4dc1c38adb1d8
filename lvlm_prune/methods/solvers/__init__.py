"""Solvers: what goes from a Linear, and which values the weights that stay get."""

from lvlm_prune.methods.solvers.alps import ALPSSolver
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver
from lvlm_prune.methods.solvers.refit import RefitSolver
from lvlm_prune.methods.solvers.sparsegpt import SparseGPTSolver
from lvlm_prune.methods.solvers.swaps import SparseSwapsSolver
from lvlm_prune.methods.solvers.targets import DenseTargetSolver, VisualWeightSolver

__all__ = [
    "ALPSSolver",
    "DenseTargetSolver",
    "LinearProblem",
    "RefitSolver",
    "Solution",
    "Solver",
    "SparseGPTSolver",
    "SparseSwapsSolver",
    "VisualWeightSolver",
]
