"""Where there is a GPU, the kernels' tests run on it, so they count among those marked ``gpu`` (``make gpu`` runs no others).

They compile a kernel for every shape, so that most are ``slow`` there; in the interpreter they are not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        return
    for item in items:
        elsewhere = item.path.parent != Path(__file__).parent or item.path.name == "test_cross_compile.py"
        if not elsewhere and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.slow)
