"""Two towers are one network: forward, every gradient, training steps, state; and what must fail, fails."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alexnet_kernels import geometry, models, nn
from alexnet_kernels.distributed import exchange
from alexnet_kernels.models import AlexNet, TwoDeviceAlexNet, merge_state, split_state

CPUS = ("cpu", "cpu")
FC8 = ("device0", "split")


class FixedMask(torch.nn.Module):
    """Dropout with a mask that was drawn beforehand, so that two forms of a network can be given the same one."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask * 2


def inject_masks(one: AlexNet, two: TwoDeviceAlexNet, batch: int) -> None:
    """The same dropout masks for both; a tower gets its own half, as it draws its own in life."""
    for index, module in enumerate(one.classifier):
        if isinstance(module, torch.nn.Dropout):
            width = one.classifier[index - 2].out_features
            mask = (torch.rand(batch, width) < 0.5).double()
            one.classifier[index] = FixedMask(mask)
            for tower, half in zip(two.towers, mask.chunk(2, dim=1), strict=True):
                tower.classifier[index] = FixedMask(half)


def narrow(name: str) -> geometry.Variant:
    """A variant at an eighth of its width: its order, scopes and roundings, in a fraction of the time."""
    return geometry.variant(name).narrowed(1 if name == "tiny" else 8)


def pair(
    name: str | geometry.Variant = "tiny", fc8: str = "device0", *, devices: tuple[str, str] = CPUS, **options: object
):
    """One- and two-device forms with the same weights, activations that vary, in fp64."""
    if geometry.variant(name).name != "torchvision":
        options.setdefault("input_size", 67)
    one = models.alexnet(name, num_classes=11, **options).double()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5)
    return one, TwoDeviceAlexNet.from_one_device(one, devices, fc8)


def relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).norm() / expected.norm()).detach())


def gradients(model: TwoDeviceAlexNet) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return merge_state(found, model.variant, model.fc8)


def largest_difference(one: AlexNet, two: TwoDeviceAlexNet, x: Tensor) -> float:
    """The worst relative difference among logits, all parameters' gradients and the images' gradient."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = one(a), two(b)
    weight = torch.randn(logits[0].shape, dtype=torch.double)
    for y in logits:
        (y * weight).sum().backward()
    found = gradients(two)
    errors = [relative(logits[1], logits[0]), relative(b.grad, a.grad)]
    errors += [relative(found[name], p.grad) for name, p in one.named_parameters()]
    return max(errors)


def batch(one: AlexNet, n: int = 3) -> Tensor:
    return torch.randn(n, 3, *one.variant.input_size, dtype=torch.double) * 50


@pytest.mark.parametrize("fc8", FC8)
@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_two_devices_equal_one(name: str, fc8: str) -> None:
    one, two = pair(narrow(name), fc8)
    if name == "torchvision":  # its dropout comes before the layers, on inputs of other widths
        one.eval(), two.eval()
    else:
        inject_masks(one, two, 3)
    assert largest_difference(one, two, batch(one)) <= 1e-12


@pytest.mark.parametrize("name", ["tiny", "source2012", "caffenet", "torchvision"])
def test_both_towers_take_pixels(name: str) -> None:
    one, two = pair(narrow(name))
    one.eval(), two.eval()
    pixels = torch.randint(256, (2, 3, *one.variant.input_size), dtype=torch.uint8)
    assert relative(two(pixels), one(pixels)) <= 1e-12


def operations(two: TwoDeviceAlexNet, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a call runs, in its order, as the first and the last of the layers that are one operation."""
    layers = two.variant.layers
    names = {id(m): f.name for t in two.towers for f, m in zip(layers, t.steps(), strict=False)}
    ran: list[str] = []

    def watched(modules: tuple[torch.nn.Module, ...], at: int, input: Tensor) -> tuple[Tensor, int]:
        output, stop = step(modules, at, input)
        ran.append("-".join(dict.fromkeys((names[id(modules[at])], names[id(modules[stop - 1])]))))
        return output, stop

    step = nn.fused_step
    monkeypatch.setattr(nn, "fused_step", watched)
    two(x)
    monkeypatch.setattr(nn, "fused_step", step)
    return ran


