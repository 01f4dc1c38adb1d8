"""Pages about runs: self-contained HTML with figures, made from the records of the runs alone."""
