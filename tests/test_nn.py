"""Our modules beside torch's: values, gradients, state, printing, copies, compilation; and when a run of children is one."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from alexnet_kernels import functional as F
from alexnet_kernels import nn
from alexnet_kernels._fusion import Known, Run, RunsAsOne, steps

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*global hooks on modules:UserWarning"),
]

tnn = torch.nn
FUSED = (
    *("conv2d_relu", "conv2d_relu_chain", "linear_relu", "lrn_max_pool2d", "max_pool2d_lrn"),
    *("conv2d_relu_lrn_max_pool2d", "conv2d_relu_max_pool2d_lrn"),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operations that run, in order."""
    made: list[str] = []

    def counted(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: made.append(name) or original(*args, **options)

    for name in FUSED:
        monkeypatch.setattr(F, name, counted(name, getattr(F, name)))
    return made


def norm_options(size: int = 5) -> dict[str, float]:
    return {"size": size, "alpha": 0.3, "beta": 0.75, "k": 2.0}


# Ours, torch's for it, and an input's shape.
PAIRS: dict[str, tuple[Callable[[], tnn.Module], Callable[[], tnn.Module], tuple[int, ...]]] = {
    "ConvReLU2d": (
        lambda: nn.ConvReLU2d(4, 6, 3, 2, 1, groups=2),
        lambda: tnn.Sequential(tnn.Conv2d(4, 6, 3, 2, 1, groups=2), tnn.ReLU()),
        (2, 4, 7, 6),
    ),
    "ConvReLU2d same, no bias, unbatched": (
        lambda: nn.ConvReLU2d(4, 6, (3, 2), padding="same", dilation=2, bias=False),
        lambda: tnn.Sequential(tnn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, bias=False), tnn.ReLU()),
        (4, 7, 6),
    ),
    "ConvReLU2d reflect": (
        lambda: nn.ConvReLU2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: tnn.Sequential(tnn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), tnn.ReLU()),
        (2, 4, 7, 6),
    ),
    "LinearReLU": (
        lambda: nn.LinearReLU(5, 3),
        lambda: tnn.Sequential(tnn.Linear(5, 3), tnn.ReLU()),
        (2, 4, 5),
    ),
    "MaxPool2d": (
        lambda: nn.MaxPool2d((3, 2), (2, 1), 1, ceil_mode=True),
        lambda: tnn.MaxPool2d((3, 2), (2, 1), 1, ceil_mode=True),
        (2, 4, 7, 6),
    ),
    "LRNMaxPool2d": (
        lambda: nn.LRNMaxPool2d(**norm_options()),
        lambda: tnn.Sequential(tnn.LocalResponseNorm(**norm_options()), tnn.MaxPool2d(3, 2)),
        (2, 7, 7, 6),
    ),
    "MaxPoolLRN2d": (
        lambda: nn.MaxPoolLRN2d(**norm_options(4), kernel_size=2, stride=None, padding=1),
        lambda: tnn.Sequential(tnn.MaxPool2d(2, padding=1), tnn.LocalResponseNorm(**norm_options(4))),
        (2, 7, 7, 6),
    ),
    "FusedSequential": (
        lambda: nn.FusedSequential(*every_run()),
        lambda: tnn.Sequential(*every_run()),
        (2, 3, 15, 15),
    ),
}


def every_run() -> list[tnn.Module]:
    """Each known run, and children that stand alone before, between and after them."""
    norm = norm_options()
    return [
        *(tnn.Identity(), tnn.Conv2d(3, 6, 3), tnn.ReLU(inplace=True), tnn.LocalResponseNorm(**norm)),
        *(tnn.MaxPool2d(2), tnn.Conv2d(6, 6, 3, padding=1, groups=2), tnn.ReLU(), nn.MaxPool2d(3, 1)),
        *(nn.LocalResponseNorm(**norm, groups=1), tnn.Conv2d(6, 4, 1), tnn.BatchNorm2d(4), tnn.Flatten()),
        *(tnn.Linear(64, 8), tnn.ReLU(inplace=True), tnn.Linear(8, 3)),
    ]