_CLASSIFIER = "pool5 flatten6 fc6-drop6 fc7-drop7 fc8"
OPERATIONS = {
    "paper": f"conv1-pool1 conv2-pool2 conv3-relu5 {_CLASSIFIER}",
    "caffe": f"conv1-relu1 norm1-pool1 conv2-relu2 norm2-pool2 conv3-relu5 {_CLASSIFIER}",
    "caffenet": f"conv1-relu1 pool1 norm1 conv2-relu2 pool2 norm2 conv3-relu5 {_CLASSIFIER}",
    "source2012": "conv1-pool1 relu1 conv2-relu2 norm2 cnorm2 pool2 conv3-relu4 conv5 pool5 relu5 "
    + _CLASSIFIER.removeprefix("pool5 "),
    "torchvision": "conv1-relu1 pool1 conv2-relu2 pool2 conv3-relu3 conv4-relu4 conv5-relu5 pool5 avgpool6 flatten6 drop6 "
    "fc6-drop7 fc7-relu7 fc8",
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_towers_run_layers_as_one_operation_and_take_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container of the layers between two exchanges would run; each operation on one tower, then on the other."""
    one, two = pair(narrow(name))
    expected = OPERATIONS[name].split()
    assert operations(two, batch(one, 1), monkeypatch) == [op for op in expected[:-1] for _ in CPUS] + expected[-1:]


@pytest.mark.parametrize(("name", "layer"), [("paper", 2), ("caffe", 2), ("caffe", 3), ("caffenet", 3), ("paper", 10)])
def test_whoever_watches_a_layer_sees_it(name: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook takes its layer out of its run, in its own tower, from the next call on; the other tower's stays one. What it sees
    is the tower's own half, but for LRN over both towers, which reads its neighbours."""
    one, two = pair(narrow(name))
    one.eval(), two.eval()
    x = batch(one, 1)
    whole, before = [], operations(two, x, monkeypatch)
    one.features[layer].register_forward_hook(lambda module, args, output: whole.append(output))
    expected = one(x)
    seen: list[Tensor] = []
    handle = two.towers[1].features[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    assert relative(two(x), expected) <= 1e-12
    watched = operations(two, x, monkeypatch)
    own = whole[0].chunk(2, dim=1)[1]
    assert relative(seen[0][:, -own.shape[1] :], own) <= 1e-12
    across = two.variant.layers[layer].name.startswith("norm") and name != "paper"
    assert seen[0].shape[1] == own.shape[1] + (2 if across else 0)
    handle.remove()
    assert operations(two, x, monkeypatch) == before
    assert (len(watched) > len(before)) == (before.count(two.variant.layers[layer].name) == 0)


@pytest.mark.parametrize("fc8", FC8)
def test_dropout_is_that_of_the_layers_one_by_one(fc8: str) -> None:
    """The same seed drops the same elements, whether or not somebody watches."""
    one, two = pair(fc8=fc8)
    x, found = batch(one), []
    for _ in range(2):
        torch.manual_seed(7)
        y = two(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(two.parameters()))])
        for module in two.modules():
            module.register_forward_hook(lambda *_: None)
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) <= 1e-12
    torch.manual_seed(8)
    assert relative(two(x), found[0][0]) > 1e-3


@pytest.mark.parametrize("fc8", FC8)
def test_two_devices_equal_one_at_full_size(fc8: str) -> None:
    one, two = pair("paper", fc8, input_size=227)
    inject_masks(one, two, 2)
    assert largest_difference(one, two, batch(one, 2)) <= 1e-12


