"""Makes transformers know packed checkpoints, once it is imported; costs nothing where it never is.

`import lvlm_prune` runs `register`. Importing transformers there would take seconds that `lvlm-prune --version` does
not have; waiting until a part of this package that needs transformers is imported would leave a user who only writes
`import lvlm_prune` with an unknown format. So the import of transformers' list of quantizers is watched for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_WATCHED = "transformers.quantizers.auto"


def register() -> None:
    """Register the format with transformers now, where it is imported already, or else as soon as it is."""
    if _WATCHED in sys.modules:
        _add_to(sys.modules[_WATCHED])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _add_to(auto: Any) -> None:
    from lvlm_prune.packed.format import METHOD
    from lvlm_prune.packed.quantizer import PackedConfig, PackedQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(PackedConfig)
        auto.register_quantizer(METHOD)(PackedQuantizer)


class _Watch(MetaPathFinder):
    """Steps aside when the module comes, and has it loaded as it would have been."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as another loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_to(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
