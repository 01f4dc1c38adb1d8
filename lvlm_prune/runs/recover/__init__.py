"""`recover`: a sparse checkpoint gets accuracy back, and its zeros stay."""
