"""A run that ends while what is private is taken out of its folder."""

from pathlib import Path

import pytest

from lvlm_prune.cli import main
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
