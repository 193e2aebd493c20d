"""Photographs for a network: read, resized and cropped as the variant demands, 8-bit until the device.

Every picture Pillow opens works: grey, palette, RGBA (its alpha is dropped), CMYK, 16-bit, rotated by EXIF. A file that
does not open is named with its reason and skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._files import require
from .geometry import Preprocess, Variant

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Loaded:
    """``pixels``: uint8 RGB, ``[N, 3, H, W]`` in channels_last, as they were decoded; ``names``: the N files; ``skipped``:
    (file, reason) of those left out."""

    pixels: Tensor
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def batch(self, size: int, *, pinned: bool = False) -> Tensor:
        """``size`` images, the files over and over in turn; ``pinned``, a GPU copies them while the CPU goes on."""
        chosen = self.pixels[torch.arange(size) % len(self.names)].contiguous(memory_format=torch.channels_last)
        return chosen.pin_memory() if pinned else chosen


def default_photographs() -> tuple[Path, ...]:
    """The photographs that ship inside scikit-image, found without importing it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "no images were named and scikit-image, whose photographs stand in, is not installed: "
            "name image files or a folder, or pip install 'alexnet-kernels[bench]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    return tuple(folder / name for name in PHOTOGRAPHS)


def find(places: Iterable[str | Path]) -> tuple[Path, ...]:
    """The image files named, and those directly inside the folders named (by suffix, in order of name)."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        else:
            found.append(place)
    return tuple(found)


def load(files: Sequence[str | Path], variant: Variant) -> Loaded:
    """Read ``files`` as ``variant`` wants them: resized, centre-cropped to ``variant.input_size``, RGB, 8 bits.

    Raises:
        ValueError: none of the files could be read; the message gives each reason.
        ImportError: Pillow is not installed.
    """
    pixels, names, skipped = [], [], []
    for file in files:
        try:
            pixels.append(_fit(_open(Path(file)), variant))
            names.append(str(file))
        except (OSError, ValueError, SyntaxError) as error:
            skipped.append((str(file), _reason(error)))
    if not pixels:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or "no image files were found"
        raise ValueError(
            f"images: none can be used ({reasons}); name at least one readable image file or a folder that has one"
        )
    return Loaded(torch.stack(pixels).permute(0, 3, 1, 2), tuple(names), tuple(skipped))


def prepare(pixels: Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 RGB ``[N, 3, H, W]`` to what the network was fed: ``(pixel * scale - mean) / std`` in its channel order."""
    ordered = pixels.flip(1) if preprocess.channels == "BGR" else pixels
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return ((ordered.float() * preprocess.scale - mean) / std).to(dtype)


def _open(file: Path) -> Image:
    require("PIL", f"reading {file}")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or a damaged one") from error
    except Image.DecompressionBombError as error:
        raise ValueError("has too many pixels to be opened safely") from error
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit grey
        image = image.convert("F").point(lambda value: value * (1 / 257) + 0.0).convert("L")
    return image.convert("RGB")


def _fit(image: Image, variant: Variant) -> Tensor:
    """Resize (the shorter side, or both where the variant squashes), crop the centre; ``[H, W, 3]``."""
    from PIL import Image

    height, width = variant.input_size
    short = max(variant.preprocess.resize, height, width)
    if variant.preprocess.squash:
        size = (short, short)
    else:
        ratio = short / min(image.size)
        size = (max(short, round(image.width * ratio)), max(short, round(image.height * ratio)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    fitted = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
