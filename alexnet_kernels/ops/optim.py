"""The optimiser's step, over lists of tensors and in place: no schema of ``torch.library``, for nothing differentiates it.

A compiler that meets it stops there and calls it as it is, as its tensors are found by their addresses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torchs_sgd

from .. import dispatch, reference
from ._library import _ORDINARY, triton_why_not

_CPU_DTYPES = (torch.float32, torch.float64)


class Settings(NamedTuple):
    """What every parameter of a step shares; ``scaling`` is ``GradScaler``'s scale and its count of infinities."""

    lr: float | Tensor
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    scaling: tuple[Tensor, Tensor] | None


class Row(NamedTuple):
    """One parameter: ``master`` is ``weight`` itself unless that is a half type, ``buffer`` too where there is no momentum."""

    weight: Tensor
    grad: Tensor
    buffer: Tensor
    master: Tensor


def sgd(rows: list[Row], settings: Settings, tables: dict[Any, Any]) -> None:
    """One step of all ``rows``, those of one device and dtype together; ``tables`` is the caller's, to hold what is made once."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        weight, grad = row.weight, row.grad
        if not _same_order(grad, weight):
            row = row._replace(grad=torch.empty_like(weight, dtype=grad.dtype).copy_(grad))
        groups.setdefault((weight.device, weight.dtype, grad.dtype, _is_dense(weight)), []).append(row)
    for key, members in groups.items():
        here = settings
        if settings.scaling is not None:
            grad_scale, found_inf = (t.to(key[0], torch.float32, non_blocking=True) for t in settings.scaling)
            here = settings._replace(scaling=(grad_scale, found_inf))
        dispatch.run("sgd", members, here, tables, key)


sgd._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable would load torch._dynamo at import


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one shape have their elements in the same order; a dimension of 1 may have any stride."""
    return a.stride() == b.stride() or all(
        x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def _is_dense(x: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _columns(members: list[Row]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    weights, grads, buffers, masters = (list(column) for column in zip(*members, strict=True))
    return weights, grads, buffers, masters


def _why_by_elements(members: list[Row], key: Any) -> str | None:
    """Why a kernel that walks along memory cannot run: the tensors of a row do not lie in one order there."""
    if any(type(t) not in _ORDINARY for row in members for t in row):
        return "a tensor subclass (a DTensor of FSDP, say), whose elements lie elsewhere"
    if not key[-1]:
        return "a parameter is neither contiguous nor channels_last"
    if any(not _is_dense(t) or not _same_order(t, row.weight) for row in members for t in row[2:]):
        return "the momentum or the fp32 copy of a parameter has other strides than it"
    return None


def _triton_why_not(members: list[Row], settings: Settings, tables: dict[Any, Any], key: Any) -> str | None:
    why = _why_by_elements(members, key)
    if why is not None:
        return why
    if isinstance(settings.lr, Tensor) and settings.lr.device not in (torch.device("cpu"), members[0].weight.device):
        return f"lr is a tensor on {settings.lr.device}, the parameters are on {members[0].weight.device}"
    return triton_why_not(members[0].weight) or triton_why_not(members[0].grad)


def _triton(members: list[Row], settings: Settings, tables: dict[Any, Any], key: Any) -> None:
    from ..kernels import optim as kernel

    table, lr = tables.setdefault(key, kernel.Table()), settings.lr
    if isinstance(lr, Tensor) and lr.device != members[0].weight.device:
        settings = settings._replace(lr=float(lr))
    arguments: tuple[Any, ...] = settings
    kernel.sgd(table, *_columns(members), *arguments)
    _note_changes(members)


def _note_changes(members: list[Row]) -> None:
    """Autograd knows by its version that a tensor was written to, which neither step tells it."""
    changed = [row.weight for row in members] + [row.master for row in members] + [row.buffer for row in members]
    torch.autograd.graph.increment_version(changed)


def _cpu_why_not(members: list[Row], settings: Settings, tables: dict[Any, Any], key: Any) -> str | None:
    if key[0].type != "cpu":
        return f"no kernel for device {key[0].type!r}"
    if settings.scaling is not None:
        return "a gradient scale: torch's kernel would divide the gradients in place"
    odd = next((row for row in members if not row.master.dtype == row.buffer.dtype in _CPU_DTYPES), None)
    if odd is not None:
        return f"a weight in {odd.master.dtype} with its momentum in {odd.buffer.dtype}"
    return _why_by_elements(members, key)


def _cpu(members: list[Row], settings: Settings, *_: Any) -> None:
    """Torch's own fused step, on the fp32 weights of half parameters too."""
    weights, grads, buffers, masters = _columns(members)
    moving = settings.momentum != 0
    torchs_sgd(
        masters,
        [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)],
        [buffer if moving else None for buffer in buffers],
        fused=True,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        lr=float(settings.lr),
        dampening=0.0,
        nesterov=settings.nesterov,
        maximize=settings.maximize,
    )
    for weight, master in zip(weights, masters, strict=True):
        if weight is not master:
            weight.copy_(master)
    _note_changes(members)


def _reference(members: list[Row], settings: tuple[Any, ...], *_: Any) -> None:
    reference.sgd(*_columns(members), *settings)


# "triton" moves 20 bytes an element of a half parameter, torch's steps one after another 32 and more. Counted, not timed:
# bench/results/PENDING.md.
dispatch.register("sgd", "triton", _triton, _triton_why_not)
# "cpu": 11 ms for the paper's 61 M fp32 parameters, where _foreach functions and torch's default step take 84 and 80 (two EPYC
# cores, 2026-11-25).
dispatch.register("sgd", "cpu", _cpu, _cpu_why_not)
dispatch.register("sgd", "reference", _reference, dispatch.never)
