"""The documentation is true: its code runs, its links lead somewhere, its examples end well."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def _code(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(example: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_quick_start_from_top_to_bottom() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    exec(compile(_code(ROOT / "docs" / "quickstart.md"), "quickstart.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_both_readmes_show_the_same() -> None:
    """The same commands, code, numbers and table rows: only the sentences differ."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    blocks = [re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for text in (english, chinese)]
    bare = [[re.sub(r"\s*#.*", "", block) for block in found] for found in blocks]
    assert bare[0] == bare[1]
    assert english.count("\n|") == chinese.count("\n|")
