"""The divergence from what is kept of the dense model, and where it is kept."""

import pytest
import torch

from lvlm_prune.errors import InputError
from lvlm_prune.recovery import distillation
from lvlm_prune.recovery.distillation import Distillation, Teacher, divergence, largest


def two_models(positions=5, vocabulary=40):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(positions, vocabulary, generator=generator) for _ in range(2)]


def by_definition(p, q):
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [40, 1000])
def test_with_the_whole_vocabulary_it_is_the_exact_divergence(top_k, temperature):
    dense, recovered = two_models()
    p, q = (torch.softmax(logits.double() / temperature, dim=-1) for logits in (dense, recovered))
    found = divergence(recovered, *largest(dense, top_k, temperature), temperature)
    torch.testing.assert_close(found.double(), by_definition(p, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 7, 39])
def test_what_is_not_kept_counts_as_one_more_outcome(top_k):
    """Value and gradient against the definition in float64, and never more than the exact divergence."""
    dense, recovered = two_models()
    recovered.requires_grad_()
    p, q = (torch.softmax(logits.double() / 2, dim=-1) for logits in (dense, recovered))
    order = p.argsort(dim=-1, descending=True)
    (p, q), exact = (torch.gather(one, 1, order) for one in (p, q)), by_definition(p, q)
    p, q = (torch.cat([one[:, :top_k], one[:, top_k:].sum(1, keepdim=True)], dim=1) for one in (p, q))
    expected = by_definition(p, q)
    (expected_gradient,) = torch.autograd.grad(expected, recovered)
    found = divergence(recovered, *largest(dense, top_k, 2.0), 2.0)
    (gradient,) = torch.autograd.grad(found, recovered)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert found <= exact


def test_of_equally_likely_tokens_those_of_lowest_index_are_kept():
    """Logits in bfloat16 are often equal; `topk` takes any of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (50, 400), generator=generator).float()
    values, tokens = largest(logits, 40, 2.0)
    log_p = torch.log_softmax(logits / 2.0, dim=-1)
    expected = log_p.sort(dim=1, descending=True, stable=True).indices[:, :40]
    assert torch.equal(tokens.long(), expected)
    assert torch.equal(values[:, :40], log_p.gather(1, expected))


def test_no_divergence_from_itself():
    dense, _ = two_models()
    assert divergence(dense, *largest(dense, 8, 2.0), 2.0).abs() < 1e-5


def teacher(folder, samples=(4, 9, 2, 7, 5), **identity):
    return Teacher(folder, Distillation(weight=0.5, top_k=4), samples, {"dense": "a", "data": "b"} | identity)


def logits_of(samples):
    return {sample: torch.randn(sample, 12, generator=torch.Generator().manual_seed(sample)) for sample in samples}


def test_an_interrupted_pass_goes_on_and_another_model_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "SAMPLES_PER_PART", 2)
    asked = []

    def dies_in_the_second_part(samples):
        asked.extend(samples)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return logits_of(samples)

    with pytest.raises(KeyboardInterrupt):
        teacher(tmp_path / "t").write(dies_in_the_second_part, lambda count: None)
    first = teacher(tmp_path / "t")
    assert not first.complete
    again, progress = [], []
    first.write(lambda samples: again.extend(samples) or logits_of(samples), progress.append)
    assert again == [2, 7, 5]
    assert sum(progress) == 5
    assert first.complete
    dense, recovered = (torch.cat(list(part.values())) for part in (logits_of([7, 4]), logits_of([7, 4])))
    recovered = recovered.flip(1)
    expected = divergence(recovered, *largest(dense, 4, 2.0), 2.0)
    torch.testing.assert_close(first.divergence(recovered, [7, 4]), expected)
    other = teacher(tmp_path / "t", dense="another")
    assert not other.complete
    other.write(lambda samples: again.extend(samples) or logits_of(samples), progress.append)
    assert again[3:] == [4, 9, 2, 7, 5]


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path):
    kept = teacher(tmp_path / "t")
    assert kept.check_room(answers=1000, vocabulary=12) == 1000 * (4 * 8 + 4)
    with pytest.raises(InputError, match=r"top_k 4: needs 36000000\.0 TB for"):
        kept.check_room(answers=10**18, vocabulary=12)
    assert not (tmp_path / "t").exists()
