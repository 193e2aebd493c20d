"""Optimisers with ``torch.optim``'s interface that update many tensors in one launch.

For parameters of a half type they hold the fp32 weight that torch users hold beside the optimiser (or have autocast form
again at each step), and round it into the parameter in the pass that updates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops import optim as _optim

__all__ = ["SGD"]

_HALF = (torch.float16, torch.bfloat16)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` with momentum, weight decay and Nesterov, as one kernel; parameters in fp32, fp16 or bf16.

    A half parameter has its weight (``state[p]["master"]``) and its momentum in fp32: the step is fp32's, and the parameter is
    its result, rounded. What somebody else writes into such a parameter, loading a checkpoint or clamping it, is seen at the
    next step: elements that are no longer the rounded master start from their new value, the others keep all their bits. Write
    under ``torch.no_grad()``: torch does not count what is written in place through ``p.data``, and the next step undoes it.
    On fp32 parameters state and numbers are those of ``torch.optim.SGD``, and the two load each other's ``state_dict``.

    On a CPU the step is torch's own fused one (``torch.optim.SGD(fused=True)``), several times as fast as torch's default. A
    CUDA graph may capture :meth:`step` after one call outside; ``lr`` has to be a tensor on the device to change between
    replays. With ``torch.amp.GradScaler`` the kernel divides by the scale.

    Args:
        params, lr, momentum, weight_decay, nesterov, maximize: as for ``torch.optim.SGD``.
        dampening: 0; for another value use ``torch.optim.SGD``.

    Raises:
        ValueError: an argument that ``torch.optim.SGD`` refuses, or ``dampening`` other than 0.

    >>> layer = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    >>> optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    >>> optimizer.step()
    >>> sorted((name, t.dtype) for name, t in optimizer.state[layer.bias].items())
    [('master', torch.float32), ('momentum_buffer', torch.float32)]
    """

    _step_supports_amp_scaling = (
        True  # GradScaler then sets grad_scale and found_inf instead of dividing in a pass of its own
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        self._forget()
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """What is no state, and is made when it is missing: each half parameter as its last step left it, address tables."""
        self._left: dict[Tensor, tuple[int, int]] = {}
        self._tables: dict[int, dict[Any, Any]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _require_no_dampening(param_group.get("dampening", self.defaults["dampening"]))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss again and its gradients, and its result is returned.

        Raises:
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for index, group in enumerate(self.param_groups):
            rows = [self._row(p, group) for p in group["params"] if p.grad is not None]
            scaling = None
            if found_inf is not None:
                scaling = (torch.ones_like(found_inf) if grad_scale is None else grad_scale, found_inf)
            names = ("lr", "momentum", "weight_decay", "nesterov", "maximize")
            settings = _optim.Settings(**{name: group[name] for name in names}, scaling=scaling)
            _optim.sgd(rows, settings, self._tables.setdefault(index, {}))
            self._left.update((row.weight, _stamp(row.weight)) for row in rows if row.master is not row.weight)
        return loss

    def _row(self, p: Tensor, group: Mapping[str, Any]) -> _optim.Row:
        """A parameter with its state, which is made at its first step: the momentum 0, the master its value."""
        grad = p.grad
        if grad is None or grad.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; use torch.optim.SGD, or sparse=False in "
                "the embedding it belongs to"
            )
        half, moving = p.dtype in _HALF, group["momentum"] != 0
        state = self.state[p] if half or moving else {}
        master = self._master(p, state) if half else p
        if not moving:
            return _optim.Row(p, grad, master, master)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return _optim.Row(p, grad, buffer, master)

    def _master(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The fp32 weight of a half parameter, with what was written into that since the last step."""
        if "master" not in state:
            state["master"] = p.detach().float()
        master: Tensor = state["master"]
        if self._left.get(p) != _stamp(p):
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
        return master

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but what is held in fp32 for half parameters stays so: torch would round it to their dtype.

        Tensors are copied. The ``state_dict`` of ``torch.optim.SGD`` fits; a master it lacks is made of the parameter.

        Raises:
            ValueError: a group with ``dampening`` other than 0, or whatever torch refuses.
        """
        for group in state_dict["param_groups"]:
            _require_no_dampening(group.get("dampening", 0))
        super().load_state_dict(state_dict)
        self._forget()
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for name, p in zip(names, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            work = torch.float32 if p.dtype in _HALF else p.dtype
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    self.state[p][key] = torch.empty_like(p, dtype=work, requires_grad=False).copy_(value)
            if p.dtype not in _HALF and p in self.state:
                self.state[p].pop("master", None)


def _stamp(p: Tensor) -> tuple[int, int]:
    """What changes with a tensor's values: torch's count of writes, and the address, for ``p.data = other`` is not counted."""
    return p._version, p.data_ptr()


def _require_no_dampening(dampening: float) -> None:
    if dampening:
        raise ValueError(
            f"dampening={dampening} has no kernel; use 0, or torch.optim.SGD, which has the same arguments"
        )
