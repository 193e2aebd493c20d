"""``alexnet-kernels doctor``: it tries everything, survives everything, and its JSON stands alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import alexnet_kernels as ak
from alexnet_kernels import _extension, dispatch, doctor
from alexnet_kernels import functional as F
from alexnet_kernels.cli.main import app


def test_doctor_tries_every_backend() -> None:
    found = doctor.diagnose()
    checks = {(c.backend, c.device): c for c in found.backends}
    assert checks["reference", "cpu"].works
    assert not checks["cuda", "cpu"].works
    for backend in ("cuda", "cudnn"):
        assert "no kernel for device 'cpu'" in checks[backend, "cpu"].detail  # and not: "no implementation"
    assert all(c.works for c in found.backends if c.backend == "cudnn" and c.device.startswith("cuda"))
    assert all(c.works for c in found.backends if c.backend == "triton" and c.device.startswith("cuda"))
    assert checks["triton", "cpu"].works == (os.environ.get("TRITON_INTERPRET") == "1")
    assert found.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert checks["cpu", "cpu"].works == (_extension.why_not("cpu") is None)
    assert found.library.startswith("cpu: loaded (" if checks["cpu", "cpu"].works else "cpu: the compiled library")
    assert "; cuda: " in found.library
    assert len(found.gpus) == torch.cuda.device_count()
    assert found.problems == ()


def test_a_diagnosis_is_data() -> None:
    found = doctor.diagnose()
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found
    assert "Diagnosis(version=" in repr(found)
    assert json.loads(json.dumps(found.to_json()))["rebuild"].startswith("pip install --no-build-isolation -e")


def test_doctor_survives_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("libsomething.so: undefined symbol\nand more")

    for function in ("local_response_norm", "conv1_relu", "conv2d_relu"):
        monkeypatch.setattr(F, function, broken)
    found = doctor.diagnose()
    assert {(c.works, c.detail) for c in found.backends} == {(False, "libsomething.so: undefined symbol")}
    assert "reference on cpu: libsomething.so: undefined symbol" in found.problems


@pytest.mark.parametrize(
    ("backend", "problem", "ops"),
    [
        ("cuda", "conv1_relu", ("conv1", "conv1_backward")),
        ("cudnn", "conv2d_relu", ("conv2d", "conv2d_dgrad", "conv2d_wgrad")),
    ],
)
def test_a_backend_without_lrn_is_tried_by_what_it_has(
    backend: str, problem: str, ops: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the rows of the table run, here by the reference under their name."""
    for op in ops:
        (stand_in,) = [i for i in dispatch._table[op] if i.backend == "reference"]
        monkeypatch.setitem(dispatch._table, op, [dataclasses.replace(stand_in, backend=backend)])
    found = doctor.diagnose()
    (check,) = [c for c in found.backends if (c.backend, c.device) == (backend, "cpu")]
    assert (check.works, check.detail) == (True, f"{problem} forward and backward, 0.0e+00 from fp64")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
    (line,) = doctor.diagnose().problems
    assert f"{backend!r} has no LRN" in line and "unset it" in line


def test_every_variable_that_changes_what_runs_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ALEXNET_KERNELS_CONV1": "wgmma", "ALEXNET_KERNELS_BUILD": "off", "OMP_NUM_THREADS": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = doctor.diagnose().variables
    assert values.items() <= found.items()
    assert "PATH" not in found


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_is_a_problem(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Only the gradient is wrong, and NaN is no small error."""
    right = F.local_response_norm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    monkeypatch.setattr(F, "local_response_norm", lambda x, *args, **kwargs: right(Wrong.apply(x), *args, **kwargs))
    found = doctor.diagnose()
    (check,) = [c for c in found.backends if (c.backend, c.device) == ("reference", "cpu")]
    assert not check.works
    assert check.detail.startswith("wrong: LRN forward and backward")
    assert any(p.startswith("reference on cpu is wrong") and "report it" in p for p in found.problems)


def test_doctor_survives_a_broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> None:
        raise RuntimeError("CUDA error: device lost\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    monkeypatch.setattr(torch.backends.cudnn, "version", lost.__get__(0))
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda:99"])
    found = doctor.diagnose()
    assert found.gpus == ({"device": "cuda:0", "error": "CUDA error: device lost"},)
    assert found.system["cudnn"] == "error: CUDA error: device lost"
    assert not any(c.works for c in found.backends if c.device == "cuda:99")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [("fast", "'fast' is not a backend; use 'auto'"), ("cudnn", "works on no device"), ("reference", None)],
)
def test_the_environment_variable_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, value: str, problem: str | None
) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    found = doctor.diagnose()
    assert found.variables[dispatch.ENVIRONMENT_VARIABLE] == value
    assert [problem in line for line in found.problems if problem] == ([True] if problem else [])
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == 0
    assert ("problem: ALEXNET_KERNELS_BACKEND" in table.output) == (problem is not None)


def test_without_nvml_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed (pip install" in doctor.diagnose().system["driver"]


def test_doctor_command() -> None:
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == 0
    assert "reference" in table.output
    assert "cpu: loaded" in table.output or "compiled library is not there" in table.output
    assert "[bench]" in table.output  # rich would take it for markup


def test_json_stands_alone_on_stdout() -> None:
    """In a process of its own: whatever else is said (warnings, drivers) goes to stderr."""
    done = subprocess.run([sys.executable, "-m", "alexnet_kernels", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["version"] == ak.__version__
    assert {c["backend"] for c in found["backends"]} == set(dispatch.BACKENDS)
    assert "Traceback" not in done.stderr
