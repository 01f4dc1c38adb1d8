"""The documented command, shortened: it runs and writes a checkpoint that loads."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_prune.demo.making import train
from lvlm_prune.evaluation.answers import answer
from lvlm_prune.evaluation.embedded import EmbeddedBenchmark

CONFIG = Path(__file__).parents[3] / "configs" / "demo" / "train.yaml"


@pytest.fixture
def shortened(tmp_path, monkeypatch):
    config = yaml.safe_load(CONFIG.read_text())
    config["output"], config["threads"] = str(tmp_path / "checkpoint"), 1
    config["model"] |= {"tower_steps": 2, "warmup_steps": 2}
    config["model"] |= {"hidden_size": 48, "intermediate_size": 96, "blocks": 2, "tower_blocks": 1, "heads": 2}
    config["data"] |= {"image_rows": 2, "text_rows": 1, "validation_batches": 1, "workers": 0}
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "default_root_dir": str(tmp_path), "callbacks": []}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning sets them; they must not outlive the test
        monkeypatch.setenv(variable, "0")
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.filterwarnings("ignore")
def test_command_writes_a_checkpoint_that_loads_and_repeats(shortened, tmp_path):
    threads = torch.get_num_threads()
    weights = []
    for _ in range(2):
        train.main(["--config", str(shortened)])
        processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        weights.append(model.state_dict())
    torch.set_num_threads(threads)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(answer(model, processor, EmbeddedBenchmark(num_images=1, num_text=2).questions)) > 2
    log = (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    assert "accuracy/relation" in log


def test_only_image_tokens_longer_than_word_embeddings_cost():
    training = train.EmbeddedModelTraining(hidden_size=32, intermediate_size=32, blocks=1, tower_blocks=1, heads=1)
    length = training.model.get_input_embeddings().weight.detach().square().mean().sqrt()
    tokens = torch.ones(1, 2, 32) * length
    assert training.scale_loss(tokens / 2) == 0
    excess = training.scale_loss(tokens * torch.tensor([[[1.0], [torch.e]]]))
    torch.testing.assert_close(excess, torch.tensor(0.5), rtol=1e-4, atol=1e-4)
