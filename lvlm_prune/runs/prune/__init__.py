"""`prune`: a dense checkpoint becomes a sparse one."""
