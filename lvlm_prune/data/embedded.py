"""The embedded model's own calibration set."""

from __future__ import annotations

from typing import Any, ClassVar

from lvlm_prune.data.conversation import Conversation
from lvlm_prune.data.source import CalibrationSource


class EmbeddedSource(CalibrationSource):
    """Captions of generated pictures, which come with the embedded model and need no file."""

    default_num_samples: ClassVar[int | None] = 96

    def __init__(self) -> None:
        self._captions: Any = None

    def setup(self) -> None:
        if self._captions is None:
            # The pictures are drawn by code that a user of other sources never needs.
            from lvlm_prune.demo.datasets import CalibrationCaptions

            self._captions = CalibrationCaptions()

    def __len__(self) -> int:
        self.setup()
        return len(self._captions)

    def __getitem__(self, index: int) -> Conversation:
        self.setup()
        item = self._captions[index]
        return Conversation(item["messages"], item["images"], id=item["id"])
