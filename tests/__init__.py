"""Tests; as on the command line, threads sleep while they wait, so that a busy machine does not stop them."""

from lvlm_prune.threads import wait_asleep

# This is imported before `conftest.py`, and so before torch.
wait_asleep()
