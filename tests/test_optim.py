"""``optim.SGD`` beside ``torch.optim.SGD``: numbers, masters, state, schedulers, scaling; torch's functions and the kernel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alexnet_kernels as ak
from alexnet_kernels import dispatch
from alexnet_kernels.optim import SGD

INTERPRETED = not torch.cuda.is_available()
SHAPES = [(70, 61), (96, 3, 3, 3), (1000,), (1,), (5000,), (0, 4), ()]  # one chunk and several, with and without a rest
HALF = (torch.bfloat16, torch.float16)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.01},
    "momentum": {"lr": 0.01, "momentum": 0.9},
    "decay": {"lr": 0.02, "weight_decay": 5e-4},
    "paper": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    "maximize": {"lr": 0.01, "momentum": 0.8, "weight_decay": 1e-3, "maximize": True},
}
# products by these are exact: no compiler can round them otherwise
EXACT = {"lr": 2.0**-6, "momentum": 0.5, "weight_decay": 2.0**-9}


@pytest.fixture(params=["reference", "fused", "kernel"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Torch's functions one by one, its fused step on a CPU, and the kernel: on a GPU, or in the interpreter."""
    if request.param == "reference":
        name = "reference"
    elif request.param == "fused":
        name = "auto"
        if device.type != "cpu":
            pytest.skip("torch's fused step runs on a CPU; a GPU has the kernel")
    else:
        name = "triton"
        if device.type == "cpu" and not INTERPRETED:
            pytest.skip("the interpreter is on only where there is no GPU")
    with ak.use_backend(name):
        yield request.param


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    return [p.requires_grad_() for p in made]


