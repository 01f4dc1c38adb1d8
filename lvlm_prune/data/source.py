"""The interface of a calibration source: where samples come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os.path import exists, isfile
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.selection import choose
from lvlm_prune.errors import RunError, shortened, why_no_file
from lvlm_prune.plugins import plugin_class

Sample = Conversation | Document | dict[str, Tensor]
"""A conversation or a document for the model's processor, or ready-made model inputs."""


class CalibrationSource(ABC):
    """Numbered samples. Subclass it and name the subclass as `data.source`, in YAML or on the command line.

    The constructor only keeps its arguments: the command line builds sources to print a configuration, too. `setup`
    opens what the samples are read from, and `__getitem__` reads one of them. The sample of an index must not depend
    on anything else: not on the samples that were read before, nor on the process that reads it.

    Example:
        >>> class Colours(CalibrationSource):
        ...     '''One picture of each colour.'''
        ...
        ...     def __init__(self, colours: list[str]) -> None:
        ...         self.colours = colours
        ...
        ...     def __len__(self) -> int:
        ...         return len(self.colours)
        ...
        ...     def __getitem__(self, index: int) -> Conversation:
        ...         image = Image.new("RGB", (32, 32), self.colours[index])
        ...         content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
        ...         return Conversation([{"role": "user", "content": content}], [image], id=self.colours[index])
        >>> from PIL import Image
        >>> Colours(["red", "green"])[1].id
        'green'
    """

    default_num_samples: ClassVar[int | None] = 128
    """Samples to take when `data.num_samples` is not given: that many, or all if there are fewer; None: all."""

    needs_processor: ClassVar[bool] = True
    """False if the samples are ready-made model inputs, so that the model's folder needs no processor."""

    def setup(self) -> None:  # noqa: B027
        """Open and index what the samples are read from. May be called more than once.

        Raises:
            ValueError: An argument or the file behind it is wrong. The message begins with the argument in backticks,
                "`path` a.json: no such file", and whoever holds the source adds where it is mounted.
        """

    def verify(self, indices: Sequence[int]) -> None:  # noqa: B027
        """Find what is wrong with the chosen samples as far as that is possible without decoding them.

        Called before the model is loaded, and only if a bad sample is an error (`data.on_error: raise`).

        Raises:
            ValueError: For example, an image file is missing.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, known after `setup`."""

    @property
    def available(self) -> int:
        """The most samples that can be chosen."""
        return len(self)

    def choose(self, count: int, seed: int) -> list[int]:
        """Numbers of `count` samples; another seed takes others. Ascending, and all of them if there are no more."""
        return choose(count, len(self), seed)

    def sample_weights(self, indices: Sequence[int]) -> list[float]:
        """How much each of these samples counts in calibration statistics; their mean is 1.

        Args:
            indices: Samples that were read, of all processes together.

        Raises:
            RunError: What was read cannot be weighted as asked for.
        """
        return [1.0] * len(indices)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`.

        Raises:
            RunError: This one sample is broken; the message names it. With `data.on_error: skip` it is left out.
                Any other exception ends the run with its traceback.
        """


def sample_of(source: CalibrationSource, index: int) -> Sample:
    """Sample number `index` of a source.

    Raises:
        RunError: It is broken, or is none.
    """
    sample = source[index]
    if not isinstance(sample, (Conversation, Document, Mapping)):
        problem = f"{plugin_class(source).__name__} gives {type(sample).__name__}"
        raise RunError(f"{problem}, expected a Conversation, a Document or model inputs")
    return sample


class SampleError(RunError):
    """A record that is no sample.

    Args:
        problem: What is wrong with it.
        id: Its name in the source; empty where it has none.
    """

    def __init__(self, problem: str, id: str = "") -> None:
        super().__init__(problem)
        self.id = id


def name_of(sample: object, index: int) -> str:
    """What a sample, or the error that it is none, is called in a message: by its own name, else by its number.

    Example:
        >>> name_of(SampleError("no text", "q-7"), 3), name_of(RunError("no text"), 3)
        ('sample q-7', 'sample 3')
    """
    return f"sample {shortened(getattr(sample, 'id', ''), 200) or index}"


def verify_files(
    source: CalibrationSource, indices: Sequence[int], path: str, image_folder: str | None = None, hint: str = ""
) -> None:
    """Read the chosen conversations and see that their images, videos and sounds exist; none is decoded.

    Args:
        source: Where they come from.
        indices: Their numbers.
        path: The source's argument `path`, at fault where a record is no sample.
        image_folder: Its argument of this name, at fault where files are missing. Default: `path` is.
        hint: What a line about missing files ends with.

    Raises:
        ValueError: A sample is malformed or files are missing; it names the argument.
    """
    missing = []
    for index in indices:
        try:
            sample = source[index]
        except RunError as error:
            raise ValueError(f"`path` {path}: {name_of(error, index)}: {error}") from None
        if isinstance(sample, Conversation):
            files = [("image", image) for image in sample.images if isinstance(image, Path)]
            files += [("video", video) for video in sample.videos] + [("audio", audio) for audio in sample.audios]
            missing += [(sample.id, kind, file) for kind, file in files if not isfile(file)]
    if missing:
        name, kind, file = missing[0]
        what = why_no_file(file) if exists(file) else "is missing"
        problem = f"{kind} file {shortened(file, 200)} of sample {shortened(name, 200)} {what}"
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        at_fault = f"`path` {path}" if image_folder is None else f"`image_folder` {image_folder}"
        raise ValueError(f"{at_fault}: {problem}{others}{hint}")
