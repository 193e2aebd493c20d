"""A converted model is the same model: torchvision's networks and an LPIPS-shaped one, in everything that one can do to them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

from alexnet_kernels import functional as F
from alexnet_kernels import nn
from alexnet_kernels.convert import conversion_report, convert, revert

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]

tnn = torch.nn


class Perceptual(tnn.Module):
    """The shape of LPIPS: AlexNet's features in five slices that keep their names, weighted differences of what each gives."""

    def __init__(self) -> None:
        super().__init__()
        features = torchvision.models.alexnet(weights=None).features
        cuts = (0, 2, 5, 8, 10, 12)
        for i, (first, last) in enumerate(itertools.pairwise(cuts), 1):
            part = tnn.Sequential()
            for index in range(first, last):
                part.add_module(str(index), features[index])
            self.add_module(f"slice{i}", part)
        widths = (64, 192, 384, 256, 256)
        self.lins = tnn.ModuleList(tnn.Sequential(tnn.Dropout(), tnn.Conv2d(c, 1, 1, bias=False)) for c in widths)

    def forward(self, x: Tensor) -> Tensor:
        """The distance between each image and its mirror image."""
        total, pair = x.new_zeros(len(x)), (x, x.flip(-1))
        for i, lin in enumerate(self.lins, 1):
            pair = tuple(getattr(self, f"slice{i}")(half) for half in pair)
            a, b = (torch.nn.functional.normalize(half, dim=1) for half in pair)
            total = total + lin((a - b).square()).mean((1, 2, 3))
        return total


def with_lrn() -> tnn.Module:
    """Both orders of LRN and pooling, as in the paper and as in CaffeNet, at a scale at which the norm does something."""
    norm = lambda: tnn.LocalResponseNorm(5, 0.3, k=2.0)  # noqa: E731
    return tnn.Sequential(
        *(tnn.Conv2d(3, 16, 5, 2), tnn.ReLU(inplace=True), norm(), tnn.MaxPool2d(3, 2)),
        *(tnn.Conv2d(16, 16, 3, padding=1, groups=2), tnn.ReLU(inplace=True), tnn.MaxPool2d(3, 2), norm()),
        *(tnn.Flatten(), tnn.LazyLinear(8), tnn.ReLU(), tnn.Linear(8, 4)),
    )


def narrow(model: tnn.Module) -> tnn.Module:
    """With a narrow classifier: its layers hold nine tenths of the weights and nothing of what is tested here."""
    widths = iter((32, 32, 10))
    wide = 0
    for index, layer in enumerate(model.classifier):
        if isinstance(layer, tnn.Linear):
            after = next(widths)
            model.classifier[index] = tnn.Linear(wide or layer.in_features, after)
            wide = after
    return model


MODELS: dict[str, tuple[Callable[[], tnn.Module], int]] = {  # and the smallest images that they take, nearly
    "alexnet": (lambda: narrow(torchvision.models.alexnet(weights=None)), 67),
    "vgg11": (lambda: narrow(torchvision.models.vgg11(weights=None, init_weights=False)), 33),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(weights=None), 35),
    "googlenet": (lambda: torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False), 33),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 33),
    "perceptual": (Perceptual, 67),
    "lrn": (with_lrn, 39),
}


