"""The network's published figures, counted anew without the package, and what geometry promises for any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alexnet_kernels.geometry import VARIANTS, Conv, Linear, variant

MIB = 1 << 20
PLAIN = {  # name -> channels, groups of conv2/4/5, side of the image, padding of conv1
    "paper": ((96, 256, 384, 384, 256), 2, 227, 0),
    "torchvision": ((64, 192, 384, 256, 256), 1, 224, 2),
}


def plain(channels: tuple[int, ...], groups: int, padding: int, classes: int = 1000) -> nn.Sequential:
    """AlexNet's weighted layers, ReLUs and pools, in torch and by hand."""
    c1, c2, c3, c4, c5 = channels
    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        *(nn.Conv2d(3, c1, 11, 4, padding), nn.ReLU(), pool),
        *(nn.Conv2d(c1, c2, 5, padding=2, groups=groups), nn.ReLU(), pool),
        *(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c3, c4, 3, padding=1, groups=groups), nn.ReLU()),
        *(nn.Conv2d(c4, c5, 3, padding=1, groups=groups), nn.ReLU(), pool, nn.Flatten()),
        *(nn.Linear(c5 * 36, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)),
    )


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "neurons"),
    [
        ("paper", 60_965_224, 724_406_816, 659_272),
        ("source2012", 60_965_224, 724_406_816, 659_272),
        ("caffe", 60_965_224, 724_406_816, 659_272),
        ("caffenet", 60_965_224, 724_406_816, 659_272),
        ("torchvision", 61_100_840, 714_188_480, None),
        ("one_gpu", 59_798_312, None, None),
    ],
)
def test_published_totals(name: str, parameters: int, macs: int | None, neurons: int | None) -> None:
    net = variant(name)
    assert net.parameters == parameters
    assert macs is None or net.macs == macs
    assert neurons is None or net.neurons == neurons
    assert net.connections == net.macs + net.neurons


