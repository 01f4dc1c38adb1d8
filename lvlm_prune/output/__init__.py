"""The folder that a run writes: what stands in it, and whether it is right."""
