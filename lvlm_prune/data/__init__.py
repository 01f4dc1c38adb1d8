"""Data of calibration and recovery: sources, the model's processor, batches."""

from lvlm_prune.data.batches import CalibrationBatch, collate, digest, fingerprint
from lvlm_prune.data.bucketing import BucketedLoader
from lvlm_prune.data.conversation import Conversation, Document
from lvlm_prune.data.datamodule import CalibrationDataModule
from lvlm_prune.data.embedded import EmbeddedQuestions, EmbeddedSource
from lvlm_prune.data.hf_dataset import HFDatasetSource
from lvlm_prune.data.llava_json import LlavaJsonSource
from lvlm_prune.data.mixture import MixtureSource
from lvlm_prune.data.processing import encode, load_processor
from lvlm_prune.data.recovery import RecoveryDataModule
from lvlm_prune.data.source import CalibrationSource
from lvlm_prune.data.tensors import TensorSource
from lvlm_prune.data.text import TextSource

__all__ = [
    "BucketedLoader",
    "CalibrationBatch",
    "CalibrationDataModule",
    "CalibrationSource",
    "Conversation",
    "Document",
    "EmbeddedQuestions",
    "EmbeddedSource",
    "HFDatasetSource",
    "LlavaJsonSource",
    "MixtureSource",
    "RecoveryDataModule",
    "TensorSource",
    "TextSource",
    "collate",
    "digest",
    "encode",
    "fingerprint",
    "load_processor",
]