def twins(params: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [p.detach().to(dtype, copy=True).requires_grad_() for p in params]


def give(params: list[Tensor], *others: list[Tensor], seed: int) -> None:
    """The same gradients for all, in the first one's precision."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        if i == 1:
            p.grad = p.grad.contiguous()  # other strides than its parameter
        for other in others:
            other[i].grad = p.grad.to(other[i].dtype, copy=True)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fused_here(backend: str, device: torch.device) -> bool:
    """Whether this arithmetic fuses products as torch's default step does: numpy in the interpreter, and torch's fused step
    on a CPU, do not."""
    return backend == "reference" or (backend == "kernel" and device.type == "cuda")


@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_are_torchs(way: str, device: torch.device, backend: str) -> None:
    """To the last bit where products are fused as in torch; else as near to fp64 as torch is. The interpreter takes 0.05 s a
    step: fifty of the paper's, eight of the others."""
    steps = 50 if fused_here(backend, device) or way == "paper" else 8
    params = parameters(device)
    others, exact = twins(params), twins(params, torch.float64)
    ours, theirs, wide = (
        SGD(params, **WAYS[way]),
        torch.optim.SGD(others, **WAYS[way]),
        torch.optim.SGD(exact, **WAYS[way]),
    )
    with dispatch.recording() as used:
        for step in range(steps):
            give(params, others, exact, seed=step)
            for optimizer in (ours, theirs, wide):
                optimizer.step()
    assert used == {{"kernel": "triton", "fused": "cpu"}.get(backend, backend)}
    if fused_here(backend, device):
        assert same(params, others)
    for p, q, e in zip(params, others, exact, strict=True):
        error, allowed = (float((t.double() - e).norm()) for t in (p, q))
        assert error <= 1.5 * allowed + 4 * 2.0**-24 * float(e.norm())


@pytest.mark.parametrize("nesterov", [False, True])
def test_exact_coefficients_are_exact_everywhere(nesterov: bool, device: torch.device, backend: str) -> None:
    params = parameters(device)
    others = twins(params)
    ours = SGD(params, **EXACT, nesterov=nesterov)
    theirs = torch.optim.SGD(others, **EXACT, nesterov=nesterov)
    for step in range(50 if not nesterov else 8):
        give(params, others, seed=step)
        ours.step()
        theirs.step()
    assert same(params, others)
    assert all(
        torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
        for p, q in zip(params, others, strict=True)
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [EXACT, WAYS["paper"], WAYS["plain"]], ids=["exact", "paper", "plain"])
def test_the_master_is_an_fp32_twin(
    options: dict[str, float], dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """It takes the same half gradients in fp32; the parameter is it, rounded, after every step."""
    params = parameters(device, dtype)
    others = twins(params)
    ours, theirs = SGD(params, **options), torch.optim.SGD(others, **options)
    exact = fused_here(backend, device) or options is EXACT
    for step in range(50 if fused_here(backend, device) or (options is EXACT and dtype == torch.float16) else 8):
        give(params, others, seed=step)
        ours.step()
        theirs.step()
        masters = [ours.state[p]["master"] for p in params]
        if exact:
            assert same(masters, others)
        else:
            torch.testing.assert_close(masters, others, rtol=50 * 2.0**-22, atol=50 * 2.0**-22)
        assert same(params, [m.to(dtype) for m in masters])


def test_groups_none_and_mixed_dtypes(device: torch.device, backend: str) -> None:
    """Each group its own numbers; what has no gradient does not move and gets no state; dtypes in one group, strided views."""
    params = parameters(device) + parameters(device, torch.bfloat16)[:2] + [torch.randn(4, 3, device=device).double()]
    sliced = torch.randn(6, 8, device=device)[:, ::2]
    params += [sliced, torch.randn(3, 2, device=device)]
    others = (
        twins(params[:7]) + twins(params[7:9], torch.float32) + twins(params[9:10], torch.float64) + twins(params[10:])
    )
    options = [{"lr": 2.0**-5, "momentum": 0.5}, {"lr": 2.0**-3, "weight_decay": 0.25}]
    made = []
    for kind, rows in ((SGD, params), (torch.optim.SGD, others)):
        groups = [{"params": part, **option} for part, option in zip((rows[::2], rows[1::2]), options, strict=True)]
        made.append(kind(groups, lr=1.0))
    context = ak.use_backend("auto") if backend == "reference" else ak.use_backend(dispatch.requested())
    if backend == "kernel":  # which has none for doubles and strided views
        params[9].grad = torch.zeros_like(params[9])
        with pytest.raises(RuntimeError, match=r"cannot run sgd: (no kernel for torch.float64|a parameter is neither)"):
            made[0].step()
        context = ak.use_backend("auto")
        params[9].grad = None
    with context:
        for step in range(3):
            give(params, others, seed=step)
            params[-1].grad = others[-1].grad = None
            for optimizer in made:
                optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q.to(p.dtype), rtol=2.0**-20, atol=0) if p.dtype not in HALF else None
        if p.dtype in HALF:
            assert torch.equal(made[0].state[p]["master"], q)
    assert params[-1] not in made[0].state


def test_a_dimension_of_one_may_have_any_stride() -> None:
    """As the gradient of a 1 x 1 convolution has in channels_last: the same order, hence no copy."""
    from alexnet_kernels.ops.optim import _same_order

    weight, grad = torch.randn(8, 4, 1, 1), torch.empty(8, 4, 1, 1, memory_format=torch.channels_last)
    assert weight.stride() != grad.stride() and _same_order(weight, grad)
    assert not _same_order(torch.randn(4, 3), torch.randn(3, 4).t())


def test_schedulers_and_closures(device: torch.device, backend: str) -> None:
    params = parameters(device)
    others = twins(params)
    made = SGD(params, **EXACT), torch.optim.SGD(others, **EXACT)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) for optimizer in made]
    for step in range(6):

        def closure(step: int = step) -> str:
            assert torch.is_grad_enabled()
            give(params, others, seed=step)
            return f"loss {step}"

        assert made[0].step(closure) == f"loss {step}"
        made[1].step()
        for schedule in schedules:
            schedule.step()
    assert made[0].param_groups[0]["lr"] == 2.0**-9 and same(params, others)


