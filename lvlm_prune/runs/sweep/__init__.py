"""`sweep`: many runs of `prune` over a grid of recipes, options and seeds; one table and one figure out."""
