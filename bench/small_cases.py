"""Every kernel on small tensors, compared with the reference in fp64: what ``compute-sanitizer`` watches in ``make gpu``.

    python -m bench.small_cases [--seconds N] [--all-cores] [--only WORD]

Sanitizers are slow, so a map has 63 pixels at most; none fills its last block. It ends with the names of the kernels that ran:
one of :func:`expected` that did not is an error. With ``--all-cores`` the cases compile side by side, and Triton's cache on
disk has them for the next run. Without a GPU the interpreter runs the same cases, but for the compiled CUDA kernels. Exits 0,
or 1.
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
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from alexnet_kernels import _extension, reference
from alexnet_kernels.kernels import _launch, activation, conv, conv_backward, fused, lrn, optim, pool
from alexnet_kernels.kernels.catalogue import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATION = torch.cuda.get_device_capability()[0] if DEVICE == "cuda" else 9  # the interpreter stands for an H100
SHAPE = (2, 32, 7, 9)
NORM = (5, 2e-2, 0.75, 2.0, 2)  # size, scale, beta, k, groups: the power is between 0.3 and 0.6
PLAIN, PADDED, DILATED = (3, 3, 2, 2, 0, 0, 1, 1), (3, 2, 1, 2, 1, 1, 1, 1), (2, 3, 2, 1, 1, 1, 2, 2)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
# In place of fp32's eps: of products by precision, as long sums of them have it, and of what has a power in it, which hardware
# approximates. The interpreter's are exact.
PRODUCTS = {"tf32": 2.0**-10, "tf32x3": 2.0**-18, "ieee": 2.0**-20}
POWER = 2.0**-20
# What: as it is, as it should be, and the eps that it may be off by where that is not its dtype's.
Found = Iterator[tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, float]]


def _random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def _power(dtype: torch.dtype) -> tuple[float, ...]:
    return (POWER,) if dtype == torch.float32 else ()


def _lrn(dtype: torch.dtype, layout: torch.memory_format, size: int) -> Found:
    x, grad = (_random(SHAPE, dtype, layout) for _ in range(2))
    norm = (size, *NORM[1:])
    yield "y", lrn.forward(x, *norm), reference.lrn(x.double(), *norm), *_power(dtype)
    right = reference.lrn_backward(grad.double(), x.double(), *norm)
    yield "dx", lrn.backward(grad, x, *norm), right, *_power(dtype)


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
    yield "y", y, reference.lrn_pool(a.double(), None, False, *NORM, PLAIN, False, first)[0], *_power(dtype)
    yield "y without place", fused.forward(x, bias, biased, *NORM, PLAIN, False, first, False)[0], y.double()
    grad = _random(tuple(y.shape), dtype, layout)
    exact = reference.lrn_pool_backward(grad.double(), a.double(), None, place, biased, *NORM, PLAIN, first)
    found = backward(grad, x, bias, place, biased, *NORM, PLAIN, first, biased)
    yield "dx", found[0], exact[0], *_power(dtype)
    if biased:
        yield "dbias", found[1], exact[1], *_power(dtype)


def _forms() -> tuple[str, ...]:
    """The forms of the convolution that this GPU can take: descriptors want a TMA unit, pixel pairs compile for sm_90 alone."""
    described = ("batch_tile", "group_major") if GENERATION >= 9 else ()
    return (*described, *(("pixel_pair",) if GENERATION == 9 else ()), "pointer_rows")


def _precision(dtype: torch.dtype, precision: str) -> tuple[float, ...]:
    return (PRODUCTS[precision],) if dtype == torch.float32 else ()


def _exact(*tensors: Tensor) -> list[Tensor]:
    """In fp64 on the CPU: a sanitizer is not to watch cuDNN."""
    return [t.double().cpu() for t in tensors]


def _conv(dtype: torch.dtype, layout: torch.memory_format, form: str | None, groups: int, precision: str) -> Found:
    """66 images are a whole tile of 64 and two more; ``form`` None: what is chosen, of 5 channels a group, by elements."""
    depth, images = (48, 66) if form else (5, 3)
    x = _random((images, groups * depth, 3, 4), dtype, layout)
    weight = _random((16 * groups, depth, 3, 3), dtype, torch.channels_last)
    bias, numbers = _random((16 * groups,), dtype, torch.contiguous_format), ((1, 1), (1, 1), (1, 1), groups)
    y = conv.forward(x, weight, bias, True, *numbers, precision, form)
    exact = reference.conv2d(*_exact(x, weight, bias), True, *numbers)
    yield "y", y, exact, *_precision(dtype, precision)


def _conv_backward(dtype: torch.dtype, layout: torch.memory_format, images: int, stride: int, precision: str) -> Found:
    """Many images go in tiles of them, few in rows of pixels; the activation below masks the input's gradient."""
    numbers = ((stride, stride), (1, 1), (1, 1), 2)
    x = _random((images, 32, 3, 4), dtype, layout).relu_()
    weight = _random((32, 16, 3, 3), dtype, torch.channels_last)
    shape = TF.conv2d(x.float(), weight.float(), None, *numbers).shape
    dy, eps = _random(tuple(shape), dtype, layout), _precision(dtype, precision)
    dx, dw, _ = reference.conv2d_backward(dy.double(), x.double(), weight.double(), None, *numbers, (True, True, False))
    masked = dx.masked_fill(x <= 0, 0)
    yield "dx", conv_backward.input_gradient(dy, weight, x.shape, *numbers, precision)[0], dx, *eps
    got, below = conv_backward.input_gradient(dy, weight, x.shape, *numbers, precision, x, True)
    yield "dx through ReLU", got, masked, *eps
    if below is not None:
        yield "its sums", below, masked.sum((0, 2, 3)), *eps
    yield "dw", conv_backward.weight_gradient(dy, x, weight.shape, *numbers, precision), dw, *eps


