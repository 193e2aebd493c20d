"""The main job: one network, three ways of running it, on the same photographs, checked and timed."""

from .run import Comparison, Row, compare

__all__ = ["Comparison", "Row", "compare"]
