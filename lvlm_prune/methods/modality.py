"""Codes of the modalities that a token can belong to."""

PADDING = -1
TEXT = 0
IMAGE = 1
VIDEO = 2
AUDIO = 3

MODALITIES = {"text": TEXT, "image": IMAGE, "video": VIDEO, "audio": AUDIO}