@functools.cache
def original(name: str) -> tuple[tnn.Module, Tensor]:
    """A model and images. ``eval``: what dropout's masks do is compared in a test of its own."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        model(x)  # lets lazy layers take their shapes
    return model, x


def build(name: str) -> tuple[tnn.Module, tnn.Module, Tensor]:
    """A model, its converted copy, and images; a test may change all three."""
    model, x = original(name)
    return copy.deepcopy(model), convert(copy.deepcopy(model)), x.clone()


def alexnet() -> tuple[tnn.Module, tnn.Module, Tensor]:
    return build("alexnet")


# Up to 25088 products a sum and eight sums in a row; a single value may be far off where the two cancel, a norm may not.
TOLERANCE = 8 * math.sqrt(25088) * torch.finfo(torch.float32).eps


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).norm() <= TOLERANCE * b.norm()


def gradients(model: tnn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_keys_and_parameters(name: str) -> None:
    model, _, x = build(name)
    ours = copy.deepcopy(model)
    before = [(n, id(m), list(vars(m))) for n, m in ours.named_modules()]
    tensors = [(n, id(t)) for n, t in ours.state_dict(keep_vars=True).items()]
    optimiser = torch.optim.SGD(ours.parameters(), 0.1)
    assert convert(ours) is ours
    assert [(n, id(m), list(vars(m))) for n, m in ours.named_modules()] == before
    assert [(n, id(t)) for n, t in ours.state_dict(keep_vars=True).items()] == tensors
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [id(p) for p in optimiser.param_groups[0]["params"]] == [id(p) for p in ours.parameters()]
    with torch.no_grad():
        assert_close(ours(x), model(x))
    for a, b in zip(gradients(ours, x), gradients(model, x), strict=True):
        assert_close(a, b)


RUNS = {
    "alexnet": ["conv2d_relu"] * 2 + ["conv2d_relu_chain", "linear_relu_dropout", "linear_relu"],
    "vgg11": ["conv2d_relu"] * 2 + ["conv2d_relu_chain"] * 3 + ["linear_relu_dropout"] * 2,
    "squeezenet": ["conv2d_relu"] * 2,
    "googlenet": [],
    "resnet18": [],
    "perceptual": ["conv2d_relu"] * 5,
    "lrn": ["conv2d_relu_lrn_max_pool2d", "conv2d_relu_max_pool2d_lrn", "linear_relu"],
}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_says_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, x = build(name)
    made: list[str] = []
    for op in set(RUNS[name]):
        original = getattr(F, op)
        monkeypatch.setattr(F, op, lambda *a, op=op, f=original, **k: made.append(op) or f(*a, **k))
    with torch.no_grad():
        ours(x)
    report = conversion_report(ours)
    times = 2 if name == "perceptual" else 1
    assert sorted(made) == sorted(RUNS[name] * times)
    assert [run.operation for run in report.fused] == RUNS[name]


@pytest.mark.parametrize("name", MODELS)
def test_revert_restores_every_class(name: str) -> None:
    model, ours, _ = build(name)
    assert [type(m) for m in ours.modules()] != [type(m) for m in model.modules()]
    assert revert(ours) is ours
    assert [(type(m), list(vars(m))) for m in ours.modules()] == [(type(m), list(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    _, ours, x = build(name)
    with torch.no_grad():
        assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))


# GoogLeNet's and ResNet's containers hold nothing but modules of their own: what export and trace make of them is made
# of AlexNet's and the LRN network's too.
@pytest.mark.parametrize("name", ["alexnet", "squeezenet", "perceptual", "lrn"])
def test_exported_and_traced(name: str) -> None:
    model, ours, x = build(name)
    with torch.no_grad():
        assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))
        traced = torch.jit.trace(ours, x)
        assert_close(traced(x), ours(x))
    if name == "alexnet":
        assert traced.code == torch.jit.trace(model, x).code


def test_compiled_with_gradients() -> None:
    _, ours, x = build("lrn")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), gradients(ours, x), strict=True):
        assert_close(a, b)


def test_converting_a_compiled_model() -> None:
    """What was compiled before is compiled anew: the classes are part of what a graph depends on."""
    torch._dynamo.reset()
    model, _, x = build("lrn")
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    with torch.no_grad():
        expected = compiled(x)
        assert convert(compiled) is compiled
        assert_close(compiled(x), expected)
    assert "alexnet_kernels" not in graphs[0] and "alexnet_kernels" in graphs[-1]
    report = conversion_report(compiled)
    assert len(report.fused) == 3 and report.changed[0].name == "_orig_mod"


def test_every_slice_and_every_child() -> None:
    model, ours, x = alexnet()
    with torch.no_grad():
        for k in range(len(model.features) + 1):
            assert_close(ours.features[:k](x), model.features[:k](x))
        for a, b in zip(ours.features, model.features, strict=True):
            assert repr(a) == repr(b)
            assert_close(a(x), b(x))
            x = b(x)


def test_a_hook_added_after_conversion() -> None:
    """Grad-CAM's two hooks, on the last convolution, before its ReLU."""
    seen: list[list[Tensor]] = []
    *models, x = alexnet()
    for model in models:
        log: list[Tensor] = []
        model(x)
        model.features[11].inplace = False  # torch's own condition for a backward hook before it
        model.features[10].register_forward_hook(lambda _, __, out, log=log: log.append(out.detach().clone()))
        model.features[10].register_full_backward_hook(lambda _, __, g, log=log: log.append(g[0].clone()))
        model(x).sum().backward()
        seen.append(log)
    assert len(seen[0]) == 2 and (seen[0][0] < 0).any()
    for a, b in zip(*seen, strict=True):
        assert_close(a, b)


def test_a_feature_extractor_that_reads_before_a_relu() -> None:
    model, ours, x = alexnet()
    nodes = {"features.8": "conv4", "features.9": "relu4", "classifier.4": "fc7", "features.2": "pool1"}
    with torch.no_grad():
        a, b = (create_feature_extractor(m, nodes)(x) for m in (ours, model))
    assert list(a) == list(b)
    for key in b:
        assert_close(a[key], b[key])