def test_lr_may_be_a_tensor(device: torch.device, backend: str) -> None:
    rate = torch.tensor(2.0**-6, device=device)
    params = parameters(device)
    others = twins(params)
    ours = SGD(params, rate, momentum=0.5)
    theirs = torch.optim.SGD(others, 2.0**-6, momentum=0.5)
    for step in range(4):
        give(params, others, seed=step)
        ours.step()
        theirs.step()
        rate.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert same(params, others)


# ----------------------------------------------------------------------------------------------------------------- state


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        give(params, seed=step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("way", ["saved", "copied", "pickled"])
def test_a_pause_changes_nothing(
    way: str, dtype: torch.dtype, device: torch.device, backend: str, tmp_path: Any
) -> None:
    """Ten steps, or five, a stop and five: to the last bit, masters and momenta in fp32 included."""
    straight = parameters(device, dtype)
    paused = [p.detach().clone().requires_grad_() for p in straight]
    run(SGD(straight, **WAYS["paper"]), straight, range(10))
    first = SGD(paused, **WAYS["paper"])
    run(first, paused, range(5))
    if way == "saved":
        torch.save((paused, first.state_dict()), tmp_path / "state.pt")
        weights, state = torch.load(tmp_path / "state.pt")
        resumed = [p.detach().mul(0).requires_grad_() for p in paused]
        second = SGD(resumed, lr=1.0)
        second.load_state_dict(state)
        with torch.no_grad():  # after the optimiser's state, as some loops load
            for p, w in zip(resumed, weights, strict=True):
                p.copy_(w)
    else:
        second = copy.deepcopy(first) if way == "copied" else pickle.loads(pickle.dumps(first))
        resumed = second.param_groups[0]["params"]
    assert second.param_groups[0]["momentum"] == 0.9
    run(second, resumed, range(5, 10))
    assert same(resumed, straight)


def test_state_is_torchs_and_fits_both_ways(device: torch.device) -> None:
    params = parameters(device)
    others = twins(params)
    ours, theirs = SGD(params, **EXACT), torch.optim.SGD(others, **EXACT)
    for optimizer, rows in ((ours, params), (theirs, others)):
        run(optimizer, rows, range(3))
    assert list(ours.state_dict()["state"][0]) == list(theirs.state_dict()["state"][0]) == ["momentum_buffer"]
    assert set(ours.state_dict()["param_groups"][0]) == set(theirs.state_dict()["param_groups"][0])
    into_ours, into_theirs = SGD(twins(params), 1.0), torch.optim.SGD(twins(params), 1.0)
    into_ours.load_state_dict(theirs.state_dict())
    into_theirs.load_state_dict(ours.state_dict())
    for optimizer in (into_ours, into_theirs):
        rows = optimizer.param_groups[0]["params"]
        run(optimizer, rows, range(3, 6))
        assert optimizer.param_groups[0]["momentum"] == 0.5
    run(theirs, others, range(3, 6))
    assert same(into_ours.param_groups[0]["params"], others) and same(into_theirs.param_groups[0]["params"], others)
    empty = SGD(parameters(device), 0.1)
    run(empty, empty.param_groups[0]["params"], range(1))
    assert empty.state_dict()["state"] == torch.optim.SGD(others, 0.1).state_dict()["state"] == {}


def test_a_half_state_in_fp32_and_back(device: torch.device) -> None:
    """Loaded into fp32 parameters the masters have no meaning; from there into half ones they are made anew."""
    half = parameters(device, torch.bfloat16)
    first = SGD(half, **EXACT)
    run(first, half, range(2))
    full = [first.state[p]["master"].clone().requires_grad_() for p in half]
    second = SGD(full, 1.0)
    second.load_state_dict(first.state_dict())
    assert all(list(second.state[p]) == ["momentum_buffer"] for p in full)
    third = SGD(half, 1.0)
    third.load_state_dict(second.state_dict())
    assert all(third.state[p]["momentum_buffer"].dtype == torch.float32 for p in half)
    run(third, half, range(2, 3))
    assert all(third.state[p]["master"].dtype == torch.float32 for p in half)


def test_what_others_write_into_a_half_parameter_is_seen(device: torch.device, backend: str) -> None:
    p = torch.linspace(-1, 1, 100, device=device).bfloat16().requires_grad_()
    optimizer = SGD([p], lr=2.0**-9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[:50].fill_(0.5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    master = optimizer.state[p]["master"]
    assert bool((master[:50] == 0.5).all()) and torch.equal(p[:50], torch.full_like(p[:50], 0.5))
    assert torch.equal(master[50:], before[50:]) and not torch.equal(before[50:].bfloat16().float(), before[50:])


def test_another_tensor_in_the_place_of_a_half_parameter_is_seen(device: torch.device, backend: str) -> None:
    """``p.data = other``, as ``torch.nn.utils.vector_to_parameters`` does."""
    p = torch.ones(9, device=device, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGD([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.data = torch.full_like(p, 3)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 2.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_no_fused_step_takes_is_stepped_as_torch_does(dtype: torch.dtype) -> None:
    """Parameters converted between two steps, whose momentum stays what it was; complex ones."""
    start = torch.randn(5, dtype=torch.float32 if dtype == torch.float64 else dtype)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    for p, kind in ((ours, SGD), (theirs, torch.optim.SGD)):
        optimizer = kind([p], 0.1, momentum=0.5)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
            p.data = p.data.to(dtype)
    torch.testing.assert_close(ours, theirs)


def test_a_graph_that_needs_the_old_weight_says_so(device: torch.device, backend: str) -> None:
    p = torch.randn(4, device=device, requires_grad=True)
    y = p.square().sum()
    p.grad = torch.ones_like(p)
    SGD([p], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --------------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """Divides by the scale; a step with an infinity changes nothing, the first one neither."""
    params = parameters(device, dtype)
    others = twins(params)
    ours, theirs = SGD(params, **EXACT), torch.optim.SGD(others, **EXACT)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
    for step, bad in enumerate((True, False, True, False)):
        give(params, others, seed=step)
        scale = scaler.scale(torch.ones((), device=device))
        for p in params:
            p.grad.mul_(scale.to(dtype))
        if bad:
            params[2].grad[7] = float("inf")
        before = twins(params, dtype)
        scaler.step(ours)
        scaler.update()
        if bad:
            assert same(params, before)
        else:
            theirs.step()
    held = [ours.state[p].get("master", p) for p in params]
    assert same(held, others) and scaler.get_scale() == 2.0**8
    assert not hasattr(ours, "found_inf")


def test_unscaled_and_clipped_by_hand(device: torch.device, backend: str) -> None:
    params = parameters(device)
    others = twins(params)
    made = SGD(params, **EXACT), torch.optim.SGD(others, **EXACT)
    for optimizer, rows in zip(made, (params, others), strict=True):
        scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
        scaler.scale(torch.ones((), device=device))
        give(rows, seed=0)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(rows, 2.0**-3, foreach=False)
        scaler.step(optimizer)
    assert same(params, others)


# ---------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter; a GPU's addresses are the allocator's affair")
def test_addresses_are_written_down_once_and_again_when_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_kernels.kernels import optim as kernel

    made: list[Tensor] = []
    original = kernel.plan

    def plan(table: Tensor, *args: Any) -> Any:
        made.append(table)
        return original(table, *args)

    monkeypatch.setattr(kernel, "plan", plan)
    p = torch.zeros(5000, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = SGD([p], 1.0)
    with ak.use_backend("triton"):
        for _ in range(3):
            optimizer.step()
        assert len({id(table) for table in made}) == 1 and bool((p == -3).all())
        kept, p.grad = p.grad, torch.full_like(p, 2.0)
        optimizer.step()
        assert made[-1] is not made[0] and bool((p == -5).all()) and bool((kept == 1).all())
        p.grad = torch.ones(5001)[1:]  # four bytes off: another kernel
        optimizer.step()
    assert made[-1] is not made[-2] and bool((p == -6).all())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is on only where there is no GPU")
def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    """``torch.set_default_device("cuda")`` would put them where no memory can be page-locked; "meta" is as far off."""
    p = torch.zeros(5000, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = SGD([p], 1.0)
    with ak.use_backend("triton"), torch.device("meta"):
        optimizer.step()
    assert bool((p == -1).all())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is on only where there is no GPU")
def test_a_tensor_subclass_is_torchs_to_update() -> None:
    """It answers for its elements by functions; where it says that they are, there may be nothing."""

    class Elsewhere(Tensor):
        pass

    p = torch.zeros(3).as_subclass(Elsewhere).requires_grad_()
    p.grad = torch.ones(3).as_subclass(Elsewhere)
    optimizer = SGD([p], 1.0)
    with dispatch.recording() as used:
        optimizer.step()
    assert used == {"reference"} and p.tolist() == [-1, -1, -1]
    with ak.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run sgd: a tensor subclass"):
        optimizer.step()


@pytest.mark.parametrize("lr", [1, 2, np.float32(0.5)])
def test_whatever_number_lr_is_the_kernel_takes_a_float(lr: Any) -> None:
    """Triton would compile an lr of 1 in, and refuse a number of numpy's."""
    from alexnet_kernels.kernels import optim as kernel

    table, chunks = (torch.empty(1, n, dtype=torch.int64, device="meta") for n in (5, 2))
    kinds = (torch.float32, torch.float32)
    launch = kernel.plan(table, chunks, kinds, lr, 0.9, 0.0, False, False, None, True)
    assert type(launch.args[2]) is float and launch.args[2] == lr


# ---------------------------------------------------------------------------------------------------------------- errors


def test_printed_and_compiled() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = SGD([p], 0.5, momentum=0.5)
    assert repr(optimizer).startswith("SGD (\nParameter Group 0") and isinstance(optimizer, torch.optim.SGD)
    p.grad = torch.ones_like(p)
    torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(p, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 0.1}, r"dampening=0.1 has no kernel; use 0, or torch.optim.SGD"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum"),
        ({"momentum": -1.0}, "Invalid momentum value"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD([torch.ones(2, requires_grad=True)], **options)


def test_refused_later() -> None:
    optimizer = SGD([torch.ones(2, requires_grad=True)], 0.1)
    with pytest.raises(ValueError, match=r"dampening=0.5 has no kernel"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "dampening": 0.5})
    others = torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1, momentum=0.9, dampening=0.25)
    with pytest.raises(ValueError, match=r"dampening=0.25 has no kernel"):
        optimizer.load_state_dict(others.state_dict())
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 2\) is sparse; use torch.optim.SGD, or sparse=False"):
        SGD(table.parameters(), 0.1).step()


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Replays follow an lr in memory, and survive a step outside whose tensors lie elsewhere."""
    device, rate = torch.device("cuda"), torch.tensor(2.0**-6, device="cuda")
    params = parameters(device)
    others = twins(params)
    ours, theirs = SGD(params, rate, momentum=0.5), torch.optim.SGD(others, 2.0**-6, momentum=0.5)
    give(params, others, seed=0)
    ours.step()
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    kept = [p.grad for p in params]
    for step in range(1, 5):
        give(others, seed=step)
        for grad, q in zip(kept, others, strict=True):
            grad.copy_(q.grad)
        graph.replay()
        theirs.step()
        if step == 2:
            give(params, others, seed=99)
            ours.step()
            theirs.step()
        rate.mul_(0.5)
        theirs.param_groups[0]["lr"] *= 0.5
    assert same(params, others)
