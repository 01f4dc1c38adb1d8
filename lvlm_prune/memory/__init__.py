"""Memory of a run: what it will take, what it took, and where its samples wait."""
