"""The decoder of the reference numbers: 4 blocks, 4 heads, causal, layer norms, gated MLP, images at token -200."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from lvlm_prune.methods.allocation import Allocation
from lvlm_prune.methods.tokens import Tokens
from tests.conftest import REPOSITORY

TAMP = REPOSITORY / "tests" / "golden" / "tamp"
BLOCKS, HEADS, IMAGE_TOKEN = 4, 4, -200


class MiniNet:
    """The decoder with its samples, and what the released code found."""

    def __init__(self) -> None:
        tensors = load_file(TAMP / "mini_net.safetensors")
        self.numbers = json.loads((TAMP / "mini_net.json").read_text())
        self.weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
        self.samples = [(tensors[f"b{i}.input_ids"][0], tensors[f"b{i}.images"].float()) for i in range(4)]
        self.keys: list[str] = self.numbers["keys"]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {key: tuple(self.weights[key].shape) for key in self.keys}

    def by_linear(self, values: dict[str, float]) -> dict[str, float]:
        return {key: values[key.removesuffix(".weight")] for key in self.keys}

    def survey(self, allocation: Allocation, samples: list[int] | None = None) -> Allocation:
        """Show the allocation all samples, block by block, as the loop does."""
        chosen = [self.samples[index] for index in (range(4) if samples is None else samples)]
        hidden = [self._embed(ids, images) for ids, images in chosen]
        for index in range(BLOCKS):
            block = f"model.layers.{index}"
            for number, (ids, _) in enumerate(chosen):
                inputs, outputs, after = self._block(block, hidden[number])
                visual = ids == IMAGE_TOKEN
                tokens = Tokens(hidden[number], after, visual, outputs=outputs, block=index, sample=number)
                allocation.survey_sample(block, tokens, inputs)
                hidden[number] = after
            allocation.survey_block_end(block, self._linears(block), lambda values: values)
        findings = allocation.survey_end(lambda values: values)
        allocation.use_survey(json.loads(json.dumps(findings)))  # as it comes back from the manifest
        return allocation

    def _linears(self, block: str) -> dict[str, nn.Linear]:
        linears = {}
        for key in self.keys:
            if key.startswith(f"{block}."):
                linear = nn.Linear(*reversed(self.weights[key].shape), bias=False)
                linear.weight.data = self.weights[key]
                linears[key.removeprefix(f"{block}.").removesuffix(".weight")] = linear
        return linears

    def _embed(self, ids: Tensor, images: Tensor) -> Tensor:
        hidden = self.weights["model.embed_tokens.weight"][ids.clamp(min=0)].clone()
        hidden[ids == IMAGE_TOKEN] = images
        return hidden

    def _block(self, block: str, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def linear(name: str, value: Tensor) -> Tensor:
            inputs[name] = value
            outputs[name] = value @ self.weights[f"{block}.{name}.weight"].T
            return outputs[name]

        def norm(name: str, value: Tensor) -> Tensor:
            return layer_norm(
                value, (32,), self.weights[f"{block}.{name}.weight"], self.weights[f"{block}.{name}.bias"]
            )

        value = norm("n1", hidden)
        query, key, content = (
            linear(f"self_attn.{name}_proj", value).view(len(value), HEADS, -1).transpose(0, 1) for name in "qkv"
        )
        attended = scaled_dot_product_attention(query, key, content, is_causal=True)
        hidden = hidden + linear("self_attn.o_proj", attended.transpose(0, 1).reshape(len(value), -1))
        value = norm("n2", hidden)
        gated = silu(linear("mlp.gate_proj", value)) * linear("mlp.up_proj", value)
        return inputs, outputs, hidden + linear("mlp.down_proj", gated)


@pytest.fixture(scope="session")
def mini_net() -> MiniNet:
    with torch.no_grad():
        return MiniNet()
