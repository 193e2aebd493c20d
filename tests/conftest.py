"""What every test gets: the Triton interpreter where there is no GPU, and markers that skip with a printed reason."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before anything imports Triton; compiling happens in processes of its own
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m") or ""
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow") and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: --run-slow or -m slow runs it"))
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))
        if item.get_closest_marker("two_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA devices, {gpus} visible"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs on the CPU, and on a GPU where there is one."""
    return torch.device(request.param)
