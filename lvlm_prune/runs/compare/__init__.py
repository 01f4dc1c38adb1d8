"""`compare`: output folders of `prune` and `recover` side by side."""
