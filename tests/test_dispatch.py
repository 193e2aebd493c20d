"""Which backend runs: the default, a forced one, in threads, tasks and backward; and what explain and doctor say of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from typer.testing import CliRunner

import alexnet_kernels as ak
from alexnet_kernels import dispatch, doctor
from alexnet_kernels import functional as F
from alexnet_kernels.cli.main import app

X = torch.linspace(-3, 3, 2 * 16 * 3 * 3).reshape(2, 16, 3, 3)
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on only where there is no GPU")

CALLS = {
    "local_response_norm": (lambda: (X, 5), {}),
    "spatial_response_norm": (lambda: (X, 3), {}),
    "conv2d_relu": (lambda: (X, torch.randn(4, 16, 3, 3)), {"padding": 1}),
    "linear_relu": (lambda: (X, torch.randn(4, 3)), {}),
    "max_pool2d": (lambda: (X, 2), {}),
    "lrn_max_pool2d": (lambda: (X, 5), {"groups": 2}),
    "max_pool2d_lrn": (lambda: (X, 5), {"alpha_mode": "sum"}),
}


def test_reference_runs_on_a_cpu() -> None:
    with dispatch.recording() as used:
        F.local_response_norm(X, 5)
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
        assert said.backend == "reference"
        assert set(said.why_not) == set(dispatch.BACKENDS) - {"reference"}
        assert all(said.why_not.values())
    assert json.loads(json.dumps(said.to_json()))["backend"] == "reference"
    assert "runs on reference" in str(said)


def test_explain_reasons() -> None:
    assert "interpreter" in ak.explain("local_response_norm", X, 5).why_not["triton"] or torch.cuda.is_available()
    assert "torch.float64" in ak.explain("local_response_norm", X.double(), 5).why_not["triton"]
    assert "'meta'" in ak.explain("local_response_norm", X.to("meta"), 5).why_not["triton"]
    assert "torch.int64" in ak.explain("local_response_norm", X.long(), 5).why_not["triton"]
    with ak.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run"):
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


def test_doctor_tries_every_backend() -> None:
    found = doctor.diagnose()
    checks = {(c.backend, c.device): c for c in found.backends}
    assert checks["reference", "cpu"].works
    assert not checks["cuda", "cpu"].works
    assert "no implementation" in checks["cuda", "cpu"].detail
    assert all(c.works for c in found.backends if c.backend == "triton" and c.device.startswith("cuda"))
    assert found.packages["torch"] == torch.__version__.split("+")[0] or found.packages["torch"] == torch.__version__


def test_doctor_survives_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("libsomething.so: undefined symbol\nand more")

    monkeypatch.setattr(F, "local_response_norm", broken)
    checks = doctor.diagnose().backends
    assert {(c.works, c.detail) for c in checks} == {(False, "libsomething.so: undefined symbol")}


def test_doctor_command() -> None:
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == 0
    assert "reference" in table.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["schema"] == 1
    assert found["version"] == ak.__version__
    assert {c["backend"] for c in found["backends"]} == set(dispatch.BACKENDS)
