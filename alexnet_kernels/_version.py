"""The one place of the version; a literal, so that building the package imports nothing."""

__version__ = "0.1.0"
