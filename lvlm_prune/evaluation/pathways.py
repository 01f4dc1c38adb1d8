"""Checkpoints with two pathways: what the modality probe prunes, for engines that load a folder.

DIR/*                        links to the files of the dense checkpoint
DIR/pathway.safetensors      weights of the second pathway, by their names in the module; metadata: whose tokens take it

To whatever loads such a folder it is the dense model, so an engine loads it inside `routed_when_loaded`, and a harness
is started through this module:

    PYTHON -m lvlm_prune.evaluation.pathways DIR lmms_eval --model llava_hf --model_args pretrained=DIR ...
"""

from __future__ import annotations

import errno
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_prune.blocks.routing import Pathway, routed
from lvlm_prune.errors import first_line

PATHWAY_FILE = "pathway.safetensors"


def write_pathways(dense: Path, folder: Path, pruned: Mapping[str, Tensor], pathway: Pathway) -> None:
    """Write a folder with two pathways.

    Args:
        dense: Folder of the dense checkpoint, which is linked to.
        folder: Where to write; must not exist.
        pruned: Full name of each Linear -> weight of the second pathway.
        pathway: Whose tokens take it.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True)
    for file in dense.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    weights = {f"{name}.weight": weight.contiguous() for name, weight in pruned.items()}
    try:
        save_file(weights, folder / PATHWAY_FILE, metadata={"pathway": pathway})
    except SafetensorError as error:  # which tells of a full disk in its own way
        raise OSError(errno.EIO, first_line(error), str(folder / PATHWAY_FILE)) from None


@contextmanager
def routed_when_loaded(folder: Path) -> Iterator[None]:
    """Whatever transformers loads from the folder has two pathways, also while it generates.

    Args:
        folder: Written by `write_pathways`.
    """
    with safe_open(folder / PATHWAY_FILE, "pt") as file:
        pathway: Any = file.metadata()["pathway"]
        pruned = {name.removesuffix(".weight"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    inherited = PreTrainedModel.__dict__["from_pretrained"]
    with ExitStack() as stack:

        def from_pretrained(cls: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            loaded = inherited.__func__(cls, path, *arguments, **options)
            if Path(str(path)).resolve() == folder.resolve():
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                stack.enter_context(routed(model, pruned, pathway))
            return loaded

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            yield
        finally:
            PreTrainedModel.from_pretrained = inherited


def main() -> None:
    """Run a module as `python -m` does, on a folder with two pathways."""
    folder, module = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    with routed_when_loaded(Path(folder)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