EVERY_OP = ["conv2d_relu_lrn_max_pool2d", "conv2d_relu_max_pool2d_lrn", "linear_relu"]


def pair(name: str) -> tuple[tnn.Module, tnn.Module, Tensor]:
    ours, theirs, shape = PAIRS[name]
    a, b = ours().double(), theirs().double()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        q.data.copy_(p.data)
    return a, b, torch.randn(shape, dtype=torch.double, requires_grad=True)


def assert_same(a: tnn.Module, b: tnn.Module, x: Tensor) -> None:
    """Values and every gradient; fp64, so that a formula of ours may round otherwise and nothing else may differ."""
    torch.testing.assert_close(a(x), b(x))
    inputs = [(x, *m.parameters()) for m in (a, b)]
    grads = [
        torch.autograd.grad(m(x).sin().sum(), leaves, create_graph=True)
        for m, leaves in zip((a, b), inputs, strict=True)
    ]
    torch.testing.assert_close(*grads)
    twice = [
        torch.autograd.grad(sum(g.square().sum() for g in once), leaves, allow_unused=True)
        for once, leaves in zip(grads, inputs, strict=True)
    ]
    torch.testing.assert_close(*twice)


@pytest.mark.parametrize("name", PAIRS)
def test_values_gradients_and_second_gradients_are_torchs(name: str) -> None:
    assert_same(*pair(name))


@pytest.mark.parametrize("name", PAIRS)
def test_printed_copied_pickled(name: str, tmp_path) -> None:
    ours, _, x = pair(name)
    assert type(ours).__name__ in repr(ours)
    torch.save(ours, tmp_path / "module.pt")
    for again in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ):
        assert type(again) is type(ours) and repr(again) == repr(ours)
        assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("name", PAIRS)
def test_compiled_exported_traced(name: str) -> None:
    ours, _, x = pair(name)
    ours, x = ours.eval(), x.detach()
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), ours(x))
    torch.testing.assert_close(torch.jit.trace(ours, (x,))(x), ours(x))


@pytest.mark.parametrize("name", ["ConvReLU2d", "LinearReLU", "MaxPool2d"])
def test_class_and_state_are_torchs(name: str) -> None:
    ours = PAIRS[name][0]()
    (torchs,) = type(ours).__bases__
    assert torchs.__module__.startswith("torch.nn")
    ours.__class__, names = torchs, list(ours.state_dict())
    assert names == list(PAIRS[name][0]().state_dict())
    assert repr(ours).removeprefix(torchs.__name__) == repr(PAIRS[name][0]()).removeprefix(name)


def test_every_padding_mode() -> None:
    x = torch.randn(2, 4, 7, 6)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        ours = nn.ConvReLU2d(4, 5, 3, padding=2, padding_mode=mode)
        plain = tnn.Conv2d(4, 5, 3, padding=2, padding_mode=mode)
        plain.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), plain(x).relu())


def test_max_pool_as_torch() -> None:
    x = torch.randint(9, (2, 3, 8, 8))
    ours, theirs = (m(3, 2, 1, return_indices=True, ceil_mode=True) for m in (nn.MaxPool2d, tnn.MaxPool2d))
    for values in (x, x.float(), x.float().where(x != 8, float("nan")), x[0].double()):
        torch.testing.assert_close(ours(values), theirs(values), equal_nan=True)
    assert nn.MaxPool2d(2)(x[:0].float()).shape == (0, 3, 4, 4)


def test_stride_none_is_the_kernel() -> None:
    assert nn.LRNMaxPool2d(5, kernel_size=2, stride=None).stride == 2
    assert repr(nn.LRNMaxPool2d(5, groups=2, alpha_mode="sum")) == (
        "LRNMaxPool2d(5, alpha=0.0001, beta=0.75, k=1.0, groups=2, alpha_mode='sum', "
        "kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)"
    )
    x = torch.randn(2, 8, 9, 9)
    towers = nn.LRNMaxPool2d(5, 1.0, groups=2)(x)
    assert torch.equal(towers, torch.cat([nn.LRNMaxPool2d(5, 1.0)(half) for half in x.chunk(2, 1)], 1))


