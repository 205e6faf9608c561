"""Bytes from outside: whatever a model file holds, reading it gives a model or one `ModelError`."""
