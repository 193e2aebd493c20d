"""Compiled handles with a stand-in for Triton's function: what is launched, and when Triton's own way is taken. Needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from alexnet_kernels.kernels import _launch


class Handle:
    """What a launch by Triton returns."""

    function, packed_metadata = "function", (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.calls.append(args)


class Function:
    """Enough of a ``triton.JITFunction``."""

    arg_names = ("x", "count", "BLOCK", "RELU")

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.handles: list[Handle] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> Handle:
            self.handles.append(Handle())
            return self.handles[-1]

        return launch


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Function:
    class Active:
        get_current_stream = staticmethod(lambda device: 7)

    class Driver:
        active = Active

    monkeypatch.setattr(_launch, "HANDLES", True)
    monkeypatch.setattr(_launch, "_handles", {})
    monkeypatch.setattr(_launch.triton, "JITFunction", Function)
    monkeypatch.setattr(_launch.triton.runtime, "driver", Driver)
    return Function()


def launch(function: Function, x: Tensor, count: int = 33, **constants: Any) -> _launch.Launch:
    return _launch.Launch(function, (5,), (x, count), {"RELU": True, "BLOCK": 64} | constants, 4, 1)


def test_the_second_launch_takes_the_first_ones_handle(function: Function) -> None:
    x, y = torch.empty(16), torch.empty(16)
    for tensor, count in ((x, 33), (y, 35), (x, 37)):
        _launch.run(launch(function, tensor, count))
    (handle,) = function.handles
    begin = (5, 1, 1, 7, "function", (4, 1, 0), None, None, None)
    assert [call[:9] for call in handle.calls] == [begin, begin]
    assert [call[9:] for call in handle.calls] == [(y, 35, 64, True), (x, 37, 64, True)]  # in the order of the names


def test_whatever_is_compiled_differently_has_another_key(function: Function) -> None:
    x = torch.zeros(17)
    kinds = [
        launch(function, x),
        launch(function, x[1:]),  # 4 bytes off
        launch(function, x.half()),
        launch(function, x.to("meta")),
        launch(function, x, 1),
        launch(function, x, 32),
        launch(function, x, 2**31 + 1),
        launch(function, x, 2**31),
        launch(function, x, BLOCK=128),
        launch(function, x, RELU=False),
        launch(Function(), x),
    ]
    assert len({_launch.handle_key(kind) for kind in kinds}) == len(kinds)
    assert _launch.handle_key(launch(function, x, 35)) == _launch.handle_key(kinds[0])


def test_tritons_own_way_where_more_is_wanted(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    x, knobs = torch.empty(16), _launch.triton.knobs
    _launch.run(launch(function, x))
    function.pre_run_hooks.append(print)
    _launch.run(launch(function, x))
    function.pre_run_hooks.clear()
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    _launch.run(launch(function, x))
    monkeypatch.undo()
    monkeypatch.setattr(_launch, "HANDLES", False)  # not asked for, or another Triton
    _launch.run(launch(function, x))
    assert len(function.handles) == 4 and not any(handle.calls for handle in function.handles)


class Small:
    """A function on a GPU with room for ``room`` steps in flight."""

    def __init__(self, room: int) -> None:
        self.room, self.stages = room, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, num_stages: int, **__: Any) -> None:
            self.stages.append(num_stages)
            if num_stages > self.room:
                raise OutOfResources(num_stages * 40_000, 101_376, "shared memory")

        return launch

    @staticmethod
    def fn() -> None:
        """Its name is the kernel's."""


def test_fewer_steps_in_flight_where_shared_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out once for a kind of launch; another dtype is another kind."""
    monkeypatch.setattr(_launch, "_stages", {})
    function, x = Small(2), torch.zeros(4)
    launch = _launch.Launch(function, (1,), (x, 4), {"BLOCK": (64, 64)}, 4, 1, 4)
    _launch.run(launch)
    _launch.run(launch)
    assert function.stages == [4, 3, 2, 2]
    _launch.run(_launch.Launch(function, (1,), (x.half(), 4), {"BLOCK": (64, 64)}, 4, 1, 3))
    assert function.stages[4:] == [3, 2]


def test_a_step_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_stages", {})
    launch = _launch.Launch(Small(0), (1,), (torch.zeros(4),), {}, 4, 1, 2)
    message = "fn asks for 40000 of shared memory, the GPU has 101376; use backend 'auto'"
    with pytest.raises(RuntimeError, match=message):
        _launch.run(launch)
    assert _launch._stages == {}


@pytest.mark.gpu
def test_a_handle_computes_what_triton_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_kernels.kernels import lrn, pool

    monkeypatch.setattr(_launch, "HANDLES", True)
    monkeypatch.setattr(_launch, "_handles", {})
    window = (3, 3, 2, 2, 0, 0, 1, 1)
    for _ in range(3):
        x = torch.randn(2, 16, 13, 13, device="cuda")
        ours = pool.forward(lrn.forward(x, 5, 2e-5, 0.75, 2.0, 1), window, False, True)
        monkeypatch.setattr(_launch, "HANDLES", False)
        theirs = pool.forward(lrn.forward(x, 5, 2e-5, 0.75, 2.0, 1), window, False, True)
        monkeypatch.setattr(_launch, "HANDLES", True)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(_launch._handles) == 2
