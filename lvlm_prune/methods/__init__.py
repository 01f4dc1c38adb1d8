"""Methods: what a criterion, a pool, a solver or an allocation is. Torch only: no model, no loop, no command line.

The base classes for those who write their own are here: `from lvlm_prune.methods import Scorer`. What each of them must
write is abstract; everything else is marked "not required". `lvlm_prune.methods.testing.check_plugin` holds a finished
one against its contract. `docs/write_your_own.md` goes through an example.
"""

from lvlm_prune.methods.allocation.base import Allocation
from lvlm_prune.methods.patterns import Pattern
from lvlm_prune.methods.pools.base import Pool
from lvlm_prune.methods.saliency.base import Saliency
from lvlm_prune.methods.scorers.base import Scorer
from lvlm_prune.methods.solvers.base import LinearProblem, Solution, Solver
from lvlm_prune.methods.statistics import Statistic
from lvlm_prune.methods.tokens import Selection, Tokens

__all__ = [
    "Allocation",
    "LinearProblem",
    "Pattern",
    "Pool",
    "Saliency",
    "Scorer",
    "Selection",
    "Solution",
    "Solver",
    "Statistic",
    "Tokens",
]
