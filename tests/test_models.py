"""The network on one device: the published counts, torchvision's names and logits, variants, printing, copying, pickling."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from alexnet_kernels import geometry, images, models, nn
from alexnet_kernels._fusion import steps
from alexnet_kernels.comparison.stock import stock_alexnet


def narrow(name: str) -> geometry.Variant:
    """A variant at a quarter of its width."""
    return geometry.variant(name).narrowed(1 if name == "tiny" else 4)


@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_parameters_are_the_geometrys(name: str) -> None:
    with torch.device("meta"):
        model = models.alexnet(name)
    assert sum(p.numel() for p in model.parameters()) == model.variant.parameters


@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_every_step_has_the_shape_that_geometry_says(name: str) -> None:
    model = models.alexnet(narrow(name), num_classes=10).eval()
    x = torch.zeros(1, 3, *model.variant.input_size)
    for facts, module in zip(model.variant.layers, model.steps(), strict=True):
        x = module(x)
        assert (*x.shape[1:], 1, 1)[:3] == facts.output, facts.name
    assert torch.equal(x, model(torch.zeros(1, 3, *model.variant.input_size)))


def test_torchvision_names_weights_and_logits() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.alexnet(weights=None).eval()
    ours = models.alexnet("torchvision").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(ours(x), theirs(x))
    small = torch.randn(2, 3, 180, 200)  # its adaptive pooling takes other sizes
    assert torch.equal(ours(small), theirs(small))


@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_stock_network_agrees(name: str) -> None:
    """The stock network has the same weights' names and gives the same logits: two independent expressions of a variant."""
    variant = narrow(name)
    ours, stock = models.alexnet(variant, 7).double().eval(), stock_alexnet(variant, 7).double().eval()
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *ours.variant.input_size, dtype=torch.double) * 60
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-11, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", geometry.VARIANTS)
def test_pixels_give_the_logits_of_prepared_images(name: str, layout: torch.memory_format) -> None:
    """uint8 RGB in either memory format, whatever scale, means and order of channels the variant was trained with.

    A prepared pixel is rounded thrice in fp32 and once more where scale and deviation are folded into one factor: within
    4 · 2^-24 of it. Logits, sums of fp64 from there on, move no more than in proportion: ten times that is allowed.
    """
    model = models.alexnet(narrow(name), num_classes=10).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5)
    pixels = torch.randint(256, (2, 3, *model.variant.input_size), dtype=torch.uint8).contiguous(memory_format=layout)
    prepared = images.prepare(pixels, model.variant.preprocess, torch.float64)
    logits = model(prepared)
    assert float((model(pixels) - logits).norm() / logits.norm()) <= 40 * 2.0**-24
    assert not torch.allclose(model(pixels.flip(1)), logits, rtol=1e-3)
    if model.variant.preprocess.channels == "RGB" and model.variant.preprocess.scale == 1:  # the very same arithmetic
        assert torch.equal(model(pixels), model(prepared.contiguous(memory_format=torch.channels_last)))


def test_conv1_takes_pixels_and_the_stock_network_does_not() -> None:
    model, stock = models.alexnet("tiny"), stock_alexnet("tiny")
    assert type(model.features[0]) is nn.PixelConv2d and type(stock.features[0]) is torch.nn.Conv2d
    assert type(models.alexnet(narrow("source2012")).features[0]) is nn.CeilConv2d
    assert list(model.state_dict()) == list(stock.state_dict())
    for block in (model.features, models.alexnet(narrow("source2012")).features):  # ReLU before LRN, and after pooling
        assert next(steps(block)).op == "alexnet_stem"
    assert not any(isinstance(module, nn.FusedSequential) for module in stock.modules())
    pixels = torch.zeros(1, 3, 227, 227, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="unsigned char"):
        stock(pixels)
    model.half()
    assert model.features[0].mean.dtype == torch.float32


def test_pixels_are_trained_on() -> None:
    """Gradients by pixels' weights are those by the prepared images', in Caffe's order of channels too."""
    model = models.alexnet("caffenet", num_classes=10, input_size=67).double().eval()
    pixels = torch.randint(256, (2, 3, 67, 67), dtype=torch.uint8)
    found = []
    for x in (pixels, images.prepare(pixels, model.variant.preprocess, torch.float64)):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)


def test_lrn_scope_can_be_overridden() -> None:
    towers, whole = (models.alexnet("tiny", lrn_scope=scope).eval() for scope in ("tower", "global"))
    whole.load_state_dict(towers.state_dict())
    x = torch.randn(1, 3, 227, 227) * 90
    a, b = (m.features[:3](x) for m in (towers, whole))
    differs = (a != b).flatten(2).any(2).any(0).nonzero().flatten()
    assert differs.tolist() == [4, 5, 6, 7]  # the two channels on each side of the border


def test_initialisation_is_the_variants() -> None:
    torch.manual_seed(1)
    model = models.alexnet("source2012")
    std = {
        f.name: m.weight.std().item() for f, m in zip(model.variant.layers, model.steps(), strict=True) if f.parameters
    }
    assert std == pytest.approx(
        {
            "conv1": 0.01,
            "conv2": 0.01,
            "conv3": 0.03,
            "conv4": 0.03,
            "conv5": 0.03,
            "fc6": 0.01,
            "fc7": 0.01,
            "fc8": 0.01,
        },
        rel=0.02,
    )
    bias = {
        f.name: m.bias.unique().tolist()
        for f, m in zip(model.variant.layers, model.steps(), strict=True)
        if f.parameters
    }
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert bias == {name: [1.0] if name in ones else [0.0] for name in std}


def test_ceil_mode_convolution_equals_right_and_bottom_padding() -> None:
    model = models.alexnet("source2012").double()
    conv, x = model.features[0], torch.randn(1, 3, 224, 224, dtype=torch.double)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 3))
    expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, stride=4)
    assert conv(x).shape == (1, 96, 55, 55)
    assert torch.equal(conv(x), expected)


def test_printed_copied_pickled_compiled() -> None:
    model = models.alexnet("tiny", input_size=67).eval()
    x = torch.randn(2, 3, 67, 67)
    assert "LocalResponseNorm(5" in repr(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_empty_batch() -> None:
    assert models.alexnet("tiny", input_size=67)(torch.zeros(0, 3, 67, 67)).shape == (0, 1000)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("variant='vgg' is unknown; the variants are paper, source2012", lambda: models.alexnet("vgg")),
        ("input_size=.*too small.*pool5", lambda: models.alexnet("tiny", input_size=40)),
        ("lrn_scope='both' is not a scope", lambda: models.alexnet("tiny", lrn_scope="both")),
        ("num_classes=0 must be at least 1", lambda: models.alexnet("tiny", num_classes=0)),
        ("conv_groups=3 is not a grouping", lambda: models.alexnet("tiny", conv_groups=3)),
    ],
)
def test_errors(message: str, call) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model = models.alexnet("tiny", input_size=67).cuda().to(dtype)
    x = torch.randn(4, 3, 67, 67, device="cuda", dtype=dtype)
    model(x).float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
