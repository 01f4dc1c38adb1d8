"""The code that made the embedded model."""
