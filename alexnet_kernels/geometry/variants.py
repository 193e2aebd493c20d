"""The published variants: the numbers 11, 4, 96 and 227 are written here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from .layers import LRN, TOWERS, AdaptiveAvgPool, Conv, Dropout, Flatten, Linear, MaxPool, Op, ReLU, Scope, SpatialNorm
from .network import Group, Preprocess, Variant


def _network(
    channels: tuple[int, ...] = (96, 256, 384, 384, 256),
    hidden: int = 4096,
    *,
    groups: int = TOWERS,
    conv1: Callable[..., Conv] = Conv,
    after1: tuple[Op, ...] = (),
    after2: tuple[Op, ...] = (),
    after5: tuple[Op, ...] = (ReLU(), MaxPool()),
    conv_std: tuple[float | None, ...] = (0.01,) * 5,
    fc_std: tuple[float | None, ...] = (0.01,) * 3,
    one: float | None = 1.0,
    zero: float | None = 0.0,
    fc: Callable[[Linear], tuple[Op, ...]] = lambda layer: (layer, ReLU(), Dropout()),
    before_fc: tuple[Op, ...] = (Flatten(),),
) -> tuple[Group, ...]:
    """The five convolutions and three fully connected layers that all variants share; ``one`` and ``zero`` are the biases
    the paper sets to 1 (conv2, 4, 5, fc6, 7) and to 0 (conv1, 3, fc8)."""
    c1, c2, c3, c4, c5 = channels
    s1, s2, s3, s4, s5 = conv_std
    return (
        Group("conv1", (conv1(c1, 11, 4, std=s1, bias=zero), *after1)),
        Group("conv2", (Conv(c2, 5, 1, 2, groups, True, std=s2, bias=one), *after2)),
        Group("conv3", (Conv(c3, 3, 1, 1, std=s3, bias=zero), ReLU())),
        Group("conv4", (Conv(c4, 3, 1, 1, groups, True, std=s4, bias=one), ReLU())),
        Group("conv5", (Conv(c5, 3, 1, 1, groups, True, std=s5, bias=one), *after5)),
        Group("fc6", (*before_fc, *fc(Linear(hidden, fc_std[0], one)))),
        Group("fc7", fc(Linear(hidden, fc_std[1], one))),
        Group("fc8", (Linear(None, fc_std[2], zero),)),
    )


_IMAGENET_RGB = (122.679, 116.669, 104.007)  # the channel means of Caffe's imagenet_mean, 0-255
_RAW_RGB = Preprocess(mean=_IMAGENET_RGB)
_CAFFE_BGR = Preprocess(mean=_IMAGENET_RGB[::-1], channels="BGR", squash=True)
_UNIT_RGB = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=1 / 255)
_SOURCE_STD = (0.01, 0.01, 0.03, 0.03, 0.03)


def _source(scope: Scope, **layers: object) -> tuple[Group, ...]:
    norm = LRN(scope=scope)
    return _network(
        conv1=partial(Conv, ceil_mode=True),
        after1=(norm, MaxPool(), ReLU()),
        after2=(ReLU(), norm, SpatialNorm(), MaxPool()),
        after5=(MaxPool(), ReLU()),
        conv_std=_SOURCE_STD,
        **layers,  # type: ignore[arg-type]
    )


_CAFFE_LRN = LRN(k=1.0, scope="global")

_PAPER_BLOCK = (ReLU(), LRN(alpha_mode="sum"), MaxPool())
_PAPER = Variant(
    "paper",
    "the network as the 2012 paper words it (227 pixels make its 55x55 maps come out)",
    _network(after1=_PAPER_BLOCK, after2=_PAPER_BLOCK),
    _RAW_RGB,
)

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        v.name: v
        for v in (
            _PAPER,
            Variant(
                "source2012",
                "layers-145.cfg of the released source, the network that was trained: LRN before ReLU in block 1, "
                "a spatial norm in block 2, conv1 rounded up",
                _source("tower"),
                _RAW_RGB,
                (224, 224),
            ),
            Variant(
                "caffe",
                "bvlc_alexnet: the paper's order, k = 1, LRN over all channels",
                _network(
                    after1=(ReLU(), _CAFFE_LRN, MaxPool()),
                    after2=(ReLU(), _CAFFE_LRN, MaxPool()),
                    fc_std=(0.005, 0.005, 0.01),
                    one=0.1,
                ),
                _CAFFE_BGR,
            ),
            Variant(
                "caffenet",
                "bvlc_reference_caffenet: pooling before LRN",
                _network(
                    after1=(ReLU(), MaxPool(), _CAFFE_LRN),
                    after2=(ReLU(), MaxPool(), _CAFFE_LRN),
                    fc_std=(0.005, 0.005, 0.01),
                ),
                _CAFFE_BGR,
            ),
            Variant(
                "torchvision",
                "torchvision.models.alexnet, after 'One weird trick' (2014): narrower, ungrouped, no LRN, dropout first",
                _network(
                    (64, 192, 384, 256, 256),
                    groups=1,
                    conv1=partial(Conv, padding=2),
                    after1=(ReLU(), MaxPool()),
                    after2=(ReLU(), MaxPool()),
                    conv_std=(None,) * 5,
                    fc_std=(None,) * 3,
                    one=None,
                    zero=None,
                    fc=lambda layer: (Dropout(), layer, ReLU()),
                    before_fc=(AdaptiveAvgPool(6), Flatten()),
                ),
                _UNIT_RGB,
                (224, 224),
            ),
            Variant(
                "one_gpu",
                "layers-145-half: the paper's one-GPU control, half the maps, conv5 kept wide",
                _source("global", channels=(48, 128, 192, 192, 256), groups=1),
                _RAW_RGB,
                (224, 224),
            ),
            Variant(
                "tiny",
                "the paper network at an eighth of its width, for tests",
                _PAPER.narrowed(8).groups,
                _RAW_RGB,
            ),
        )
    }
)


def variant(name: str | Variant, **overrides: object) -> Variant:
    """A variant by name (or as it is), with ``Variant.override``'s changes; the valid names are ``VARIANTS``."""
    if isinstance(name, str) and name not in VARIANTS:
        raise ValueError(f"variant={name!r} is unknown; the variants are {', '.join(VARIANTS)}")
    found = VARIANTS[name] if isinstance(name, str) else name
    return found.override(**overrides) if overrides else found  # type: ignore[arg-type]
