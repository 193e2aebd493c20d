"""A ``Sequential`` that runs known runs of its children as one operation, while nobody can see inside them.

What is known is data that a subclass brings (``Known``); nothing here knows an operation. Everything is decided anew at
each call and nothing is stored in an instance, since a hook may come at any time and ``torch.nn.Sequential`` may become
one of these, and be one again, by its ``__class__`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

# Other tensors (DTensor, quantised weights, a tracer's proxy) have their own idea of torch's calls, and get to see them.
ORDINARY_TENSORS = frozenset({Tensor, torch.nn.Parameter, FakeTensor, type(None)})  # None: a layer without bias

_HOOKS = {
    "_forward_pre_hooks": "pre-hook",
    "_forward_hooks": "hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_HOOKED = "hook"  # its name is looked up only where a report asks: this has to be quick, and compilable


@dataclass(frozen=True)
class Run:
    """Children that one operation can stand for: the possible types of each, torch's first, and ``op(input, children)``."""

    children: tuple[tuple[type[Module], ...], ...]
    op: Callable[..., Any]


class Known:
    """The known runs, arranged for quick matching.

    Args:
        runs: of two that fit, the longer one is taken.
        conditions: for some types, a function that says why an instance cannot be in a run, or None.
        whole: subclasses of what begins a run that are a whole run by themselves.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        conditions: Mapping[type[Module], Callable[[Any], str | None]],
        whole: tuple[type[Module], ...] = (),
    ) -> None:
        self._starts, self._whole = tuple({run.children[0][0] for run in runs}), whole
        self.conditions = conditions
        self.forwards = {kind: kind.forward for run in runs for kinds in run.children for kind in kinds}
        self.trie: dict[Any, Any] = {}  # by type, one level a child; under None the operation that is complete there
        for run in runs:
            for kinds in product(*run.children):
                node = self.trie
                for kind in kinds:
                    node = node.setdefault(kind, {})
                node[None] = run.op

    def may_start(self, child: object) -> bool:
        """Whether one expects a run to begin with ``child``: by its kind, whatever stands in the way."""
        return isinstance(child, self._starts) and not isinstance(child, self._whole)

    def longest(self, children: Sequence[Module | None], at: int) -> tuple[Callable[..., Any], int] | None:
        """The operation of the longest run from ``at`` on, and where it ends. ``children`` ends with None."""
        node, found = self.trie.get(type(children[at])), None
        while node is not None and self.why_alone(children[at]) is None:
            at += 1
            if None in node:
                found = node[None], at
            node = node.get(type(children[at]))
        return found

    def advance(self, children: Sequence[Module | None], at: int, input: Any) -> tuple[Any, int]:
        """One step of a call: the run that begins at ``at`` as one operation, or that child by itself. Its result, and where the
        next step begins. ``children`` ends with None."""
        child: Any = children[at]
        after = self.trie.get(type(child))
        if after is not None and type(children[at + 1]) in after and type(input) in ORDINARY_TENSORS:
            run = self.longest(children, at)
            if run is not None:
                op, stop = run
                return op(input, children[at:stop]), stop
        return child(input), at + 1

    def why_alone(self, child: Any) -> str | None:
        """Why a child of a known type must be called itself; None when its attributes alone say what it does."""
        kind, state = type(child), child.__dict__
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
        ):
            return _HOOKED
        if "forward" in state or "_conv_forward" in state or "_call_impl" in state:
            return "custom forward"
        if "_compiled_call_impl" in state:
            return "compiled by itself"
        if kind.forward is not self.forwards[kind]:
            return f"custom forward of {kind.__name__}"
        if state["_parameters"]:
            for name, parameter in state["_parameters"].items():
                if type(parameter) not in ORDINARY_TENSORS:
                    return f"{name} is a {type(parameter).__name__}"
        return self.conditions[kind](child) if kind in self.conditions else None

    def why_no_run(self, children: Sequence[Module | None], at: int) -> str | None:
        """Why no run begins at ``at``, where :meth:`longest` found none; None where none ever begins."""
        child, after = children[at], children[at + 1]
        if child is None or not self.may_start(child):
            return None
        if parametrize.is_parametrized(child):
            return "parametrized"
        if type(child) not in self.trie:
            return f"custom class {type(child).__name__}"
        alone = self._reason(child)
        if alone is not None or after is None:
            return alone or "last in its Sequential"
        if type(after) not in self.trie[type(child)]:
            return f"no known run: {type(after).__name__} follows"
        return f"{type(after).__name__} after it: {self._reason(after)}"

    def _reason(self, child: Module) -> str | None:
        reason = self.why_alone(child)
        return _name_of_hook(vars(child)) if reason == _HOOKED else reason


def _name_of_hook(state: Mapping[str, Any]) -> str:
    """``"pre-hook: weight_norm"``: the first hook, by the name of its function or class."""
    kind, hook = next((kind, hook) for kind in _HOOKS for hook in state[kind].values())
    name = getattr(hook, "__name__", None) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(hook).__name__).lower()
    return f"{_HOOKS[kind]}: {name}"


def why_nowhere() -> str | None:
    """Why no run may be fused at all at the moment: somebody watches every module."""
    if _has_any_global_hook():
        return "global module hook"
    if Module.__call__ is not Module._wrapped_call_impl:  # as any tracer of torch.fx replaces it
        return "Module.__call__ is replaced (torch.fx traces so)"
    if torch._C._get_tracing_state() is not None:
        return "traced by torch.jit"
    return None


@dataclass(frozen=True)
class Step:
    """One step of a call: a run of ``children`` (their names) as ``op``; or one child, and why it begins no run."""

    children: tuple[str, ...]
    op: str | None = None
    why_not: str | None = None


class RunsAsOne(torch.nn.Sequential):
    """``torch.nn.Sequential`` with the runs of ``_known`` as one operation each; see ``nn.FusedSequential``.

    Its only new attribute is private: a child may have any name, and an attribute of the class would hide it.
    """

    _known: ClassVar[Known]

    def forward(self, input: Any) -> Any:
        if why_nowhere() is not None:
            return super().forward(input)
        known, children = self._known, (*self._modules.values(), None)
        at, end = 0, len(children) - 1
        while at < end:
            input, at = known.advance(children, at, input)
        return input


def steps(container: RunsAsOne) -> Iterator[Step]:
    """What a call of ``container`` on an ordinary tensor would do now; nothing runs."""
    names, children = tuple(container._modules), (*container._modules.values(), None)
    known, nowhere, at = container._known, why_nowhere(), 0
    while at < len(names):
        run = known.longest(children, at) if nowhere is None else None
        if run is None:
            reason = known.why_no_run(children, at)
            yield Step(names[at : at + 1], why_not=reason and (nowhere or reason))
            at += 1
        else:
            op, stop = run
            yield Step(names[at:stop], op.__name__)
            at = stop
