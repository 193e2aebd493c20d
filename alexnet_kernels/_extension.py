"""The compiled libraries: which of them can be used here, and why the others cannot."""

from __future__ import annotations


def why_not(name: str) -> str | None:
    """None where the library ``name`` (``"cpu"``, ``"cuda"``) is loaded, or one line that says why it is not."""
    return f"the compiled library _{name} is not built"
