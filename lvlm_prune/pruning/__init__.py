"""Pruning block by block: the run, its calibration samples, and what is done at each block."""
