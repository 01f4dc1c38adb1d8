"""Bad training data are found before training, whatever they come from."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lvlm_prune.data import (
    EmbeddedQuestions,
    LlavaJsonSource,
    MixtureSource,
    RecoveryDataModule,
    TensorSource,
    TextSource,
    load_processor,
)
from lvlm_prune.data.limits import ModelLimits
from lvlm_prune.demo import CHECKPOINT
from lvlm_prune.errors import InputError


@pytest.fixture(scope="module")
def processor():
    return load_processor(CHECKPOINT)


def llava(folder, *answers):
    """Conversations with these answers; None for one without."""
    turns = [[{"from": "human", "value": "Say it."}, {"from": "gpt", "value": answer}] for answer in answers]
    path = folder / "conversations.json"
    path.write_text(
        json.dumps(
            [{"id": f"c{n}", "conversations": t[: 1 + (t[1]["value"] is not None)]} for n, t in enumerate(turns)]
        )
    )
    return LlavaJsonSource(str(path))


def text(folder, *documents):
    (folder / "text.txt").write_text("\n\n".join(documents))
    return TextSource(str(folder / "text.txt"))


def tensors(folder, *answers):
    samples = {}
    for number, answer in enumerate(answers):
        samples[f"s{number}.input_ids"] = torch.arange(5, 5 + 8 * (1 + len(answer)))[None] % 90
        samples[f"s{number}.labels"] = torch.full_like(samples[f"s{number}.input_ids"], 7 if answer else -100)
    save_file(samples, folder / "tensors.safetensors")
    return TensorSource(str(folder / "tensors.safetensors"))


def without_a_question(folder):
    """Two conversations, of which the second begins with the answer."""
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "yes"}]
    records = [{"id": f"c{n}", "conversations": turns[n:] + turns[:2] * n} for n in range(2)]
    (folder / "conversations.json").write_text(json.dumps(records))
    return LlavaJsonSource(str(folder / "conversations.json"))


LONG = "red " * 400
CASES = {
    "conversation, no answer": (lambda f: llava(f, "yes", None), "c1: has no answer"),
    "conversation, no question": (without_a_question, "c1: has no question: it begins with an answer"),
    "conversation, long": (lambda f: llava(f, "yes", "no", LONG), "c2: has .* tokens, the model's context is 300"),
    "text, long": (lambda f: text(f, "red", LONG), "document 1: has .* tokens, the model's context is 300"),
    "text, one token": (lambda f: text(f, "red and blue", "."), "document 1: has no answer tokens"),
    "tensors, no answer": (lambda f: tensors(f, "a", ""), "sample 1: has no answer tokens"),
    "tensors, long": (lambda f: tensors(f, "a", LONG), "sample 1: has .* tokens"),
    "mixture": (
        lambda f: MixtureSource([llava(f, "yes", "no"), text(f, "red", LONG)], [1, 1]),
        "document 1: has .* tokens",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_that_cannot_be_learnt_from(case, processor, tmp_path):
    make, said = CASES[case]
    data = RecoveryDataModule(make(tmp_path), validation_samples=1)
    data.connect(processor, ModelLimits(context_length=300))
    data.setup("fit")
    with pytest.raises(InputError, match=f"--data.source .*{said}"):
        data.examine()


def test_processes_that_encode_find_the_same(processor, tmp_path):
    data = RecoveryDataModule(llava(tmp_path, "yes", LONG), num_workers=1, validation_samples=0)
    data.connect(processor, ModelLimits(context_length=300))
    data.setup("fit")
    with pytest.raises(InputError, match=r"c1: has .* tokens") as error:
        data.examine()
    assert "\n" not in str(error.value)


def test_what_is_found_in_good_data(processor):
    found = []
    for workers in (0, 2):
        data = RecoveryDataModule(EmbeddedQuestions(length=20), num_workers=workers)
        data.connect(processor, ModelLimits(context_length=400))
        data.setup("fit")
        found.append(data.examine())
    encoded = [data.encode(number) for number in range(20)]
    assert found[0] == found[1]
    assert found[0].tokens == sum(inputs["input_ids"].shape[1] for inputs in encoded)
    assert found[0].answers == sum(int((inputs["labels"] != -100).sum()) for inputs in encoded)
    assert found[0].longest <= 400


@pytest.mark.parametrize(("samples", "validated"), [(19, 0), (20, 4), (79, 4), (100, 5), (2560, 128), (9000, 128)])
def test_some_samples_are_kept_for_validation_where_there_are_enough(samples, validated, tmp_path):
    data = RecoveryDataModule(llava(tmp_path, *["yes"] * samples))
    data.setup()
    assert len(data.validation_indices) == validated
    assert len(data.train_indices) == samples - validated


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_asks_for_is_not_dealt_out(rank, processor):
    """Training samples are; a single one, asked for on its own, would be on no process."""
    data = RecoveryDataModule(EmbeddedQuestions(length=20), validation_samples=0)
    data.connect(processor, ModelLimits(context_length=400))
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)

    def numbers(loader):
        return sorted(int(n) for batch in loader for group in batch for n in group["sample_number"])

    assert len(numbers(data.train_dataloader())) == 10
    assert numbers(data.batches([3, 5, 8])) == [3, 5, 8]
