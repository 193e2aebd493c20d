"""Which backend runs: the default, a forced one, in threads, tasks and backward; and what explain says of it."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

import alexnet_kernels as ak
from alexnet_kernels import _extension, dispatch
from alexnet_kernels import functional as F

LRN = (
    "reference" if _extension.why_not("cpu") else "cpu"
)  # what runs it, and pooling, on a CPU that is not told otherwise
X = torch.linspace(-3, 3, 2 * 16 * 3 * 3).reshape(2, 16, 3, 3)
W, CONV, NORM, POOL = torch.randn(4, 16, 3, 3), (1, 1, 1, 1), (5, 1e-4, 0.75, 1.0), (3, 2, 0, 1, False)
IMAGES, STEM = torch.rand(2, 3, 27, 27), torch.randn(48, 3, 11, 11)
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on only where there is no GPU")

CALLS = {
    "local_response_norm": (lambda: (X, 5), {}),
    "spatial_response_norm": (lambda: (X, 3), {}),
    "conv1": (lambda: (IMAGES, STEM), {"ceil_mode": True}),
    "conv1_relu": (lambda: (IMAGES.byte(), STEM), {"mean": (1, 2, 3), "scale": (1, 1, 1), "padding": 1}),
    "alexnet_stem": (lambda: (IMAGES, STEM), {"pool_first": True, "groups": 2}),
    "conv2d_relu": (lambda: (X, torch.randn(4, 16, 3, 3)), {"padding": 1}),
    "conv2d_relu_chain": (lambda: (X, [(W, None, CONV), (torch.randn(2, 4, 3, 3), None, CONV)]), {}),
    "linear_relu": (lambda: (X, torch.randn(4, 3)), {}),
    "linear_relu_dropout": (lambda: (X, torch.randn(4, 3)), {"p": 0.25}),
    "max_pool2d": (lambda: (X, 2), {}),
    "lrn_max_pool2d": (lambda: (X, 5), {"groups": 2}),
    "max_pool2d_lrn": (lambda: (X, 5), {"alpha_mode": "sum"}),
    "conv2d_relu_lrn_max_pool2d": (lambda: (X, W, None, CONV, NORM, POOL), {"groups": 2}),
    "conv2d_relu_max_pool2d_lrn": (lambda: (X, W, None, CONV, NORM, POOL), {"alpha_mode": "sum"}),
}


def test_what_runs_on_a_cpu() -> None:
    with dispatch.recording() as used:
        F.local_response_norm(X, 5)
    assert used == {LRN}
    with dispatch.recording() as used:
        F.local_response_norm(X.half(), 5)
    assert used == {"reference"}


@CPU_ONLY
def test_a_named_backend_runs_forward_and_backward() -> None:
    """Triton in the interpreter; the backward comes after the block and still runs where the forward ran."""
    x = X.clone().requires_grad_()
    with dispatch.recording() as used, ak.use_backend("triton"):
        y = F.local_response_norm(x, 5, 0.1)
    assert used == {"triton"}
    with dispatch.recording() as used:
        y.sum().backward()
    assert used == {"triton"}
    torch.testing.assert_close(y, F.local_response_norm(x, 5, 0.1))


@CPU_ONLY
def test_compiled_code_asks_when_it_runs() -> None:
    compiled = torch.compile(lambda x: F.local_response_norm(x, 5) * 2, fullgraph=True, backend="aot_eager")
    compiled(X)
    with dispatch.recording() as used, ak.use_backend("triton"):
        compiled(X)
    assert used == {"triton"}


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("backend", ["cuda", "cpu", "cudnn"])
def test_a_named_backend_that_cannot_is_an_error(name: str, backend: str) -> None:
    arguments, options = CALLS[name]
    if (backend, LRN) == ("cpu", "cpu") and name in (
        "local_response_norm",
        "max_pool2d",
        "lrn_max_pool2d",
        "max_pool2d_lrn",
    ):
        pytest.skip("the compiled library can")
    with ak.use_backend(backend), pytest.raises(RuntimeError, match=f"backend '{backend}'.*use backend 'auto'"):
        getattr(F, name)(*arguments(), **options)


def test_never_a_silent_fallback_for_what_only_torch_can() -> None:
    with ak.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"cannot run lrn: torch's own LRN runs for torch.int64"):
            F.local_response_norm(torch.ones(1, 4, 2, dtype=torch.int64), 3)
        with pytest.raises(RuntimeError, match="cannot run lrn: a function transform"):
            torch.vmap(lambda t: F.local_response_norm(t, 3))(X[None])
        with pytest.raises(RuntimeError, match=r"cannot run lrn: no kernel for torch.float64"):
            F.local_response_norm(X.double(), 3)


@CPU_ONLY
def test_double_backward_is_plain_torch_and_says_so() -> None:
    x = X.clone().requires_grad_()
    with ak.use_backend("triton"):
        y = F.local_response_norm(x, 5, 0.1)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward runs in plain torch"):
        dx.sum().backward()


def test_nesting_and_restoring() -> None:
    with ak.use_backend("triton"):
        with ak.use_backend("reference"):
            assert dispatch.requested() == "reference"
        with pytest.raises(ZeroDivisionError), ak.use_backend("auto"):
            _ = 1 / 0
        assert dispatch.requested() == "triton"
    assert dispatch.requested() == "auto"


def test_threads_and_tasks_have_their_own() -> None:
    seen: dict[str, str] = {}
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        with ak.use_backend(name):
            barrier.wait()
            seen[name] = dispatch.requested()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"triton": "triton", "reference": "reference"}

    async def task(name: str) -> str:
        with ak.use_backend(name):
            await asyncio.sleep(0)
            return dispatch.requested()

    async def both() -> list[str]:
        return await asyncio.gather(task("triton"), task("reference"))

    assert asyncio.run(both()) == ["triton", "reference"]


def test_triton_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image made to run and not to build has none: then torch's own operations run, and the reason says what is missing."""
    why = dispatch._unbuildable.__wrapped__
    monkeypatch.setattr(dispatch.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch.Path, "exists", lambda path: path.name == "Python.h")
    assert why() is None
    monkeypatch.setattr(dispatch.Path, "exists", lambda path: False)
    assert why().endswith("has none; install python3-dev")
    monkeypatch.setenv("CPATH", "/opt/include")
    assert why() is None
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    assert why().endswith("install gcc, or name one in CC")
    monkeypatch.setenv("CC", "/opt/cc")
    assert why() is None

    monkeypatch.setattr(dispatch, "_unbuildable", lambda: "there is no C compiler")
    monkeypatch.setattr(dispatch, "old_gpu", lambda index: None)
    with FakeTensorMode():
        x = torch.empty(1, 8, 4, 4, device="cuda")
        assert dispatch.triton_why_not(x, (torch.float32,)) == "there is no C compiler"


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="backend='fast' is not a backend; use 'auto', 'triton'"),
        ak.use_backend("fast"),
    ):
        pass


