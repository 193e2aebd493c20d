"""Triton device code and its configurations; ``ops`` calls it, nothing else does."""
