"""Names of what stands in the folders that runs write."""

PRUNING_RECORD = "pruning.json"
RECOVERY_RECORD = "recovery.json"
PACKING_RECORD = "packing.json"
PROBE_RECORD = "probe.json"
EVALUATION_RECORD, EVALUATION_TABLE = "evaluation.json", "evaluation.md"
COMPARISON_RECORD, COMPARISON_TABLE = "compare.json", "compare.md"

MODEL_CARD = "README.md"
PAGE_NAME = "report.html"
FIGURE_FOLDER = "report"
LOG_FOLDER = "lightning_logs"
"""What Lightning's loggers write into a folder; it is of the run, not of the checkpoint."""

PICTURE_NAME = "calibration-image.png"
PICTURE_FIGURE = "tokens"
"""Name of the figure that shows it."""

PRIVATE_SUFFIX = ".private"
"""Of the folder beside an output, in which records and page are whole."""

STATISTICS_NAME = "statistics.safetensors"
EXAMPLE = "example"
"""With a block's number: key there of how much each visual token of one sample counts, uint8 in steps of 1/255."""

EVALUATION_FILES = EVALUATION_RECORD, EVALUATION_TABLE
RUN_FILES = (
    PRUNING_RECORD,
    RECOVERY_RECORD,
    PACKING_RECORD,
    *EVALUATION_FILES,
    "config.yaml",
    PAGE_NAME,
    FIGURE_FOLDER,
    STATISTICS_NAME,
    "adapter",
)
"""What runs leave in a folder about the checkpoint there; in a copy that is changed it would be told of the copy."""