def _activation(dtype: torch.dtype, layout: torch.memory_format) -> Found:
    x, grad = (_random(SHAPE, dtype, layout) for _ in range(2))
    bias = _random(SHAPE[1:2], dtype, torch.contiguous_format)
    y = activation.bias_relu(x, bias, True)
    yield "y", y, reference.activation(x.double(), bias.double(), True)
    dz, db = activation.backward(grad, y, True)
    exact = grad.double().masked_fill(y <= 0, 0)
    yield "dz", dz, exact
    if db is not None:
        yield "db", db, exact.sum((0, 2, 3))


def _dropout(dtype: torch.dtype) -> Found:
    x, seed = _random((7, 129), dtype, torch.contiguous_format), torch.tensor([11], device=DEVICE)
    yield "y", activation.dropout(x, seed, 0.5), reference.dropout(x.double(), seed, 0.5)


def _optim(dtype: torch.dtype, nesterov: bool) -> Found:
    """Two steps on tensors of which one has more than a chunk; momentum and decay."""
    masters = [torch.randn(size, device=DEVICE) for size in (5000, 3, 129)]
    weights = masters if dtype == torch.float32 else [m.to(dtype) for m in masters]
    grads, buffers = [torch.randn_like(w) for w in weights], [torch.zeros_like(m) for m in masters]
    exact, table = [m.double() for m in masters], optim.Table()
    moving = [torch.zeros_like(m) for m in exact]
    for _ in range(2):
        optim.sgd(table, weights, grads, buffers, masters, 0.1, 0.9, 5e-4, nesterov, False, None)
        for w, g, b in zip(exact, grads, moving, strict=True):
            d = g.double() + 5e-4 * w
            b.mul_(0.9).add_(d)
            w.sub_(0.1 * (d + 0.9 * b if nesterov else b))
    for what, got, right in (("weights", weights, exact), ("masters", masters, exact), ("momenta", buffers, moving)):
        yield what, torch.cat(got), torch.cat(right)


def _lrn_pool_backward(*arguments: object) -> tuple[Tensor, Tensor]:
    return compiled().lrn_pool_backward.default(*arguments)


def compiled() -> Any:
    """The compiled CUDA operations."""
    return torch.ops.alexnet_kernels_cuda


def why_no_cuda() -> str | None:
    """Why the compiled CUDA kernels are not among the cases, or None."""
    return _extension.why_not("cuda") if DEVICE == "cuda" else "no CUDA device is visible"


