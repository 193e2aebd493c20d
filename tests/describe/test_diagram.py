"""The pictures: written whole, for every variant, without a display and without touching matplotlib's state."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_kernels.describe import describe, diagram, draw, draw_network
from alexnet_kernels.geometry import VARIANTS

matplotlib = pytest.importorskip("matplotlib")


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every text drawn, as (axes, text object)."""
    drawn: list = []
    label = diagram._label

    def spy(ax, *args, **kwargs) -> None:
        label(ax, *args, **kwargs)
        drawn.append((ax, ax.texts[-1]))

    monkeypatch.setattr(diagram, "_label", spy)
    return drawn


def test_the_picture_for_the_readme(tmp_path: Path) -> None:
    path = tmp_path / "two_device.png"
    assert draw_network("paper", path) == ""
    assert size(path) == (1600, 720)
    assert path.stat().st_size < 300_000
    assert names(tmp_path) == ["two_device.png"]


def test_all_layers_have_a_panel(tmp_path: Path, texts: list) -> None:
    path = tmp_path / "all.png"
    draw("paper", path)
    width, height = size(path)
    assert width == 1600
    assert height > 1400
    words = [text.get_text() for _, text in texts]
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        assert words.count(layer) == 2  # once above its column, once on its panel
    for exchange in ("10.56 MiB", "2.25 MiB", "1.00 MiB"):
        assert exchange in words
    assert words.count("1.00 MiB") == 2
    assert {"55×55×48", "(227-11)/4+1 = 55, pooled 27", "32,531,112 parameters", "28,434,112 parameters"} <= set(words)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scope", ["tower", "global"])
def test_labels_do_not_overlap(name: str, scope: str, tmp_path: Path, texts: list) -> None:
    draw(describe(name, lrn_scope=scope), tmp_path / "net.png")
    boxes = [(ax, text.get_window_extent(), text.get_text()) for ax, text in texts]
    for i, (ax, box, word) in enumerate(boxes):
        frame = ax.get_window_extent()
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, word
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, word
        for other_ax, other, other_word in boxes[:i]:
            assert ax is not other_ax or not box.overlaps(other), (word, other_word)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 67},
        {"input_size": (67, 900)},
        {"num_classes": 1, "batch": 1},
        {"num_classes": 21_841, "batch": 100_000},
    ],
)
def test_any_size_can_be_drawn(options: dict, tmp_path: Path) -> None:
    draw(describe("paper", **options), tmp_path / "net.png")
    assert size(tmp_path / "net.png")[0] == 1600


def test_no_chinese_font_is_said_and_drawn_in_english(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list
) -> None:
    monkeypatch.setattr(diagram, "FONTS", ())
    note = draw_network("paper", tmp_path / "zh.png", lang="zh")
    assert "没有安装中文字体" in note
    assert "\n" not in note
    assert "device 0" in [text.get_text() for _, text in texts]


def test_a_chinese_font_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list) -> None:
    monkeypatch.setattr(diagram, "FONTS", ("DejaVu Serif",))  # installed with matplotlib; stands for any that is found
    with pytest.warns(UserWarning, match="Glyph"):
        assert draw_network("paper", tmp_path / "zh.png", lang="zh") == ""
    assert "设备 0" in [text.get_text() for _, text in texts]
    assert "DejaVu Serif" in texts[0][1].get_fontfamily()


@pytest.mark.parametrize("name", ["net.pdf", "net", "folder"])
def test_only_png(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plot='.*' must end in \.png"):
        draw("tiny", tmp_path / name)


def test_unwritable_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*missing.net\.png: No such file or directory; choose a folder"):
        draw_network("tiny", tmp_path / "missing" / "net.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder\.png: Is a directory; choose the name of a file"):
        draw_network("tiny", tmp_path / "folder.png")
    assert names(tmp_path) == ["folder.png"]


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.png"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left on device"):
        draw_network("tiny", path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["net.png"]


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"matplotlib is needed for .*net\.png: pip install 'alexnet-kernels\[bench\]'"
    ):
        draw("tiny", tmp_path / "net.png")


def test_unknown_language(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lang='fr'"):
        draw("tiny", tmp_path / "net.png", lang="fr")


def test_importing_describe_does_not_import_matplotlib() -> None:
    code = "import sys, alexnet_kernels.describe; sys.exit(any(m.startswith('matplotlib') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_global_state(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_network("tiny", tmp_path / "net.png")
    assert dict(matplotlib.rcParams) == before
