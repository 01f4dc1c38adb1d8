import pytest
import transformers
from torch import nn

from lvlm_prune.blocks import find_decoder, prunable_linears
from lvlm_prune.errors import InputError
from tests.families import FAMILIES, tiny_model

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
PERCEPTRON = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_language_blocks_and_their_names(family: str) -> None:
    model = tiny_model(family)
    decoder = find_decoder(model)
    assert len(decoder.layers) == 4
    assert [model.get_submodule(name) for name in decoder.names] == list(decoder.layers)
    assert model.get_submodule(decoder.name) is decoder.module
    # In transformers 4 routed experts are modules of their own.
    linears = {name for name in prunable_linears(decoder.layers[0]) if ".experts." not in name}
    assert linears == ATTENTION if family == "qwen3_omni_moe" else linears == ATTENTION | PERCEPTRON


def test_linears_of_a_cross_attention_block() -> None:
    linears = set(prunable_linears(find_decoder(tiny_model("mllama")).layers[1]))
    assert linears == {name.replace("self_attn", "cross_attn") for name in ATTENTION} | PERCEPTRON


def test_routers_are_not_prunable() -> None:
    class TopKRouter(nn.Linear):
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.ModuleDict({"projection": nn.Linear(4, 2)})
            self.indexer = nn.Linear(4, 2)
            self.choice = TopKRouter(4, 2)
            self.mlp = nn.ModuleDict({"shared_expert_gate": nn.Linear(4, 1), "gate_proj": nn.Linear(4, 8)})
            self.mixture = nn.Module()
            self.mixture.gate = nn.Linear(4, 2)
            self.mixture.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.attention = nn.ModuleDict({"gate": nn.Linear(4, 4)})

    assert set(prunable_linears(Block())) == {"mlp.gate_proj", "mixture.experts.0", "attention.gate"}


def test_a_model_without_decoder_blocks_is_refused() -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = transformers.CLIPVisionModel(config)
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="no list of 3 decoder blocks"):
        find_decoder(model)
    with pytest.raises(InputError, match="not a transformers model"):
        find_decoder(nn.Linear(2, 2))


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32)
    with pytest.raises(InputError, match="an encoder reads its prompt"):
        find_decoder(transformers.T5ForConditionalGeneration(config))