class Watching(Tensor):
    """A tensor that writes down what is called on it, as quantised and distributed tensors act on it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Quiet(Tensor):
    """A subclass that torch.compile can look into."""


@pytest.mark.parametrize("name", [n for n in PAIRS if "LRN" not in n])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_a_tensor_subclass_sees_torchs_calls(name: str, where: str, calls: list[str]) -> None:
    ours, theirs, x = pair(name)
    if where == "weight":
        for module in (*ours.modules(), *theirs.modules()):
            for key, value in list(module._parameters.items()):
                if value is not None and not isinstance(module, tnn.BatchNorm2d):
                    module._parameters[key] = tnn.Parameter(value.data.as_subclass(Watching))
    else:
        x = x.detach().as_subclass(Watching)
    seen = []
    for module in (ours.eval(), theirs.eval()):
        Watching.seen.clear()
        module(x)
        seen.append([n for n in Watching.seen if n in ("conv2d", "linear", "relu", "max_pool2d")])
    assert seen[0] == seen[1]
    assert (where == "weight" and name in ("MaxPool2d", "FusedSequential")) or not calls


# ------------------------------------------------------------------------------------------------- runs of children


def ops(net: nn.FusedSequential) -> list[str]:
    return [step.op for step in steps(net) if step.op]


def test_every_known_run_is_one_operation(calls: list[str]) -> None:
    ours, _, x = pair("FusedSequential")
    ours(x)
    assert calls == ops(ours) == EVERY_OP
    assert [step.children for step in steps(ours) if step.op] == [
        *(("1", "2", "3", "4"), ("5", "6", "7", "8"), ("12", "13"))
    ]


ALONE: dict[str, Callable[[], list[tnn.Module]]] = {
    "ReLU before": lambda: [tnn.ReLU(), tnn.Conv2d(3, 3, 1)],
    "another activation": lambda: [tnn.Conv2d(3, 3, 1), tnn.ReLU6()],
    "subclass of Conv2d": lambda: [type("Mine", (tnn.Conv2d,), {})(3, 3, 2, 2), tnn.ReLU()],
    "subclass of ReLU": lambda: [tnn.Conv2d(3, 3, 1), type("Mine", (tnn.ReLU,), {})()],
    "padding mode": lambda: [tnn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), tnn.ReLU()],
    "nested": lambda: [tnn.Sequential(tnn.Conv2d(3, 3, 1)), tnn.ReLU()],
    "other pool": lambda: [tnn.LocalResponseNorm(3), tnn.AvgPool2d(2)],
    "nothing": list,
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_known_run_is_called_itself(name: str, calls: list[str]) -> None:
    children = ALONE[name]()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(nn.FusedSequential(*children)(x), tnn.Sequential(*children)(x))
    assert not calls and not ops(nn.FusedSequential(*children))


def test_return_indices_is_never_in_a_run(calls: list[str]) -> None:
    net = nn.FusedSequential(nn.LocalResponseNorm(3), nn.MaxPool2d(2, return_indices=True))
    values, indices = net(torch.randn(1, 3, 4, 4))
    assert indices.dtype == torch.int64 and values.shape == (1, 3, 2, 2) and not calls
    net[1].return_indices = False
    assert net(torch.randn(1, 3, 4, 4)).shape == (1, 3, 2, 2) and calls == ["lrn_max_pool2d"]


def _forward_hook(m: tnn.Module, log: list[Tensor], **options: bool) -> Callable[[], None]:
    return m.register_forward_hook(lambda module, args, *out: log.append(out[-1].clone()), **options).remove


def _pre_hook(m: tnn.Module, log: list[Tensor], **options: bool) -> Callable[[], None]:
    return m.register_forward_pre_hook(lambda module, args, *_: log.append(args[0].clone()), **options).remove


def _own(name: str) -> Callable[[tnn.Module, list[Tensor]], Callable[[], None]]:
    """An instance with a method of its own, as accelerators and tiling patches give it."""

    def watch(m: tnn.Module, log: list[Tensor]) -> Callable[[], None]:
        original = getattr(m, name)
        setattr(m, name, lambda x, *args: log.append(x.clone()) or original(x, *args))
        return lambda: delattr(m, name)

    return watch


def _class_forward(m: tnn.Module, log: list[Tensor]) -> Callable[[], None]:
    kind = type(m)
    original = kind.forward
    kind.forward = lambda self, x: log.append(x.clone()) or original(self, x)
    return lambda: setattr(kind, "forward", original)


def _global(register: Callable[..., torch.utils.hooks.RemovableHandle], **options: bool):
    def watch(m: tnn.Module, log: list[Tensor]) -> Callable[[], None]:
        def hook(module: tnn.Module, *values: object) -> None:
            if module is m:
                log.append(torch.stack([v.detach().sum() for v in torch.utils._pytree.tree_leaves(values)]))

        return register(hook, **options).remove

    return watch


WATCHES = {
    "forward hook": (_forward_hook, "hook: <lambda>"),
    "forward hook, kwargs": (lambda m, log: _forward_hook(m, log, with_kwargs=True), "hook: <lambda>"),
    "forward hook, always": (lambda m, log: _forward_hook(m, log, always_call=True), "hook: <lambda>"),
    "pre-hook": (_pre_hook, "pre-hook: <lambda>"),
    "pre-hook, kwargs": (lambda m, log: _pre_hook(m, log, with_kwargs=True), "pre-hook: <lambda>"),
    "backward hook": (
        lambda m, log: m.register_full_backward_hook(lambda _, __, grads: log.append(grads[0].clone())).remove,
        "backward hook: <lambda>",
    ),
    "backward pre-hook": (
        lambda m, log: m.register_full_backward_pre_hook(lambda _, grads: log.append(grads[0].clone())).remove,
        "backward pre-hook: <lambda>",
    ),
    "own forward": (_own("forward"), "custom forward"),
    "own _call_impl": (_own("_call_impl"), "custom forward"),
    "forward of the class": (_class_forward, "custom forward of "),
    "global forward hook": (_global(tnn.modules.module.register_module_forward_hook), "global module hook"),
    "global forward hook, always": (
        _global(tnn.modules.module.register_module_forward_hook, always_call=True),
        "global module hook",
    ),
    "global pre-hook": (_global(tnn.modules.module.register_module_forward_pre_hook), "global module hook"),
    "global backward hook": (_global(tnn.modules.module.register_module_full_backward_hook), "global module hook"),
    "global backward pre-hook": (
        _global(tnn.modules.module.register_module_full_backward_pre_hook),
        "global module hook",
    ),
}


@pytest.mark.parametrize("name", WATCHES)
@pytest.mark.parametrize("member", [0, 1], ids=["Conv2d", "ReLU"])
def test_a_watched_member_is_called_itself(name: str, member: int, calls: list[str]) -> None:
    """Added after a first call, seeing what it sees in torch's container, and fused again when it is gone."""
    watch, reason = WATCHES[name]
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU())
    theirs = tnn.Sequential(*net)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    net(x)
    assert calls == ["conv2d_relu"]
    seen = []
    for container in (net, theirs):
        log: list[Tensor] = []
        remove = watch(net[member], log)
        if container is net:
            (why,) = [step.why_not for step in steps(net) if step.why_not]
            assert reason in why and not ops(net)
        container(x).square().sum().backward()
        remove()
        seen.append(log)
    assert calls == ["conv2d_relu"] and seen[0]
    torch.testing.assert_close(*seen)
    assert torch.equal(net(x), theirs(x)) and len(calls) == 2