@pytest.mark.parametrize("fc8", FC8)
@pytest.mark.parametrize("name", ["tiny", "caffenet"])
def test_twenty_training_steps(name: str, fc8: str) -> None:
    """SGD with momentum and weight decay, the learning rate divided by ten in between, new masks each step."""
    one, two = pair(narrow(name), fc8)
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4) for m in (one, two)]
    before = copy.deepcopy(one.state_dict())
    for step in range(20):
        x, labels = batch(one, 2), torch.randint(11, (2,))
        inject_masks_again(one, two, 2) if step else inject_masks(one, two, 2)
        for model, optimiser in zip((one, two), optimisers, strict=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            if step == 10:
                optimiser.param_groups[0]["lr"] /= 10
            optimiser.step()
    after = merge_state(two.state_dict(), two.variant, fc8)
    for name_, value in one.state_dict().items():
        assert relative(after[name_], value) <= 1e-12, name_
        assert not torch.equal(value, before[name_]), f"{name_} did not move: the test would prove nothing"


def inject_masks_again(one: AlexNet, two: TwoDeviceAlexNet, n: int) -> None:
    for index, module in enumerate(one.classifier):
        if isinstance(module, FixedMask):
            module.mask = (torch.rand(n, module.mask.shape[1]) < 0.5).double()
            for tower, half in zip(two.towers, module.mask.chunk(2, dim=1), strict=True):
                tower.classifier[index].mask = half


@pytest.mark.parametrize("layer", ["conv3", "fc6", "fc7", "fc8"])
def test_cutting_an_exchange_is_noticed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: zeros instead of the other tower's half."""
    original = exchange.pull
    monkeypatch.setattr(exchange, "pull", lambda x, name, *a, **k: original(x * (name != layer), name, *a, **k))
    one, two = pair()
    one.eval(), two.eval()
    x = batch(one)
    assert relative(two(x), one(x)) > 1e-3


@pytest.mark.parametrize("layer", ["conv3", "fc6", "fc7", "fc8"])
def test_dropping_the_backward_sum_is_noticed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the forward is right, but the consumer's gradient never returns to the tower that made the half."""
    original = exchange.pull

    def forgetful(x: Tensor, name: str, *args: object, **options: object) -> Tensor:
        return original(x.detach() if name == layer else x, name, *args, **options)

    monkeypatch.setattr(exchange, "pull", forgetful)
    one, two = pair()
    one.eval(), two.eval()
    x = batch(one)
    assert relative(two(x), one(x)) <= 1e-12
    assert largest_difference(one, two, x) > 1e-3


@pytest.mark.parametrize("fc8", FC8)
@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_split_then_merge_is_the_bitwise_identity(name: str, fc8: str) -> None:
    variant = narrow(name).override(num_classes=11)
    state = models.alexnet(variant).state_dict()
    again = merge_state(split_state(state, variant, fc8), variant, fc8)
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("fc8", FC8)
def test_exchanged_bytes_are_the_geometrys(fc8: str) -> None:
    for name in geometry.VARIANTS:
        one, two = pair(narrow(name), fc8)
        x = batch(one, 2).requires_grad_()
        with exchange.recording() as log:
            y = two(x)
        y.sum().backward()  # outside the block: the backward of what was recorded is recorded too
        expected = sum(e.bytes(2, itemsize=8) * e.directions for e in two.variant.exchanges(fc8))
        assert log.bytes() == log.bytes(backward=True) == expected
        assert list(dict.fromkeys(t.layer for t in log.transfers if not t.backward)) == [
            e.layer for e in two.variant.exchanges(fc8)
        ]


@pytest.mark.parametrize("fc8", FC8)
def test_each_tower_owns_what_geometry_says(fc8: str) -> None:
    with torch.device("meta"):
        state = split_state(models.alexnet("paper").state_dict(), geometry.variant("paper"), fc8)
    for index in (0, 1):
        own = sum(v.numel() for k, v in state.items() if k.startswith(f"towers.{index}."))
        assert own == geometry.variant("paper").device_parameters(index, fc8)


def test_one_seed_gives_both_forms_the_same_weights() -> None:
    torch.manual_seed(3)
    one = models.alexnet("tiny")
    torch.manual_seed(3)
    two = TwoDeviceAlexNet("tiny", devices=CPUS)
    merged = merge_state(two.state_dict(), two.variant)
    assert all(torch.equal(merged[k], v) for k, v in one.state_dict().items())


def test_conversion_keeps_weights_mode_and_dtype() -> None:
    one, two = pair()
    back = two.eval().to_one_device()
    assert back.training is False
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), one.state_dict().values(), strict=True))
    assert next(back.parameters()).dtype == torch.float64


