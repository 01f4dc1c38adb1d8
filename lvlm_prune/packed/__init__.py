"""Sparse checkpoints that are smaller on disk and in memory, and the kernels that make them faster."""
