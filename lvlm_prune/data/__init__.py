"""Calibration data: sources, the model's processor, batches."""

from lvlm_prune.data.batches import CalibrationBatch, collate, digest, fingerprint
from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.datamodule import CalibrationDataModule
from lvlm_prune.data.embedded import EmbeddedSource
from lvlm_prune.data.hf_dataset import HFDatasetSource
from lvlm_prune.data.llava_json import LlavaJsonSource
from lvlm_prune.data.processing import encode, load_processor
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.data.tensors import TensorSource
from lvlm_prune.data.text import TextSource

__all__ = [
    "CalibrationBatch",
    "CalibrationDataModule",
    "CalibrationSource",
    "Conversation",
    "Document",
    "EmbeddedSource",
    "HFDatasetSource",
    "LlavaJsonSource",
    "TensorSource",
    "TextSource",
    "collate",
    "digest",
    "encode",
    "fingerprint",
    "load_processor",
]
