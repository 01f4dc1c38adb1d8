"""Ready-made model inputs from one safetensors file.

Example:
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> path = tempfile.mkdtemp() + "/calib.safetensors"
    >>> save_file({"s0.input_ids": torch.tensor([[5, 6, 7]]), "s1.input_ids": torch.tensor([8, 9])}, path)
    >>> source = TensorSource(path)
    >>> source.setup()
    >>> [sample["input_ids"].tolist() for sample in source]
    [[[5, 6, 7]], [[8, 9]]]
"""

from __future__ import annotations

import re
from os.path import isfile
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.errors import first_line, why_no_file

_KEY = re.compile(r"s(0|[1-9][0-9]*)\.(.+)")
_INTEGER_TYPES = {"I64", "I32", "I16", "I8", "U8"}


class TensorSource(CalibrationSource):
    """Model inputs as `model(**inputs)` takes them; the model's folder needs neither tokenizer nor processor.

    The keys are `s{j}.{input name}`, j = 0, 1, ...; each sample has `input_ids`, int64 of shape (1, T), and whatever
    else the model wants. `input_ids` may also be int32 and of shape (T,): then every entry of shape (T,) gets the batch
    dimension. Other entries keep shape and dtype. An entry `labels` is kept, and not shown to the model in calibration.

    Args:
        path: The safetensors file. Samples are read one at a time.
    """

    default_num_samples: ClassVar[int | None] = None
    needs_processor: ClassVar[bool] = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._names: list[list[str]] = []

    def setup(self) -> None:
        if self._names:
            return
        if not isfile(self.path):
            raise ValueError(f"`path` {self.path}: {why_no_file(self.path)}")
        try:
            with safe_open(self.path, framework="pt") as file:
                names = self._index(list(file.keys()))
                for number, inputs in enumerate(names):
                    self._check(file, number, inputs)
        except (SafetensorError, OSError) as error:
            problem = f"not a safetensors file, or truncated ({first_line(error)})"
            raise ValueError(f"`path` {self.path}: {problem}") from None
        self._names = names

    def _index(self, keys: list[str]) -> list[list[str]]:
        """Input names of each sample."""
        samples: dict[int, list[str]] = {}
        for key in sorted(keys):
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"`path` {self.path}: key {key!r} is not of the form s0.input_ids, s1.input_ids, ...")
            samples.setdefault(int(match[1]), []).append(match[2])
        if not samples:
            raise ValueError(f"`path` {self.path}: holds no samples")
        for number in range(len(samples)):
            if number not in samples:
                problem = f"holds {len(samples)} samples up to s{max(samples)}, but there is no s{number}"
                raise ValueError(f"`path` {self.path}: {problem}")
        return [samples[number] for number in range(len(samples))]

    def _check(self, file: safe_open, number: int, inputs: list[str]) -> None:
        """Shapes and dtypes are in the file's header, so that all samples can be checked before the run."""
        if "input_ids" not in inputs:
            raise ValueError(f"`path` {self.path}: sample s{number} has no input_ids, only {', '.join(inputs)}")
        token_ids = file.get_slice(f"s{number}.input_ids")
        shape = token_ids.get_shape()
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1) or shape[-1] == 0:
            problem = (
                f"s{number}.input_ids has shape {tuple(shape)}, expected (1, T) or (T,) with one sample per number"
            )
            raise ValueError(f"`path` {self.path}: {problem}")
        if token_ids.get_dtype() not in _INTEGER_TYPES:
            raise ValueError(f"`path` {self.path}: s{number}.input_ids is {token_ids.get_dtype()}, expected integers")
        if "attention_mask" in inputs:
            mask_shape = file.get_slice(f"s{number}.attention_mask").get_shape()
            if len(mask_shape) <= 2 and mask_shape[-1:] != shape[-1:]:
                problem = f"s{number}.attention_mask has shape {tuple(mask_shape)}, but input_ids {tuple(shape)}"
                raise ValueError(f"`path` {self.path}: {problem}")

    def __len__(self) -> int:
        self.setup()
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.setup()
        names = self._names[index]
        # Opened anew for each sample: an open file would not survive being sent to another process.
        with safe_open(self.path, framework="pt") as file:
            inputs = {name: file.get_tensor(f"s{index}.{name}") for name in names}
        token_ids = inputs["input_ids"]
        if token_ids.ndim == 1:
            inputs = {name: t[None] if t.shape == token_ids.shape else t for name, t in inputs.items()}
        inputs["input_ids"] = inputs["input_ids"].to(torch.int64)
        return inputs