@pytest.mark.parametrize(("value", "status"), [("reference", 0), ("cudnn", 1), ("fast", 1)])
def test_environment_variable(value: str, status: int) -> None:
    code = "import torch, alexnet_kernels as ak; ak.functional.local_response_norm(torch.ones(1, 2, 3), 5)"
    environment = {**os.environ, dispatch.ENVIRONMENT_VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    if value == "fast":
        assert "ALEXNET_KERNELS_BACKEND='fast' is not a backend" in done.stderr


@pytest.mark.parametrize("name", list(CALLS))
def test_explain_names_what_runs_and_why_nothing_else(name: str) -> None:
    arguments, options = CALLS[name]
    for op in (name, getattr(F, name)):
        said = ak.explain(op, *arguments(), **options)
        used = {part.backend for part in said.parts or (said,)}
        assert used <= {LRN, "reference"}
        assert set(said.why_not) == set(dispatch.BACKENDS) - used
        assert all(said.why_not.values())
    assert json.loads(json.dumps(said.to_json()))["backend"] == said.backend
    assert f"runs on {said.backend}" in str(said)


def test_explain_reasons() -> None:
    assert "interpreter" in ak.explain("local_response_norm", X, 5).why_not["triton"] or torch.cuda.is_available()
    assert "torch.float64" in ak.explain("local_response_norm", X.double(), 5).why_not["triton"]
    assert "'meta'" in ak.explain("local_response_norm", X.to("meta"), 5).why_not["triton"]
    assert "torch.int64" in ak.explain("local_response_norm", X.long(), 5).why_not["triton"]
    assert "kernel area 289 > 256" in ak.explain("max_pool2d", torch.zeros(1, 1, 20, 20), 17).why_not["triton"]
    with ak.use_backend("cudnn"), pytest.raises(RuntimeError, match="no implementation of max_pool2d"):
        ak.explain("max_pool2d", X, 2)


def test_explain_raises_as_the_function_would() -> None:
    with pytest.raises(ValueError, match="groups=5 does not divide"):
        ak.explain(F.local_response_norm, X, 5, groups=5)
    with pytest.raises(TypeError, match="input must be a"):
        ak.explain("max_pool2d", 3, 2)
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        ak.explain("local_response_norm", X)
    with pytest.raises(ValueError, match="op='softmax' is not a function of"):
        ak.explain("softmax", X)


@pytest.mark.gpu
def test_triton_runs_on_a_gpu_and_says_so() -> None:
    x = X.cuda().requires_grad_()
    assert ak.explain("local_response_norm", x, 5).backend == "triton"
    with ak.use_backend("triton"):
        y = F.local_response_norm(x, 5)
    y.sum().backward()  # on autograd's own thread
    assert x.grad is not None


def test_explain_lrn_with_pooling() -> None:
    """One operation where a kernel for both can run; two in their order where none can, which both must allow."""
    with ak.use_backend("reference"):
        first, second = ak.explain("lrn_max_pool2d", X, 5).parts
        assert (first.op, second.op) == ("lrn", "max_pool2d")
        assert [part.op for part in ak.explain("max_pool2d_lrn", X, 5).parts] == ["max_pool2d", "lrn"]
        said = ak.explain("lrn_max_pool2d", X, 5)
    assert str(said).startswith("lrn_max_pool2d runs on reference, as 2 operations\n  lrn runs on reference\n")
    assert json.loads(json.dumps(said.to_json()))["parts"][1]["op"] == "max_pool2d"
    if LRN == "cpu":
        said = ak.explain("lrn_max_pool2d", X, 5)
        assert (said.backend, said.parts) == ("cpu", ())
    for name in ("lrn_max_pool2d", "max_pool2d_lrn"):
        for call in (lambda name=name: ak.explain(name, X, 5), lambda name=name: getattr(F, name)(X, 5)):
            with ak.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' has no implementation of lrn_pool"):
                call()


WRONG_SHAPES = [
    ("max_pool2d", (X, 9)),
    ("max_pool2d", (X, 3, 1, 2)),
    ("conv2d_relu", (X, torch.ones(4, 5, 3, 3))),
    ("linear_relu", (X, torch.ones(4, 5))),
    ("spatial_response_norm", (X, 4)),
    ("lrn_max_pool2d", (X, 5, 1e-4, 0.75, 1.0, 9)),
    ("max_pool2d_lrn", (X, 0)),
]


@pytest.mark.parametrize(("name", "arguments"), WRONG_SHAPES)
def test_explain_raises_torchs_errors_too(name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        getattr(F, name)(*arguments)
    with pytest.raises(raised.type):
        ak.explain(name, *arguments)


def test_explain_runs_nothing_and_takes_only_our_functions() -> None:
    with dispatch.recording() as used:
        for name, (arguments, options) in CALLS.items():
            ak.explain(name, *arguments(), **options)
    assert used == set()
    with pytest.raises(ValueError, match="op='max_pool2d' is not a function of"):
        ak.explain(torch.nn.functional.max_pool2d, X, 2)


def test_explain_says_why_only_plain_torch_can() -> None:
    said = []
    torch.vmap(lambda t: said.append(ak.explain("local_response_norm", t, 5)) or t)(X[None])
    said.append(ak.explain("local_response_norm", X[:0], 5))
    said.append(ak.explain("local_response_norm", X, 5, k=torch.tensor(2.0)))
    for explanation, reason in zip(
        said, ("function transform", "empty input", "alpha, beta or k is a tensor"), strict=True
    ):
        assert explanation.backend == "reference"
        assert reason in explanation.why_not["triton"]


def test_an_empty_input_runs_nothing_whatever_is_asked_for() -> None:
    with ak.use_backend("cuda"):
        assert F.local_response_norm(X[:0], 5).shape == (0, 16, 3, 3)


def test_a_compiled_backward_asks_when_it_runs() -> None:
    """Unlike eager code, where a backward runs as its forward did: the graph of the backward was made before."""
    compiled = torch.compile(lambda x: F.local_response_norm(x, 5), fullgraph=True, backend="aot_eager")
    y = compiled(X.clone().requires_grad_())
    with ak.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' has no implementation of lrn_backward"):
        y.sum().backward()


def test_compiled_plain_operations_do_not_ask() -> None:
    """They are torch's own in the graph: use_backend's docstring says so."""
    compiled = torch.compile(lambda x: F.linear_relu(x, W[0, 0]), fullgraph=True, backend="eager")
    with ak.use_backend("triton"):
        assert torch.equal(compiled(X), torch.nn.functional.linear(X, W[0, 0]).relu())


def test_a_backward_in_another_thread_and_task() -> None:
    x = X.clone().requires_grad_()
    with ak.use_backend("reference"):
        y = F.local_response_norm(x, 5)
    failed: list[BaseException] = []

    def backward() -> None:
        try:
            with ak.use_backend("cuda"):  # of no account: the forward ran on the reference
                y.sum().backward()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failed
    assert x.grad is not None


def test_a_thread_does_not_see_its_makers_block_once_restored() -> None:
    """Forced in one thread, automatic in another at the same time: real calls, not only the name."""
    used: dict[str, set[str]] = {}

    def work() -> None:
        with dispatch.recording() as seen:
            F.local_response_norm(X, 5)
        used["thread"] = seen

    with ak.use_backend("cuda"):
        thread = threading.Thread(target=contextvars.Context().run, args=(work,))
        thread.start()
        thread.join()
    assert used["thread"] == {LRN}


def test_recording_nests_and_sees_every_backend() -> None:
    with dispatch.recording() as outer:
        F.lrn_max_pool2d(X, 5)
        F.linear_relu(torch.ones(1, 2), torch.ones(3, 2))
        with dispatch.recording() as inner:
            pass
    assert outer == {LRN, "reference"}
    assert inner == set()