def test_a_convolution_with_its_own_conv_forward(calls: list[str]) -> None:
    """Makes images tile: a well-known patch pads circularly there."""
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU())
    net[0]._conv_forward = lambda x, weight, bias: torch.nn.functional.conv2d(x, weight * 2, bias)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(net(x), tnn.Sequential(*net)(x)) and not calls


def test_a_member_compiled_by_itself_stays_so(calls: list[str]) -> None:
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU())
    net[0].compile(backend="eager")
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(net(x), tnn.Sequential(*net)(x)) and not calls
    assert "compiled by itself" in str(list(steps(net)))


def test_a_hook_that_an_earlier_child_adds_during_the_call(calls: list[str]) -> None:
    class Adds(tnn.Module):
        def forward(self, x: Tensor) -> Tensor:
            handles.append(net[1].register_forward_hook(lambda *_: seen.append("conv")))
            return x

    handles: list[object] = []
    seen: list[str] = []
    net = nn.FusedSequential(Adds(), tnn.Conv2d(3, 4, 3), tnn.ReLU())
    net(torch.randn(1, 3, 5, 5))
    assert seen == ["conv"] and not calls


@pytest.mark.parametrize("reason", ["hook", "weight_norm", "spectral_norm", "global hook", "own forward", "subclass"])
def test_what_is_not_fused_compiles_all_the_same(reason: str) -> None:
    torch._dynamo.reset()
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU(), tnn.MaxPool2d(2, return_indices=True)).eval()
    handle = None
    if reason == "hook":
        net[0].register_forward_hook(lambda module, args, out: out * 2)
    elif reason == "global hook":
        register = tnn.modules.module.register_module_forward_hook
        handle = register(lambda module, args, out: out * 2 if type(module) is tnn.ReLU else None)
    elif reason == "own forward":
        net[1].forward = torch.tanh
    elif reason == "subclass":
        net[0].weight = tnn.Parameter(net[0].weight.data.as_subclass(Quiet))
    else:
        getattr(torch.nn.utils, reason)(net[0])
    x = torch.randn(1, 3, 6, 6)
    try:
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), tnn.Sequential(*net)(x))
    finally:
        if handle is not None:
            handle.remove()


