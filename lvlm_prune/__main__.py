"""`python -m lvlm_prune`, the same as the command `lvlm-prune`."""

from lvlm_prune.cli import console

if __name__ == "__main__":
    console()
