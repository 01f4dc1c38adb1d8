"""Methods: what a criterion, a pool, a solver or an allocation is. Torch only: no model, no loop, no command line."""