def test_paper_ungrouped() -> None:
    merged = variant("paper", conv_groups=1)
    assert merged.parameters == 62_378_344
    assert merged.macs == 1_135_256_096
    assert [e.layer for e in merged.exchanges()] == ["conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


@pytest.mark.parametrize("name", PLAIN)
def test_counts_agree_with_torch(name: str) -> None:
    channels, groups, side, padding = PLAIN[name]
    facts = [f for f in variant(name).layers if f.parameters]
    with torch.device("meta"):
        net = plain(channels, groups, padding)
        seen: list[tuple[int, tuple[int, ...]]] = []
        for module in net:
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(
                    lambda m, _, out: seen.append((sum(p.numel() for p in m.parameters()), tuple(out.shape[1:])))
                )
        net(torch.empty(1, 3, side, side))
    assert [count for count, _ in seen] == [f.parameters for f in facts]
    assert [shape for _, shape in seen] == [f.output if isinstance(f.op, Conv) else f.output[:1] for f in facts]
    assert sum(p.numel() for p in net.parameters()) == variant(name).parameters
    for module, fact in zip((m for m in net if isinstance(m, nn.Conv2d | nn.Linear)), facts, strict=True):
        assert fact.macs == module.weight.numel() * fact.output[1] * fact.output[2]


@pytest.mark.parametrize("name", ["paper", "source2012", "caffe", "caffenet", "torchvision", "one_gpu"])
def test_map_sizes(name: str) -> None:
    sides = {f.name: f.output[1:] for f in variant(name).layers}
    assert sides["conv1"] == (55, 55)
    assert sides["pool1"] == sides["conv2"] == (27, 27)
    assert sides["pool2"] == sides["conv3"] == sides["conv4"] == sides["conv5"] == (13, 13)
    assert sides["pool5"] == (6, 6)


def test_two_devices_as_in_2012() -> None:
    paper = variant("paper")
    assert [paper.device_parameters(d) for d in (0, 1)] == [32_531_112, 28_434_112]
    mib = [(e.layer, e.bytes(128) / MIB, e.directions) for e in paper.exchanges()]
    assert mib == [("conv3", 10.5625, 2), ("fc6", 2.25, 2), ("fc7", 1.0, 2), ("fc8", 1.0, 1)]
    assert paper.exchanges("split")[-1].values == 1000


def test_a_global_norm_needs_a_halo() -> None:
    halos = variant("paper", lrn_scope="global").exchanges()[:2]
    assert [(e.layer, e.values) for e in halos] == [("norm1", 2 * 55 * 55), ("norm2", 2 * 27 * 27)]
    assert variant("caffe", lrn_scope="tower").exchanges() == variant("paper").exchanges()


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(VARIANTS)),
    num_classes=st.integers(1, 5000),
    height=st.integers(67, 500),
    width=st.integers(67, 500),
    fc8=st.sampled_from(["device0", "split"]),
    batch=st.integers(1, 512),
)
def test_any_size(name: str, num_classes: int, height: int, width: int, fc8: str, batch: int) -> None:
    net = variant(name, num_classes=num_classes, input_size=(height, width))
    assert net.device_parameters(0, fc8) + net.device_parameters(1, fc8) == net.parameters
    assert net.layers[-1].output == (num_classes, 1, 1)
    assert all(before.output == after.input for before, after in zip(net.layers, net.layers[1:], strict=False))
    for exchange in net.exchanges(fc8):
        assert exchange.bytes(batch) == batch * exchange.bytes(1) == 2 * exchange.bytes(batch, itemsize=2)
    assert net.flops() == 2 * net.macs < net.flops(training=True) <= 6 * net.macs


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["paper", "source2012", "torchvision"]),
    height=st.integers(67, 300),
    width=st.integers(67, 300),
)
def test_convolutions_of_any_size_are_torchs(name: str, height: int, width: int) -> None:
    for f in variant(name, input_size=(height, width)).layers:
        if isinstance(f.op, Conv):
            conv = f.op
            x = torch.empty(1, *f.input, device="meta")
            x = nn.functional.pad(x, (0, conv.extra(f.input[2]), 0, conv.extra(f.input[1])))
            weight = torch.empty(conv.out_channels, f.input[0] // conv.groups, conv.kernel, conv.kernel, device="meta")
            out = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups)
            assert tuple(out.shape[1:]) == f.output
            assert f.parameters == weight.numel() + conv.out_channels


def test_overrides_change_only_what_they_name() -> None:
    paper = variant("paper")
    ten = paper.override(num_classes=10)
    assert ten.layers[-1].parameters == 10 * 4097
    assert ten.layers[:-1] == paper.layers[:-1]
    assert variant(paper) is paper
    assert variant("paper", input_size=224).layers[0].output == (96, 54, 54)
    assert variant("source2012", input_size=224) == variant("source2012")
    assert [f.op.p for f in variant("paper", dropout=0.1).layers if f.op.prefix == "drop"] == [0.1, 0.1]
    assert all(f.op.scope == "global" for f in variant("paper", lrn_scope="global").layers if f.op.prefix == "norm")
    assert all(f.op.groups == 1 for f in variant("paper", conv_groups=1).layers if f.op.prefix == "conv")
    assert sum(isinstance(f.op, Linear) for f in paper.layers) == 3


def test_rounding_up_shows_in_the_formula() -> None:
    assert variant("paper").layers[0].formula == "(227-11)/4+1"
    assert variant("source2012").layers[0].formula == "(224+3-11)/4+1"


def test_errors_name_the_argument_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="variant='papr' is unknown") as unknown:
        variant("papr")
    assert all(name in str(unknown.value) for name in VARIANTS)
    with pytest.raises(
        ValueError, match=r"input_size=\(40, 40\) is too small for variant 'paper': pool5 .* larger image"
    ):
        variant("paper", input_size=40)
    with pytest.raises(ValueError, match="conv1 gets a 9x9 map"):
        variant("paper", input_size=9)
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        variant("paper", num_classes=0)
    with pytest.raises(ValueError, match="lrn_scope='both' is not a scope: use 'tower'"):
        variant("paper", lrn_scope="both")