def test_printed_copied_pickled_moved() -> None:
    one, two = pair()
    x = batch(one)
    one.eval(), two.eval()
    assert "'tiny', fc8='device0'" in repr(two)
    for again in (copy.deepcopy(two), pickle.loads(pickle.dumps(two)), copy.deepcopy(two).to("cpu")):
        assert torch.equal(again(x), two(x))
    halved = copy.deepcopy(two).bfloat16()
    assert halved(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny", "caffe"])
def test_compiles_whole(name: str) -> None:
    one, two = pair(narrow(name))
    one.eval(), two.eval()
    x = batch(one)
    assert torch.equal(torch.compile(two, fullgraph=True, backend="aot_eager")(x), two(x))


def test_empty_batch() -> None:
    _, two = pair()
    assert two(torch.zeros(0, 3, 67, 67, dtype=torch.double)).shape == (0, 11)


def _bad() -> Iterator[tuple[str, object]]:
    yield "devices=.*must name two devices", lambda: TwoDeviceAlexNet("tiny", devices=("cpu",))
    yield "fc8='gpu0' is unknown: 'device0'", lambda: TwoDeviceAlexNet("tiny", devices=CPUS, fc8="gpu0")
    yield "variant='vgg' is unknown", lambda: TwoDeviceAlexNet("vgg", devices=CPUS)
    count = torch.cuda.device_count()
    yield (
        f"cuda:{count} does not exist, {count} CUDA devices are visible; use devices=",
        lambda: TwoDeviceAlexNet("tiny", devices=("cpu", f"cuda:{count}")),
    )
    state = models.alexnet("tiny").state_dict()
    yield "state has no 'features.9.weight'", lambda: split_state(state, geometry.variant("source2012"))
    for convert in (split_state, merge_state):
        yield "fc8='splitt' is unknown", lambda convert=convert: convert(state, geometry.variant("tiny"), fc8="splitt")


@pytest.mark.parametrize(("message", "call"), list(_bad()), ids=lambda v: v if isinstance(v, str) else "")
def test_errors(message: str, call) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_from_another_kind_of_network() -> None:
    with pytest.raises(
        TypeError, match=r"model is torch.nn.modules.linear.Linear: an alexnet_kernels.models.AlexNet is"
    ):
        TwoDeviceAlexNet.from_one_device(torch.nn.Linear(1, 1), CPUS)


@pytest.mark.parametrize("fc8", FC8)
def test_from_a_network_with_another_head(fc8: str) -> None:
    """As fine-tuning replaces it."""
    one = models.alexnet("tiny").eval()
    one.classifier[-1] = torch.nn.Linear(one.classifier[-1].in_features, 5)
    two = TwoDeviceAlexNet.from_one_device(one, CPUS, fc8)
    x = torch.randn(1, 3, 227, 227)
    torch.testing.assert_close(two(x), one(x), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fc8", FC8)
def test_two_streams_on_one_gpu(fc8: str) -> None:
    """Fifty times, so that a missing wait between the streams has its chance."""
    one, two = pair(fc8=fc8, devices=("cuda:0", "cuda:0"))
    one = one.cuda().eval()
    two.eval()
    for _ in range(50):
        assert largest_difference(one, two, batch(one).cuda()) <= 1e-12
        one.zero_grad(), two.zero_grad()


@pytest.mark.two_gpu
@pytest.mark.parametrize("fc8", FC8)
def test_two_gpus(fc8: str) -> None:
    one, two = pair(fc8=fc8, devices=("cuda:0", "cuda:1"))
    one = one.cuda().eval()
    two.eval()
    for _ in range(20):
        assert largest_difference(one, two, batch(one).cuda()) <= 1e-12
        one.zero_grad(), two.zero_grad()
    assert math.isfinite(float(two(batch(one)).sum()))
