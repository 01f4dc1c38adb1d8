"""A text-only model is pruned like any other: a Llama from its folder, calibrated on token ids."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lvlm_prune
from lvlm_prune.callbacks import BlockwisePruning
from lvlm_prune.cli import main
from lvlm_prune.data import TensorSource
from lvlm_prune.methods.pools import MixedPool


@pytest.fixture
def llama(tmp_path):
    """A checkpoint folder, and a file of samples of different lengths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    samples = {f"s{number}.input_ids": torch.randint(3, 100, (1, 20 + 5 * number)) for number in range(4)}
    save_file(samples, tmp_path / "samples.safetensors")
    return model, tmp_path / "llama", tmp_path / "samples.safetensors"


@pytest.mark.parametrize("scorer", ["WandaScorer", "SparseGPTScorer"])
@pytest.mark.parametrize("pool", ["MixedPool", "AsymmetricPool"])
def test_a_llama_from_its_folder(llama, pool, scorer, tmp_path):
    _, folder, samples = llama
    arguments = [f"--model.path={folder}", "--data.source=TensorSource", f"--data.source.path={samples}"]
    method = [f"--pruning.pool={pool}", f"--pruning.scorer={scorer}", "--data.batch_size=2", "--report=false"]
    assert main(["prune", *arguments, *method, f"--output={tmp_path / 'out'}"]) == 0
    dense, pruned = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name, value in pruned.items():
        if name.endswith("_proj.weight"):
            assert (value == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        else:
            assert torch.equal(value, dense[name])
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


def test_its_first_block_is_pruned_as_wanda_says(llama):
    model, folder, samples = llama
    source = TensorSource(str(samples))
    source.setup()
    squares = 0
    layer = LlamaForCausalLM.from_pretrained(folder).eval().model.layers[0]
    with torch.no_grad():
        for number in range(len(source)):
            hidden = layer.input_layernorm(model.model.embed_tokens(source[number]["input_ids"]))
            squares += hidden[0].square().sum(0)
    score = layer.self_attn.q_proj.weight.abs() * squares.sqrt()
    lvlm_prune.prune(model, source, BlockwisePruning(sparsity=0.5, pool=MixedPool()))
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argsort(1)[:, :16], True)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight == 0, expected)
