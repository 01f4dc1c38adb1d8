"""`evaluate`: scores of a checkpoint, and what is left of those of the dense one."""