def test_deepcopy_and_pickle() -> None:
    _, ours, x = build("lrn")
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is nn.FusedSequential and torch.equal(again(x), ours(x))
        assert conversion_report(again) == conversion_report(ours)


def test_training_with_dropout_is_the_same_training() -> None:
    """One seed draws the same masks, an optimiser made before the conversion goes on, momentum and all."""
    model, ours, x = alexnet()
    revert(ours)
    labels = torch.tensor([1, 7])
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9) for m in (ours, model)]
    for step in range(3):
        for net, optimiser in zip((ours, model), optimisers, strict=True):
            torch.manual_seed(step)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net.train()(x), labels).backward()
            optimiser.step()
        convert(ours)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        assert_close(a, b)


def test_distributed_data_parallel(tmp_path) -> None:
    """Converted before it is wrapped, and inside the wrapper."""
    model, ours, x = build("lrn")
    expected = gradients(model, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = tnn.parallel.DistributedDataParallel
        for wrapped in (parallel(ours), convert(parallel(copy.deepcopy(model)))):
            assert type(wrapped) is parallel and type(wrapped.module) is nn.FusedSequential
            assert len(conversion_report(wrapped).fused) == 3
            for a, b in zip(gradients(wrapped, x), expected, strict=True):
                assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


NORMALISERS: dict[str, tuple[Callable[[tnn.Module], object], str]] = {
    "weight_norm": (torch.nn.utils.weight_norm, "pre-hook: weight_norm"),
    "spectral_norm": (torch.nn.utils.spectral_norm, "pre-hook: spectral_norm"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "pre-hook: l1_unstructured"),
    "parametrised weight_norm": (parametrizations.weight_norm, "parametrized"),
    "parametrised spectral_norm": (parametrizations.spectral_norm, "parametrized"),
    "parametrised orthogonal": (parametrizations.orthogonal, "parametrized"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NORMALISERS)
def test_normalised_weights_are_never_stale(name: str, when: str) -> None:
    """Applied before or after the conversion; values before an optimiser's step, and after it."""
    apply, reason = NORMALISERS[name]

    def make(change: Callable[[tnn.Module], tnn.Module]) -> tnn.Module:
        torch.manual_seed(1)
        made = tnn.Sequential(tnn.Conv2d(3, 4, 3), tnn.ReLU(), tnn.Flatten(), tnn.Linear(64, 3), tnn.ReLU())
        if when == "after":
            change(made)
        for index in (0, 3):
            apply(made[index])
        return change(made)

    ours, theirs = make(convert), make(lambda model: model)
    x = torch.randn(2, 3, 6, 6)
    report = conversion_report(ours)
    assert not report.fused and [entry.reason for entry in report.unfused] == [reason] * 2
    optimisers = [torch.optim.SGD(m.parameters(), 0.5) for m in (ours, theirs)]
    outputs = []
    for _ in range(3):
        outputs.append(ours(x).detach())
        assert_close(outputs[-1], theirs(x).detach())
        for net, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            net(x).square().sum().backward()
            optimiser.step()
    assert not torch.equal(outputs[0], outputs[1]), "nothing moved: the test would prove nothing"


def test_twice_is_once_and_subclasses_are_left_alone() -> None:
    class Mine(tnn.Sequential):
        pass

    model = tnn.Sequential(Mine(tnn.Conv2d(3, 3, 1), tnn.ReLU()), tnn.LocalResponseNorm(5), tnn.MaxPool2d(2))
    types = [type(m) for m in convert(model).modules()]
    assert types == [nn.FusedSequential, Mine, tnn.Conv2d, tnn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d]
    assert [type(m) for m in convert(model).modules()] == types
    assert type(convert(tnn.MaxPool2d(2))) is nn.MaxPool2d


def test_revert_of_what_was_built_as_ours() -> None:
    """A class of torch's where it says the same, ours where torch has none."""
    model = tnn.ModuleList(
        [
            *(
                nn.LocalResponseNorm(5, 0.1),
                nn.LocalResponseNorm(5, groups=2),
                nn.LocalResponseNorm(5, alpha_mode="sum"),
            ),
            *(nn.MaxPool2d(2), nn.FusedSequential(nn.ConvReLU2d(1, 1, 1)), nn.LRNMaxPool2d(5)),
        ]
    )
    types = [type(m) for m in revert(model)]
    assert types[:3] == [tnn.LocalResponseNorm, nn.LocalResponseNorm, nn.LocalResponseNorm]
    assert types[3:] == [tnn.MaxPool2d, tnn.Sequential, nn.LRNMaxPool2d] and type(model[4][0]) is nn.ConvReLU2d
    assert vars(model[0]).keys() == vars(tnn.LocalResponseNorm(5)).keys()
    assert (model[1].groups, model[2].alpha_mode) == (2, "sum")
    scriptable = revert(convert(with_lrn()))
    assert scriptable[2](torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)


def test_report_names_what_does_not_fuse_and_why() -> None:
    class Own(tnn.Conv2d):
        pass

    class Block(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.whole = tnn.Conv2d(3, 3, 1), nn.ConvReLU2d(3, 3, 1)

    def conv(**options: object) -> tnn.Conv2d:
        return tnn.Conv2d(3, 3, 3, padding=1, **options)

    patched, watched, compiled = conv(), conv(), conv()
    patched.forward = lambda x: x
    watched.register_forward_hook(print)
    compiled.compile(backend="eager")
    relu = tnn.ReLU()
    relu.register_full_backward_hook(print)
    children = [
        *(conv(), tnn.ReLU(), patched, tnn.ReLU(), watched, tnn.ReLU(), compiled, tnn.ReLU()),
        *(conv(padding_mode="reflect"), tnn.ReLU(), conv(), relu, Own(3, 3, 1), tnn.ReLU(), conv(), tnn.Dropout()),
        *(tnn.LocalResponseNorm(3), tnn.MaxPool2d(2, return_indices=True), Block(), nn.ConvReLU2d(3, 3, 1)),
        *(torchvision.ops.Conv2dNormActivation(3, 3), torch.jit.script(tnn.Sequential(conv())), conv()),
    ]
    model = convert(tnn.ModuleDict({"net": tnn.Sequential(*children), "lone": conv()}))
    model["late"] = tnn.Sequential(conv())
    report = conversion_report(model)
    assert [(run.names, run.operation) for run in report.fused] == [(("net.0", "net.1"), "conv2d_relu")]
    assert {entry.name: entry.reason for entry in report.unfused} == {
        "lone": "not in a Sequential",
        "net.2": "custom forward",
        "net.4": "hook: print",
        "net.6": "compiled by itself",
        "net.8": "padding_mode=reflect",
        "net.10": "ReLU after it: backward hook: print",
        "net.12": "custom class Own",
        "net.14": "no known run: Dropout follows",
        "net.16": "MaxPool2d after it: return_indices=True",
        "net.17": "return_indices=True",
        "net.18.conv": "not in a Sequential",
        "net.20.0": "in a Conv2dNormActivation, a Sequential of its own class",
        "net.22": "last in its Sequential",
        "late.0": "its Sequential is not converted",
    }
    assert [change.name for change in report.changed] == ["net", "net.16", "net.17"]
    text = str(report)
    assert text.startswith(
        "3 modules changed class, 1 run fuses, 14 layers do not\nchanged class:\n  net: torch.nn.Seq"
    )
    assert "  net.10 (Conv2d): ReLU after it: backward hook: print" in text
    assert json.loads(json.dumps(report.to_json()))["fused"] == [
        {"names": ["net.0", "net.1"], "operation": "conv2d_relu"}
    ]
    handle = tnn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        watched_by_all = conversion_report(model)
    finally:
        handle.remove()
    assert not watched_by_all.fused and "global module hook" in str(watched_by_all)
    assert report == conversion_report(model)


def test_report_of_one_layer_and_of_nothing() -> None:
    assert str(conversion_report(convert(tnn.MaxPool2d(2)))) == (
        "1 module changed class, 0 runs fuse, 1 layer does not\nchanged class:\n"
        "  (model): torch.nn.MaxPool2d -> alexnet_kernels.nn.MaxPool2d\nby themselves:\n"
        "  (model) (MaxPool2d): not in a Sequential"
    )
    assert str(conversion_report(tnn.Identity())) == "0 modules changed class, 0 runs fuse, 0 layers do not"


@pytest.mark.parametrize(
    ("call", "verb"), [(convert, "converted"), (revert, "reverted"), (conversion_report, "reported on")]
)
def test_errors(call: Callable[[object], object], verb: str) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        call({})
    scripted = torch.jit.script(tnn.Sequential(tnn.ReLU()))
    traced = torch.jit.trace(tnn.Sequential(tnn.ReLU()), torch.ones(1))
    for module in (scripted, traced):
        with pytest.raises(TypeError, match=rf"model is a \w+Module: .*{verb}.*module it was made from.*revert first"):
            call(module)
    inside = tnn.ModuleList([scripted, tnn.Sequential()])
    convert(inside)
    assert inside[0] is scripted and type(inside[1]) is nn.FusedSequential


def test_scripting_a_converted_model_names_the_remedy() -> None:
    model, ours, x = build("lrn")
    with pytest.raises(RuntimeError, match="FusedSequential cannot be scripted: revert first"):
        torch.jit.script(ours)
    assert_close(torch.jit.script(revert(ours))(x), model(x))
