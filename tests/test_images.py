"""Photographs: every kind of picture, what is skipped and why, and the preparation that each variant demands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from alexnet_kernels import geometry, images

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
TINY = geometry.variant("tiny", input_size=67)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (90, 80), colour: object = None) -> Path:
    Image.new(mode, size, colour if colour is not None else 0).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "name", "colour", "expected"),
    [
        ("L", "grey.png", 200, (200, 200, 200)),
        ("RGBA", "alpha.png", (10, 20, 30, 40), (10, 20, 30)),
        ("P", "palette.png", 0, (0, 0, 0)),
        ("1", "bits.png", 1, (255, 255, 255)),
        ("CMYK", "ink.jpg", (0, 0, 0, 0), (255, 255, 255)),
        ("I;16", "deep.png", 257 * 100, (100, 100, 100)),
        ("I", "deeper.tif", 257 * 7, (7, 7, 7)),
    ],
)
def test_every_kind_of_picture(tmp_path: Path, mode: str, name: str, colour: object, expected: tuple[int, ...]) -> None:
    loaded = images.load([picture(tmp_path / name, mode, colour=colour)], TINY)
    assert loaded.pixels.shape == (1, 3, 67, 67)
    assert loaded.pixels.dtype == torch.uint8
    assert loaded.pixels[0, :, 30, 30].tolist() == pytest.approx(list(expected), abs=1)


def test_skipped_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    good = picture(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "empty.jpg").write_bytes(b"")
    loaded = images.load([good, tmp_path / "none.png", *sorted(tmp_path.glob("[tce]*"))], TINY)
    assert loaded.names == (str(good),)
    reasons = {Path(name).name: reason for name, reason in loaded.skipped}
    assert set(reasons) == {"none.png", "text.png", "cut.png", "empty.jpg"}
    assert reasons["none.png"] == "does not exist"
    assert "not an image" in reasons["text.png"]


def test_none_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none can be used \(.*gone.png: does not exist\); name at least one"):
        images.load([tmp_path / "gone.png"], TINY)
    with pytest.raises(ValueError, match="no image files were found"):
        images.load([], TINY)


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    other = tmp_path / "x" / "c.png"
    assert images.find([tmp_path, other]) == (tmp_path / "a.JPG", tmp_path / "b.png", other)


def test_shorter_side_or_both(tmp_path: Path) -> None:
    """The paper keeps the aspect and cuts; Caffe squashes, so that the edges stay in sight."""
    path = tmp_path / "wide.png"
    image = Image.new("RGB", (600, 200))
    image.paste((255, 0, 0), (0, 0, 180, 200))
    image.save(path)
    paper, caffe = (images.load([path], geometry.variant(name)).pixels[0, 0] for name in ("paper", "caffe"))
    assert paper.max() == 0
    assert caffe[:, 0].min() == 255


def test_rotation_by_exif(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 100))
    image.paste((255, 255, 255), (0, 0, 100, 50))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.jpg", exif=exif)
    pixels = images.load([tmp_path / "turned.jpg"], TINY).pixels[0, 0]
    assert pixels[5].float().mean() < 30 < 220 < pixels[-5].float().mean()


def test_prepared_as_the_variant_was_fed() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    caffe = images.prepare(pixels, geometry.variant("caffe").preprocess)
    mean = torch.tensor([104.007, 116.669, 122.679]).view(3, 1, 1)
    torch.testing.assert_close(caffe, pixels[:, [2, 1, 0]].float() - mean)
    unit = images.prepare(pixels, geometry.variant("torchvision").preprocess, torch.float64)
    assert unit.dtype == torch.float64
    expected = (pixels[:, 0].float() / 255 - 0.485) / 0.229
    torch.testing.assert_close(unit[:, 0].float(), expected)


def test_pixels_lie_as_they_were_decoded(tmp_path: Path) -> None:
    """[H, W, C] in memory, which is channels_last; so do batches of them, and prepared images."""
    loaded = images.load([picture(tmp_path / f"{i}.png", colour=(i, 2, 3)) for i in (7, 9)], TINY)
    assert loaded.pixels.is_contiguous(memory_format=torch.channels_last)
    batch = loaded.batch(3)
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch[:, 0, 5, 5].tolist() == [7, 9, 7]
    assert images.prepare(batch, TINY.preprocess).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_pinned_batch_is_copied_beside_the_cpu() -> None:
    loaded = images.Loaded(torch.zeros(2, 3, 5, 5, dtype=torch.uint8), ("a", "b"))
    assert loaded.batch(4, pinned=True).is_pinned() and not loaded.batch(4).is_pinned()


def test_a_batch_repeats_the_files() -> None:
    loaded = images.Loaded(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), ("a", "b", "c"))
    assert loaded.batch(7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert loaded.batch(0).shape == (0, 1, 1, 1)


def test_default_photographs_exist() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    files = images.default_photographs()
    assert [f.name for f in files] == list(images.PHOTOGRAPHS)
    assert all(f.is_file() for f in files)


def test_without_pillow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = picture(tmp_path / "good.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Pillow is needed for reading .*: pip install 'alexnet-kernels\[bench\]'"):
        images.load([good], TINY)


def test_without_scikit_image_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"name image files or a folder, or pip install 'alexnet-kernels\[bench\]'"
    ):
        images.default_photographs()
