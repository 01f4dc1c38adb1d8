"""What happens to one block: which tokens calibrate, which weights go, what it did to the block's outputs."""