def test_a_hook_changes_the_values() -> None:
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU())
    x = torch.randn(1, 3, 5, 5)
    net[0].register_forward_hook(lambda module, args, out: -out)
    assert torch.equal(net(x), (-net[0]._conv_forward(x, net[0].weight, net[0].bias)).relu())


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_relu_changes_no_more_than_in_torch(inplace: bool) -> None:
    """One at the front writes into the caller's tensor, as in torch; one inside a run writes where nobody looks."""
    net = nn.FusedSequential(tnn.ReLU(inplace), tnn.Conv2d(3, 4, 1), tnn.ReLU(inplace))
    a, b = torch.randn(2, 1, 3, 4, 4)
    b.copy_(a)
    assert torch.equal(net(a), tnn.Sequential(*net)(b)) and torch.equal(a, b)
    assert bool((a < 0).any()) is not inplace


def test_a_child_that_appears_twice(calls: list[str]) -> None:
    conv, relu = tnn.Conv2d(3, 3, 1), tnn.ReLU()
    net, x = nn.FusedSequential(conv, relu, conv, relu), torch.randn(1, 3, 4, 4)
    assert torch.equal(net(x), conv(conv(x).relu()).relu())
    assert calls == ["conv2d_relu_chain"] and len(list(net.parameters())) == 2


