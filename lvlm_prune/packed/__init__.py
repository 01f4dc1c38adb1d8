"""Packed checkpoints: sparse weights stored without their zeros, and models that compute with them.

    sparse folder ──pack──► packed folder ──from_pretrained──► PackedLinear, packed experts
          ▲                      │
          └───────unpack─────────┘   byte for byte

`docs/packed_format.md` describes the files.
"""
