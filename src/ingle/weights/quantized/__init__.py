"""Checkpoints whose matrices are stored as codes with scales: what their configurations say, and how they are read."""
