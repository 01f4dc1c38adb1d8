"""Tests for authors: hold a plugin of your own against the contract of its kind."""

from lvlm_prune.methods.contract import PluginFault
from lvlm_prune.methods.testing.check import check_plugin

__all__ = ["PluginFault", "check_plugin"]