def test_containers_behave_as_sequential() -> None:
    children = every_run()
    net, theirs = nn.FusedSequential(*children), tnn.Sequential(*children)
    assert list(net) == children and net[3] is children[3] and len(net) == len(children)
    assert list(net.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert type(net[1:3]) is nn.FusedSequential and list(net[1:3]) == children[1:3]
    net.append(tnn.Identity()).insert(0, tnn.Identity())
    net.pop(0)
    net[-1] = tnn.ReLU()
    assert ops(net) == [*EVERY_OP, "linear_relu"]
    x = torch.randn(1, 2)
    assert nn.FusedSequential()(x) is x and not list(steps(nn.FusedSequential()))
    named = nn.FusedSequential(OrderedDict(fc=tnn.Linear(2, 3), act=tnn.ReLU()))
    assert [step.children for step in steps(named)] == [("fc", "act")] and named.fc is named[0]
    hidden = set(dir(nn.FusedSequential)) - set(dir(tnn.Sequential))
    assert all(name.startswith("_") for name in hidden), "a child of that name could not be reached"


def test_functional_call_and_per_sample_gradients() -> None:
    ours, theirs, x = pair("FusedSequential")
    state = {name: p.detach() for name, p in theirs.named_parameters()}
    results = []
    for net in (ours.eval(), theirs.eval()):

        def loss(weights, image, net=net):
            return torch.func.functional_call(net, weights, (image[None],)).square().sum()

        results.append(torch.vmap(torch.func.grad(loss), (None, 0))(state, x.detach()))
    torch.testing.assert_close(*results)


def test_forward_mode() -> None:
    ours, theirs, x = pair("FusedSequential")
    x, tangent = x.detach(), torch.randn_like(x)
    torch.testing.assert_close(*(torch.func.jvp(m.eval(), (x,), (tangent,)) for m in (ours, theirs)))


def test_autocast_as_torch() -> None:
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU(), tnn.Flatten(), tnn.Linear(36, 2), tnn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = net(x), tnn.Sequential(*net)(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)


def test_meta_device_and_default_device_mode(calls: list[str]) -> None:
    with torch.device("meta"):
        net = nn.FusedSequential(*every_run())
        assert net(torch.empty(2, 3, 15, 15)).shape == (2, 3)
    assert [
        name for name, _ in itertools.groupby(calls)
    ] == EVERY_OP  # a device mode calls a function once more, below itself


@pytest.mark.parametrize("shape", [(1, 2, 5, 5), (5, 5)])
def test_errors_of_a_run_are_torchs(shape: tuple[int, ...]) -> None:
    net = nn.FusedSequential(tnn.Conv2d(3, 4, 3), tnn.ReLU())
    with pytest.raises(RuntimeError) as theirs:
        tnn.Sequential(*net)(torch.randn(shape))
    with pytest.raises(RuntimeError) as ours:
        net(torch.randn(shape))
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match="conv2d"):
        net([1.0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.FusedSequential(tnn.ReLU()), r"FusedSequential.*revert first.*torch\.nn\.Sequential"),
        (lambda: tnn.Sequential(tnn.ReLU(), nn.FusedSequential()), "revert first"),
        (lambda: nn.MaxPool2d(2), r"revert first.*torch\.nn\.MaxPool2d"),
        (lambda: nn.LocalResponseNorm(5), r"revert first.*torch\.nn\.LocalResponseNorm"),
        (lambda: nn.ConvReLU2d(1, 1, 1), "ConvReLU2d cannot be scripted and has no class in torch.nn.*torch.jit.trace"),
        (lambda: nn.LinearReLU(1, 1), "LinearReLU cannot be scripted"),
        (lambda: nn.LRNMaxPool2d(5), "LRNMaxPool2d cannot be scripted"),
        (lambda: nn.MaxPoolLRN2d(5), "MaxPoolLRN2d cannot be scripted"),
    ],
)
def test_scripting_is_refused_with_the_remedy(module: Callable[[], tnn.Module], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(module())


@contextmanager
def _hooked(child: tnn.Module) -> Iterator[None]:
    handle = child.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


def test_the_longest_run_wins_and_gives_way() -> None:
    """Rows of the table may be of any length: a third child that is watched leaves the two before it fused."""

    class Net(RunsAsOne):
        _known = Known(
            (
                Run(((tnn.Identity,), (tnn.Tanh,)), lambda x, children: x + 10),
                Run(((tnn.Identity,), (tnn.Tanh,), (tnn.Identity,), (tnn.Sigmoid,)), lambda x, children: x + 1000),
            ),
            {},
        )

    net = Net(tnn.Identity(), tnn.Tanh(), tnn.Identity(), tnn.Sigmoid(), tnn.Identity())
    zero = torch.zeros(())
    assert net(zero) == 1000
    assert net[1:](zero) == 0.5
    with _hooked(net[2]):
        assert net(zero) == torch.tensor(10.0).sigmoid()
        assert [len(step.children) for step in steps(net)] == [2, 1, 1, 1]
    with _hooked(net[0]):
        assert net(zero) == 0.5
    assert net[:3](zero) == 10
    assert nn.FusedSequential._known is not Net._known
