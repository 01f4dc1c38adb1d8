"""A mixture gives exact shares, whatever its parts are."""

import random

import pytest
import torch
from safetensors.torch import save_file

from lvlm_prune.cli import main
from lvlm_prune.data import CalibrationDataModule, MixtureSource
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.errors import InputError, RunError
from tests.conftest import GOLDEN, MODEL


class Numbers(CalibrationSource):
    """`count` samples of ready-made inputs that tell where they are from."""

    needs_processor = False

    def __init__(self, name: int, count: int):
        self.name, self.count = name, count
        self.verified = []

    def verify(self, indices):
        self.verified += indices

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([[self.name, index]])}


def parts(source, numbers):
    return [source.part_of(number) for number in numbers]


def test_the_mixture_of_mllm_pruner_is_forty_of_each():
    source = MixtureSource([Numbers(0, 1000), Numbers(1, 200), Numbers(2, 40)], [1, 1, 1])
    numbers = CalibrationDataModule(source, num_samples=120).select()
    assert [parts(source, numbers).count(part) for part in range(3)] == [40, 40, 40]
    assert len(set(numbers)) == 120


@pytest.mark.parametrize("seed", range(30))
def test_shares_are_exact_for_any_ratios(seed):
    generator = random.Random(seed)
    ratios = [generator.choice([1, 2, 5, 0.1, 0.2, 0.7, 1 / 3]) for _ in range(generator.randint(1, 5))]
    count = generator.randint(1, 200)
    shares = MixtureSource([Numbers(0, 1) for _ in ratios], ratios).shares(count)
    assert sum(shares) == count
    for share, ratio in zip(shares, ratios):
        assert abs(share - count * ratio / sum(ratios)) < 1
    whole = MixtureSource([Numbers(0, 1) for _ in ratios], ratios).shares(round(count * sum(ratios) * 30))
    if all(float(ratio).is_integer() for ratio in ratios):
        assert whole == [round(count * ratio * 30) for ratio in ratios]


def test_thirds_and_tenths_are_whole_where_they_should_be():
    tenths = MixtureSource([Numbers(0, 1)] * 3, [0.1, 0.2, 0.7])
    assert tenths.shares(30) == [3, 6, 21]
    assert MixtureSource([Numbers(0, 1)] * 3, [1, 1, 1]).shares(128) == [43, 43, 42]
    assert MixtureSource([Numbers(0, 1)] * 3, [32, 32, 64]).shares(128) == [32, 32, 64]


def test_each_part_chooses_as_on_its_own_and_any_beginning_is_mixed():
    one, other = Numbers(0, 500), Numbers(1, 300)
    source = MixtureSource([one, other], [3, 1])
    numbers = CalibrationDataModule(source, num_samples=40, seed=7).select()
    assert [number for number in numbers if number < 500] == CalibrationDataModule(one, 30, seed=7).select()
    assert [number - 500 for number in numbers if number >= 500] == CalibrationDataModule(other, 10, seed=7).select()
    for end in range(4, 41, 4):
        assert parts(source, numbers[:end]).count(1) == end // 4
    assert numbers != CalibrationDataModule(source, num_samples=40, seed=8).select()


def test_a_mixture_reads_and_verifies_each_sample_from_its_own_part():
    one, other = Numbers(7, 5), Numbers(8, 4)
    data = CalibrationDataModule(MixtureSource([one, other], [1, 1]), num_samples=6)
    data.setup()
    batches = list(data.calibration_batches())
    assert [batch.inputs["input_ids"][0, 0].item() for batch in batches] == [7, 8, 7, 8, 7, 8]
    read = {(row[0].item(), row[1].item()) for batch in batches for row in batch.inputs["input_ids"]}
    assert read == {(7, index) for index in one.verified} | {(8, index) for index in other.verified}
    assert len(one.verified) == len(other.verified) == 3


def test_without_a_number_as_many_as_the_scarcest_part_allows():
    source = MixtureSource([Numbers(0, 10**6), Numbers(1, 12)], [4, 1])
    assert source.available == 62  # of 62 the second part gives 12.4
    assert len(CalibrationDataModule(source).select()) == 62
    assert len(CalibrationDataModule(MixtureSource([Numbers(0, 999), Numbers(1, 999)], [1, 1])).select()) == 128


