"""`python -m lvlm_prune`, the same as the command `lvlm-prune`."""

import sys

from lvlm_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())
