"""Fuzzing of what root reads; see README.md."""
