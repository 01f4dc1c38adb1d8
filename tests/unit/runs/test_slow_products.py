"""Who waits for a processor that is slow in 16 bits learns how not to."""

import pytest
import torch

from lvlm_prune.cli import main
from lvlm_prune.runs import session
from tests.conftest import MODEL

LINE = "products of bfloat16 are slow on this processor: with --model.dtype float32"


@pytest.mark.parametrize(
    ("dtype", "fast", "is_said"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_a_slow_dtype_is_said(dtype, fast, is_said, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "multiplies", lambda asked: fast or asked == torch.float32)
    arguments = ["prune", f"--model.path={MODEL}", "--method=magnitude", f"--output={tmp_path / 'out'}"]
    arguments += ["--trainer.accelerator=cpu", "--evaluate=false", "--report=false", f"--model.dtype={dtype}"]
    assert main(arguments) == 0
    assert (LINE in capsys.readouterr().out) == is_said
