"""Output folders of `prune` and `recover` side by side."""