def _picture(
    dtype: torch.dtype, layout: torch.memory_format, channels: int, pixels: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Images of 5 x 6 windows, uneven padding, weight, bias and how pixels are prepared: for a kernel, and in fp64."""
    shape = (2, 3, 26, 31)
    x = torch.randint(256, shape, device=DEVICE, dtype=torch.uint8) if pixels else _random(shape, dtype, layout)
    x = x.contiguous(memory_format=layout)
    weight = (torch.randn(channels, 3, 11, 11, device=DEVICE) * 0.07).to(dtype)
    bias = _random((channels,), dtype, torch.contiguous_format)
    numbers = [torch.tensor(v, device=DEVICE) for v in ((123.0, 117.0, 104.0), (0.017, 0.018, 0.017))] if pixels else []
    given = (x, weight, bias, *(numbers or (None, None)), [1, 2, 0, 1])
    image = reference.pixels(x, *numbers, dtype) if pixels else x  # rounded as the kernel does
    return given, (*_exact(image, weight, bias), None, None, given[-1])


def _conv1(dtype: torch.dtype, layout: torch.memory_format, channels: int, pixels: bool) -> Found:
    """The compiled first convolution and its gradients; they mask by the result where a ReLU made it."""
    given, exact = _picture(dtype, layout, channels, pixels)
    a, eps = compiled().conv1.default(*given, True), _precision(dtype, "tf32")
    yield "a", a, reference.conv1(*exact[:5], (4, 4), exact[5], True), *eps
    grad = _random(tuple(a.shape), dtype, torch.channels_last)
    x, weight, _, *rest = given
    mask = (not pixels, True, True)
    found = compiled().conv1_backward.default(grad, a, x, weight, *rest, mask)
    image, wide, _, *none, around = exact
    right = reference.conv1_backward(*_exact(grad, a), image, wide, *none, (4, 4), around, mask)
    for what, got, want, asked in zip(("dx", "dw", "db"), found, right, mask, strict=True):
        if asked:
            yield what, got, want, *eps


def _stem(dtype: torch.dtype, layout: torch.memory_format, channels: int, pixels: bool, first: bool) -> Found:
    """The compiled first block, with and without what backward needs; what follows the convolution is held to fp64 from the
    map that is kept."""
    given, exact = _picture(dtype, layout, channels, pixels)
    block = (True, *NORM, PLAIN, True, first)
    y, a, place = compiled().stem.default(*given, *block, True)
    yield "a", a, reference.conv1(*exact[:5], (4, 4), exact[5], True), *_precision(dtype, "tf32")
    right, places = reference.lrn_pool(*_exact(a), None, False, *NORM, PLAIN, True, first)
    yield "y", y, right, *_power(dtype)
    if first:  # in the other order fp64 does not know which of two numbers one rounding apart is the larger
        yield "place", place, places
    alone, *nothing = compiled().stem.default(*given, *block, False)
    yield "y alone", alone, y.double()
    yield "nothing kept", torch.tensor([t.numel() for t in nothing]), torch.zeros(2)


def cases() -> dict[str, Callable[[], Found]]:
    """By name; what comes first has each kernel once, for a sanitizer's time may end."""
    found: dict[str, Callable[[], Found]] = {}
    for d, dtype in DTYPES.items():
        for at, layout in LAYOUTS.items():
            if why_no_cuda() is None:
                found |= _cuda_cases(f"{d} {at}", dtype, layout)
            found |= _conv_cases(d, at)
            for biased in (True, False):
                name = f"{d} {at}{' bias relu' if biased else ''}"
                found[f"lrn then pool {name}"] = partial(_fused, dtype, layout, False, biased, fused.backward)
                found[f"pool then lrn {name}"] = partial(_fused, dtype, layout, True, biased, fused.backward)
                if at == "nhwc" and why_no_cuda() is None:
                    found[f"lrn then pool, CUDA gradient, {name}"] = partial(
                        _fused, dtype, layout, False, biased, _lrn_pool_backward
                    )
            for size in (5, 4):
                found[f"lrn size {size} {d} {at}"] = partial(_lrn, dtype, layout, size)
            for window, ceil_mode in ((PLAIN, True), (PADDED, False), (DILATED, False)):
                label = "-".join(map(str, window))
                found[f"pool {label} {d} {at}"] = partial(_pool, dtype, layout, window, ceil_mode)
            found[f"bias relu {d} {at}"] = partial(_activation, dtype, layout)
        found[f"dropout {d}"] = partial(_dropout, dtype)
        for nesterov in (False, True):
            found[f"sgd {d}{' nesterov' if nesterov else ''}"] = partial(_optim, dtype, nesterov)
    return found


def _conv_cases(d: str, at: str) -> dict[str, Callable[[], Found]]:
    """Every form forward, tiles and rows backward; in NCHW what is read as it lies."""
    layout, found = LAYOUTS[at], dict[str, Callable[[], Found]]()
    dtype = DTYPES[d]
    if DEVICE == "cpu" and d == "bf16":
        dtype = torch.float16  # Triton 3.6's interpreter multiplies the bits of bf16 as if they were integers
    for form in _forms() if at == "nhwc" else ():
        groups = 1 if form == "group_major" else 2
        found[f"conv {form} {d}"] = partial(_conv, dtype, layout, form, groups, "tf32")
    for precision in ("tf32",) if d == "bf16" else conv.PRECISIONS:
        found[f"conv by elements {d} {at} {precision}"] = partial(_conv, dtype, layout, None, 1, precision)
        for images, stride in ((64, 1), (3, 2)):
            name = f"conv gradients {d} {at} {precision} {images} images"
            found[name] = partial(_conv_backward, dtype, layout, images, stride, precision)
    return found


def _cuda_cases(name: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Callable[[], Found]]:
    """The compiled first convolution, block and gradients: each image, order and number of channels; fp32 with 48, which every
    GPU has shared memory for."""
    found: dict[str, Callable[[], Found]] = {}
    narrow = ((False, 48), (True, 48))
    for pixels, channels in narrow if dtype == torch.float32 else ((False, 96), (True, 96), (True, 64), (False, 48)):
        label = f"{name} {channels} channels{' uint8' if pixels else ''}"
        found[f"conv1 {label}"] = partial(_conv1, dtype, layout, channels, pixels)
        for first in (False, True):
            order = "pool then lrn" if first else "lrn then pool"
            found[f"stem {order} {label}"] = partial(_stem, dtype, layout, channels, pixels, first)
    return found


def expected() -> set[str]:
    """The Triton kernels that have to run: all that this GPU can take."""
    found = {f"conv.{form}" for form in _forms()} | {f"conv_backward.{name}" for name in ("input_rows", "weight_rows")}
    if GENERATION in (9, 10):  # tiles of images read operands from shared memory, by wgmma or its successor
        found |= {"conv_backward.input_tile", "conv_backward.weight_tile"}
    plain = {family: module for family, module in FAMILIES.items() if not family.startswith("conv")}
    found |= {f"{family}.{name}" for family, module in plain.items() for name in module.CONFIGS}
    return found | {"conv_backward.sum_shares"}


def error(got: Tensor, exact: Tensor) -> float:
    (exact,) = _exact(exact)
    return float((_exact(got)[0] - exact).norm() / (exact.norm() or 1))


def run(name: str) -> tuple[list[str], set[str]]:
    """What was wrong, and the names of the kernels that ran."""
    wrong, ran = [], set[str]()

    def noted(family: str, launch: _launch.Launch) -> None:
        name = "group_major" if launch.constants.get("MERGED") else launch.name
        ran.add(f"{family}.{name}")
        _launch.run(launch)

    for family, module in FAMILIES.items():
        module.run = partial(noted, family)  # every file has the one guarded launch under this name
    try:
        torch.manual_seed(0)
        for what, got, exact, *eps in cases()[name]():
            limit = 4 * max(torch.finfo(got.dtype).eps, *eps, 0.0) if got.is_floating_point() else 0.0
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
        wrong += [f"{kernel} never ran" for kernel in sorted(expected() - ran)]
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
