"""``alexnet-kernels describe``: any variant as a table, as data, as a picture, and beside the notes that began it all."""

from __future__ import annotations

import json

from rich.console import Group, RenderableType

from . import notes as _notes
from .diagram import draw, draw_network
from .language import check
from .table import Description, describe, devices, layers

__all__ = ["Description", "describe", "draw", "draw_network", "report"]


def report(
    what: Description, *, notes: bool = False, as_json: bool = False, as_markdown: bool = False, lang: str = "en"
) -> str | RenderableType:
    """A description (or with ``notes`` the audit of the notes) as JSON or Markdown text, or as tables for a terminal."""
    check(lang)
    if as_json and as_markdown:
        raise ValueError("--json and --markdown are two formats of the same report: choose one")
    if as_json:
        return json.dumps(_notes.records(what, lang) if notes else what.as_dict(), indent=2, ensure_ascii=False)
    sheets = [_notes.sheet(what, lang)] if notes else [layers(what, lang), devices(what, lang)]
    if as_markdown:
        return "\n\n".join(sheet.markdown() for sheet in sheets)
    return Group(*(part for sheet in sheets for part in (sheet, "")))
