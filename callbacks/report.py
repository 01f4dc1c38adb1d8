"""The report: one self-contained page about a run, from the manifest alone."""

from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from lvlm_prune.callbacks.base import PruneCallback
from lvlm_prune.manifest import FILE_NAME, Manifest, replace_durably

if TYPE_CHECKING:
    from lvlm_prune.module import LVLMModule
    from lvlm_prune.trainer import LVLMTrainer


class PruningReport(PruneCallback):
    """Writes `report.html` beside the checkpoint and says where everything is."""

    def on_prune_end(self, trainer: "LVLMTrainer", pl_module: "LVLMModule") -> None:
        """Render the manifest."""
        folder = trainer.output_folder
        if folder is None or not trainer.processes.is_main:
            return
        trainer.manifest.write(folder)
        replace_durably(folder / "report.html", render_report(trainer.manifest).encode())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        seconds = trainer.manifest["seconds"]
        trainer.say(f"wrote {folder} ({size / 1e6:.1f} MB) · report.html · {FILE_NAME} · {seconds:.0f} s")


def render_report(manifest: Manifest) -> str:
    """The page as HTML; every number on it stands in the manifest."""
    template = files("lvlm_prune.callbacks").joinpath("report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    blocks = [block | {"sparsity": manifest.achieved_sparsity(block["index"])} for block in manifest["blocks"]]
    return environment.from_string(template).render(run=manifest, blocks=blocks)
