"""`pack` and `unpack`: a sparse checkpoint without its zeros, and back."""
