"""How sparse a model can be that is to keep a given share: tries, then the run with what was found."""