def test_conversations_beside_ready_made_inputs_need_the_processor():
    class Talk(Numbers):
        needs_processor = True

    assert MixtureSource([Numbers(0, 1), Talk(1, 1)], [1, 1]).needs_processor
    assert not MixtureSource([Numbers(0, 1), Numbers(1, 1)], [1, 1]).needs_processor


@pytest.mark.parametrize(
    ("sources", "ratios", "weights", "problem"),
    [
        ([], [], None, "`sources` []: needs at least one source"),
        ([Numbers(0, 1)], [1, 2], None, "`ratios` [1, 2]: 2 ratios for 1 sources; give one for each"),
        ([Numbers(0, 1)], [0], None, "`ratios` 0: must be a finite number larger than 0"),
        ([Numbers(0, 1)], [float("nan")], None, "`ratios` nan"),
        ([Numbers(0, 1)], [1], [], "`weights` []: 0 weights for 1 sources; give one for each"),
        ([Numbers(0, 1)], [1], [-0.5], "`weights` -0.5: must be a finite number larger than 0"),
        ([Numbers(0, 1)], [1], [float("inf")], "`weights` inf: must be a finite number larger than 0"),
    ],
)
def test_sources_ratios_and_weights_that_do_not_fit(sources, ratios, weights, problem):
    with pytest.raises(ValueError) as error:
        MixtureSource(sources, ratios, weights)
    assert str(error.value).startswith(problem)


def test_a_part_with_too_few_samples_is_named():
    data = CalibrationDataModule(MixtureSource([Numbers(0, 100), Numbers(1, 10)], [1, 1]), num_samples=40)
    with pytest.raises(
        InputError, match=r"data.num_samples 40: part 2 \(Numbers\) holds only 10 samples, its share is 20"
    ):
        data.setup()


def test_a_mixture_from_a_configuration_file(tmp_path, capsys):
    save_file(
        {"s0.input_ids": torch.arange(5, 20)[None], "s1.input_ids": torch.arange(9)}, tmp_path / "text.safetensors"
    )
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"""
model: {{path: {MODEL}}}
data:
  num_samples: 4
  source:
    class_path: lvlm_prune.data.MixtureSource
    init_args:
      ratios: [1, 3]
      sources:
      - class_path: lvlm_prune.data.TensorSource
        init_args: {{path: {tmp_path / "text.safetensors"}}}
      - class_path: lvlm_prune.data.TensorSource
        init_args: {{path: {GOLDEN / "calib.safetensors"}}}
"""
    )
    assert main(["prune", f"--config={config}", "--report=false", f"--output={tmp_path / 'out'}"]) == 0
    assert " 4 samples" in capsys.readouterr().out
    again = f"--config={tmp_path / 'out' / 'config.yaml'}"
    assert main(["prune", again, "--report=false", f"--output={tmp_path / 'again'}"]) == 0


def test_weights_count_a_part_as_much_as_they_say_whatever_its_share():
    source = MixtureSource([Numbers(0, 10), Numbers(1, 10)], [1, 3], weights=[2, 2])
    read = [0, 1, 10, 11, 12, 13, 14, 15]
    assert source.sample_weights(read) == [2.0, 2.0] + [pytest.approx(2 / 3)] * 6
    assert MixtureSource([Numbers(0, 10), Numbers(1, 10)], [1, 3]).sample_weights(read) == [1.0] * 8


def test_weights_of_a_mixture_in_a_mixture_multiply():
    inner = MixtureSource([Numbers(0, 4), Numbers(1, 4)], [1, 1], weights=[1, 3])
    weights = MixtureSource([inner, Numbers(2, 8)], [1, 1], weights=[1, 3]).sample_weights([0, 4, 8, 9])
    assert weights == pytest.approx([0.25, 0.75, 1.5, 1.5])


def test_a_part_that_has_a_weight_needs_samples():
    source = MixtureSource([Numbers(0, 100), Numbers(1, 100)], [9, 1], weights=[1, 1])
    with pytest.raises(ValueError, match=r"^`num_samples` 4: leaves no sample for part 2 \(Numbers\), which"):
        source.choose(4, seed=0)
    with pytest.raises(RunError, match=r"no sample of part 2 \(Numbers\) could be read, which has a weight"):
        source.sample_weights([0, 1, 2])
