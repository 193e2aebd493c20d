"""Every kernel on small tensors, compared with the reference in fp64: what ``compute-sanitizer`` watches in ``make gpu``.

    python -m bench.small_cases [--seconds N] [--all-cores] [--only WORD]

Sanitizers are slow, so a map has 63 pixels; none fills its last block. It ends with the names of the kernels that ran: one of
a file's ``CONFIGS`` that did not is an error. With ``--all-cores`` the cases compile side by side, and Triton's cache on disk
has them for the next run. Without a GPU the interpreter runs the same cases. Exits 0, or 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from alexnet_kernels import _extension, reference
from alexnet_kernels.kernels import _launch, fused, lrn, pool

from .tune_cases import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (2, 32, 7, 9)
NORM = (5, 2e-2, 0.75, 2.0, 2)  # size, scale, beta, k, groups: the power is between 0.3 and 0.6
PLAIN, PADDED, DILATED = (3, 3, 2, 2, 0, 0, 1, 1), (3, 2, 1, 2, 1, 1, 1, 1), (2, 3, 2, 1, 1, 1, 2, 2)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
Found = Iterator[tuple[str, Tensor, Tensor]]  # what, as it is, as it should be


def _random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def _lrn(dtype: torch.dtype, layout: torch.memory_format, size: int) -> Found:
    x, grad = (_random(SHAPE, dtype, layout) for _ in range(2))
    norm = (size, *NORM[1:])
    yield "y", lrn.forward(x, *norm), reference.lrn(x.double(), *norm)
    yield "dx", lrn.backward(grad, x, *norm), reference.lrn_backward(grad.double(), x.double(), *norm)


def _pool(dtype: torch.dtype, layout: torch.memory_format, window: pool.Window, ceil_mode: bool) -> Found:
    x = _random(SHAPE, dtype, layout)
    y, place = pool.forward(x, window, ceil_mode, True)
    maxima, places = reference.max_pool2d_with_place(x.double(), window, ceil_mode)
    yield "y", y, maxima
    yield "place", place, places
    yield "y without place", pool.forward(x, window, ceil_mode, False)[0], maxima
    grad = _random(tuple(y.shape), dtype, layout)
    exact = reference.max_pool2d_backward(grad.double(), place, *x.shape[2:], window)
    yield "dx", pool.backward(grad, place, *x.shape[2:], window), exact


def _fused(
    dtype: torch.dtype,
    layout: torch.memory_format,
    first: bool,
    biased: bool,
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> Found:
    x = _random(SHAPE, dtype, layout)
    bias = _random(SHAPE[1:2], dtype, torch.contiguous_format) if biased else None
    a = reference.activation(x, bias, biased)  # rounded once by contract, so fp64 starts from it
    y, place = fused.forward(x, bias, biased, *NORM, PLAIN, False, first, True)
    yield "y", y, reference.lrn_pool(a.double(), None, False, *NORM, PLAIN, False, first)[0]
    yield "y without place", fused.forward(x, bias, biased, *NORM, PLAIN, False, first, False)[0], y.double()
    grad = _random(tuple(y.shape), dtype, layout)
    exact = reference.lrn_pool_backward(grad.double(), a.double(), None, place, biased, *NORM, PLAIN, first)
    found = backward(grad, x, bias, place, biased, *NORM, PLAIN, first, biased)
    yield "dx", found[0], exact[0]
    if biased:
        yield "dbias", found[1], exact[1]


def _compiled(*arguments: object) -> tuple[Tensor, Tensor]:
    return torch.ops.alexnet_kernels_cuda.lrn_pool_backward.default(*arguments)


def why_no_cuda() -> str | None:
    """Why the compiled CUDA kernels are not among the cases, or None."""
    return _extension.why_not("cuda") if DEVICE == "cuda" else "no CUDA device is visible"


def cases() -> dict[str, Callable[[], Found]]:
    """By name, the most important first."""
    found: dict[str, Callable[[], Found]] = {}
    for d, dtype in DTYPES.items():
        for at, layout in LAYOUTS.items():
            for biased in (True, False):
                name = f"{d} {at}{' bias relu' if biased else ''}"
                found[f"lrn then pool {name}"] = partial(_fused, dtype, layout, False, biased, fused.backward)
                found[f"pool then lrn {name}"] = partial(_fused, dtype, layout, True, biased, fused.backward)
                if at == "nhwc" and why_no_cuda() is None:
                    found[f"lrn then pool, CUDA gradient, {name}"] = partial(
                        _fused, dtype, layout, False, biased, _compiled
                    )
            for size in (5, 4):
                found[f"lrn size {size} {d} {at}"] = partial(_lrn, dtype, layout, size)
            for window, ceil_mode in ((PLAIN, True), (PADDED, False), (DILATED, False)):
                label = "-".join(map(str, window))
                found[f"pool {label} {d} {at}"] = partial(_pool, dtype, layout, window, ceil_mode)
    return found


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.double().norm())


def run(name: str) -> tuple[list[str], set[str]]:
    """What was wrong, and the names of the kernels that ran."""
    wrong, ran = [], set[str]()

    def noted(launch: _launch.Launch) -> None:
        ran.add(f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.name}")
        _launch.run(launch)

    for module in FAMILIES.values():
        module.run = noted  # every file has the one guarded launch under this name
    try:
        torch.manual_seed(0)
        for what, got, exact in cases()[name]():
            limit = 4 * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
            far = error(got, exact)
            print(f"{name}: {what}: relative error {far:.1e}")
            if not far <= limit:
                wrong.append(f"{name}: {what}: relative error {far:.1e} is over {limit:.1e}")
    except Exception as failure:
        wrong.append(f"{name}: {type(failure).__name__}: {failure}")
    finally:
        for module in FAMILIES.values():
            module.run = _launch.run
    return wrong, ran


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.small_cases", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after as many")
    parser.add_argument(
        "--all-cores", action="store_true", help="a process for each core: the cases compile in parallel"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="cases with WORD in their name")
    arguments = parser.parse_args(argv)
    names = [name for name in cases() if arguments.only in name]
    found: dict[str, tuple[list[str], set[str]]] = {}
    if arguments.all_cores:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as executor:
            found = dict(zip(names, executor.map(run, names), strict=True))
    else:
        begin = time.monotonic()
        for name in names:
            if time.monotonic() - begin <= arguments.seconds:
                found[name] = run(name)
    left_out = [name for name in names if name not in found]
    wrong = [line for lines, _ in found.values() for line in lines]
    ran = set().union(*(kernels for _, kernels in found.values()))
    if not left_out and not arguments.only:
        configured = {f"{family}.{name}" for family, module in FAMILIES.items() for name in module.CONFIGS}
        wrong += [f"{kernel} never ran" for kernel in sorted(configured - ran)]
    if why := why_no_cuda():
        print(f"the CUDA library was left out: {why}")
    print(f"{len(ran)} Triton kernels ran: {', '.join(sorted(ran))}")
    for name in left_out:
        print(f"no time for {name}")
    for line in wrong:
        print(f"WRONG {line}")
    print(f"{len(found)} of {len(names)} cases, {len(wrong)} errors")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
