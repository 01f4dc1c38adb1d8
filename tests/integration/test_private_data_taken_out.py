"""What is private is taken out of a folder: also by a run that goes on there, and of the embedded model."""

import json
import re
from pathlib import Path

import pytest

from lvlm_prune.cli import main
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.runs import publishing


@pytest.mark.parametrize("written", range(3))
def test_a_run_that_ends_while_private_data_is_taken_out_goes_on(written, bases, labelled, tmp_path, monkeypatch):
    """Files without private data are those that were written, whether the record says already that they are without."""
    data = ["--data.source=TensorSource", f"--data.source.path={labelled}", "--data.validation_samples=2"]
    command = ["recover", f"--model.path={bases / '2:4-float32'}", *data, "--trainer.accelerator=cpu"]
    command += ["--report=false", "--evaluate=false", f"--output={tmp_path / 'out'}"]
    really, done = publishing.replace_durably, []

    def dying(path: Path, content: bytes) -> None:
        if path.is_relative_to(tmp_path / "out"):
            if len(done) == written:
                raise KeyboardInterrupt
            done.append(path)
        really(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "replace_durably", dying)
        assert main(command) == 130
    assert main([*command, "--resume=true"]) == 0
    assert str(bases) not in (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    assert str(bases) not in (tmp_path / "out" / "config.yaml").read_text()


def test_of_the_embedded_model_with_own_data_all_is_private_and_with_its_own_local_paths(tmp_path, monkeypatch):
    demo = ["prune", "--data.num_samples=2", "--method=magnitude", "--evaluate=false", "--report=false"]
    assert main([*demo, f"--output={tmp_path / 'demo'}"]) == 0
    assert not (tmp_path / "demo.private").exists()
    # Made from it by other commands, which note where they found it.
    assert main(["pack", f"--model.path={tmp_path / 'demo'}", f"--output={tmp_path / 'packed'}"]) == 0
    steps = ["--trainer.max_steps=1", "--data.num_samples=4", "--evaluate=false", "--report=false"]
    assert main(["recover", f"--model.path={tmp_path / 'demo'}", *steps, f"--output={tmp_path / 'recovered'}"]) == 0
    for folder in ("demo", "packed", "recovered"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.suffix in (".json", ".yaml", ".md")]
        told = "\n".join(path.read_text() for path in files)
        assert not re.search(f"{tmp_path}|{CHECKPOINT}", told)
        assert not (tmp_path / f"{folder}.private").exists()
        assert "Local paths" in (tmp_path / folder / "README.md").read_text()
    assert main([*demo, f"--output={tmp_path / 'demo'}", "--resume=true"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["prune", f"--config={tmp_path / 'demo' / 'config.yaml'}"]) == 0  # and where it goes, its own name says
    assert (tmp_path / "runs" / "demo-magnitude-50" / "pruning.json").is_file()
    place = tmp_path / "patients-of-2026" / "own.json"
    place.parent.mkdir()
    place.write_text(
        json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}])
    )
    source = ["--data.source=LlavaJsonSource", f"--data.source.path={place}"]
    assert main([*demo, *source, "--data.num_samples=1", f"--output={tmp_path / 'mixed'}"]) == 0
    assert "patients" not in (tmp_path / "mixed" / "config.yaml").read_text()
    assert "patients" in (tmp_path / "mixed.private" / "config.yaml").read_text()
