from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvlm_prune.data import CalibrationDataModule, TensorSource, collate, digest
from lvlm_prune.errors import InputError


def sample(length: int, patches: int = 4, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        "input_ids": torch.randint(5, 50, (1, length), generator=generator),
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
        "pixel_values": torch.randn(patches, 12, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, patches // 2]]),
        **extra,
    }


def write(path: Path, samples: list[dict[str, torch.Tensor]]) -> str:
    tensors = {f"s{number}.{name}": t for number, inputs in enumerate(samples) for name, t in inputs.items()}
    save_file(tensors, path)
    return str(path)


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    # More than ten, so that s10 must not be read as the second sample.
    return write(tmp_path / "calib.safetensors", [sample(5 + number, 4 + 2 * (number % 2)) for number in range(12)])


def test_inputs_reach_the_model_as_they_are_in_file_order(calibration):
    data = CalibrationDataModule(TensorSource(calibration))
    data.setup()
    batches = list(data.calibration_batches())
    assert [batch.indices for batch in batches] == [[number] for number in range(12)]
    for number, batch in enumerate(batches):
        expected = sample(5 + number, 4 + 2 * (number % 2))
        assert set(batch.inputs) == set(expected)
        for name, tensor in expected.items():
            assert batch.inputs[name].dtype == tensor.dtype
            assert torch.equal(batch.inputs[name], tensor)


def test_batches_are_padded_on_the_right_and_patches_concatenated(calibration):
    data = CalibrationDataModule(TensorSource(calibration), batch_size=5)
    alone = [batch.inputs for batch in CalibrationDataModule(TensorSource(calibration)).calibration_batches()]
    for batch in data.calibration_batches():
        members = [alone[index] for index in batch.indices]
        longest = max(inputs["input_ids"].shape[1] for inputs in members)
        assert batch.inputs["input_ids"].shape == (len(members), longest)
        for row, inputs in enumerate(members):
            length = inputs["input_ids"].shape[1]
            assert torch.equal(batch.inputs["input_ids"][row, :length], inputs["input_ids"][0])
            assert batch.inputs["attention_mask"][row].sum() == length
            assert (batch.inputs["input_ids"][row, length:] == 0).all()
        assert torch.equal(batch.inputs["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in members]))
        assert batch.digests == [digest(inputs) for inputs in members]


def test_unbatched_tokens_get_the_batch_dimension(tmp_path: Path):
    inputs = {
        "input_ids": torch.arange(7, dtype=torch.int32),
        "mm_token_type_ids": torch.zeros(7, dtype=torch.int32),
        "pixel_values": torch.randn(3, 8, 8, dtype=torch.float16),
        "second_per_grid_ts": torch.tensor([0.5]),
    }
    source = TensorSource(write(tmp_path / "a.safetensors", [inputs]))
    found = source[0]
    assert found["input_ids"].dtype == torch.int64
    assert found["input_ids"].tolist() == [list(range(7))]
    assert found["mm_token_type_ids"].shape == (1, 7)
    assert found["mm_token_type_ids"].dtype == torch.int32
    assert found["pixel_values"].shape == (3, 8, 8)
    assert found["pixel_values"].dtype == torch.float16
    assert found["second_per_grid_ts"].shape == (1,)


def test_labels_are_for_recovery_not_for_calibration(tmp_path: Path):
    samples = [sample(5, labels=torch.full((1, 5), 3)), sample(6, labels=torch.full((1, 6), 3))]
    source = TensorSource(write(tmp_path / "a.safetensors", samples))
    assert "labels" in source[0]
    data = CalibrationDataModule(source, batch_size=2)
    (batch,) = data.calibration_batches()
    assert "labels" not in batch.inputs
    (batch,) = data.calibration_batches(with_labels=True)
    assert batch.inputs["labels"].tolist() == [[3] * 5 + [-100], [3] * 6]


def test_a_mask_appears_where_padding_does():
    short, long = {"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3, 4, 5]])}
    assert set(collate([short, short])) == {"input_ids"}
    assert collate([short, long])["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert collate([short, long], padding_side="left")["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_positions_of_several_axes_are_stacked_along_the_batch():
    samples = [
        {"input_ids": torch.ones(1, n, dtype=torch.int64), "position_ids": torch.arange(n).expand(3, 1, n)}
        for n in (2, 4)
    ]
    positions = collate(samples)["position_ids"]
    assert positions.shape == (3, 2, 4)
    assert positions[2].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


def test_patches_are_never_padded(tmp_path: Path):
    tiles = [sample(5) | {"pixel_values": torch.randn(1, count, 3)} for count in (2, 3, 2)]
    data = CalibrationDataModule(TensorSource(write(tmp_path / "a.safetensors", tiles)), batch_size=3)
    batches = list(data.calibration_batches())
    assert [(batch.indices, tuple(batch.inputs["pixel_values"].shape)) for batch in batches] == [
        ([0, 2], (2, 2, 3)),
        ([1], (1, 3, 3)),
    ]


ROW = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a safetensors file, or truncated"),
        (b"hello, this is not what you think it is", "not a safetensors file, or truncated"),
        ({}, "holds no samples"),
        ({"input_ids": ROW}, "key 'input_ids' is not of the form s0.input_ids, s1.input_ids, ..."),
        ({"s0.input_ids": ROW, "s01.input_ids": ROW}, "key 's01.input_ids' is not of the form"),
        ({"s0.input_ids": ROW, "s2.input_ids": ROW}, "holds 2 samples up to s2, but there is no s1"),
        ({"s0.pixel_values": ROW}, "sample s0 has no input_ids, only pixel_values"),
        ({"s0.input_ids": torch.ones(2, 4, dtype=torch.int64)}, "s0.input_ids has shape (2, 4), expected (1, T)"),
        ({"s0.input_ids": torch.ones(1, 0, dtype=torch.int64)}, "s0.input_ids has shape (1, 0)"),
        ({"s0.input_ids": torch.ones(1, 4)}, "s0.input_ids is F32, expected integers"),
        ({"s0.input_ids": ROW, "s0.attention_mask": ROW[:, :3]}, "s0.attention_mask has shape (1, 3), but input_ids"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content, message):
    path = tmp_path / "calib.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({key: tensor.clone() for key, tensor in content.items()}, path)
    with pytest.raises(InputError) as error:
        CalibrationDataModule(TensorSource(str(path))).setup()
    assert str(error.value).startswith(f"--data.source.path {path}: {message}")
    assert "\n" not in str(error.value)


def test_a_truncated_file(calibration):
    content = Path(calibration).read_bytes()
    Path(calibration).write_bytes(content[:-100])
    with pytest.raises(InputError, match="not a safetensors file, or truncated"):
        CalibrationDataModule(TensorSource(calibration)).setup()


def test_fewer_samples_than_asked_for(calibration):
    with pytest.raises(InputError, match=r"^--data.num_samples 13: the source holds only 12 samples$"):
        CalibrationDataModule(TensorSource(calibration), num_samples=13).setup()
