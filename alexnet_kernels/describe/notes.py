"""The notes this project grew from, row by row, beside the network they describe.

A note quotes what the notes claim (with their own arithmetic, so that nothing is rounded on the way); the truth is read
off the paper's network, and the verdict follows from comparing the two. Only three rows are judged by hand: what they
say is right, but they leave out something that changes the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..geometry import VARIANTS, variant
from .language import dimensions, say
from .table import Column, Description, Row, Sheet, describe

Value = int | float | str | tuple[int, ...] | tuple[str, ...] | None
Verdict = Literal["right", "wrong", "incomplete"]


@dataclass(frozen=True)
class Claim:
    """One figure of the notes: ``quantity`` of ``layer`` is ``value``; ``quote`` is how they write it, if not plainly."""

    layer: str
    quantity: str
    value: Value
    quote: str = ""


@dataclass(frozen=True)
class Note:
    """One row of the notes; ``why`` is the reason in English and in Chinese, empty where nothing needs saying."""

    row: str
    claims: tuple[Claim, ...]
    why: tuple[str, str] = ("", "")
    leaves_out: bool = False


@dataclass(frozen=True)
class Audited:
    """A note with its verdict; ``truths`` stand in the order of its claims, ``merged`` are those of the ungrouped network."""

    note: Note
    truths: tuple[Value, ...]
    merged: tuple[Value, ...]
    verdict: Verdict


_TRUTHS: dict[str, Callable[[Description, str], Value]] = {
    "exchanges": lambda what, _: tuple(c.layer for c in what.exchanges),
    "image": lambda what, _: (*VARIANTS["source2012"].input_size, what.rows[0].input[2]),
    "chain": lambda what, group: "→".join(f.op.prefix for f in what.network.facts(group) if f.op.prefix != "flatten"),
}


def _truth(what: Description, claim: Claim) -> Value:
    """The value in the network that a claim is about; None where the network has no such layer."""
    if claim.quantity in _TRUTHS:
        return _TRUTHS[claim.quantity](what, claim.layer)
    row = _row(what, claim.layer)
    return getattr(row, {"name": "layer", "window": "kernel"}.get(claim.quantity, claim.quantity)) if row else None


def _row(what: Description, layer: str) -> Row | None:
    return next((row for row in what.rows if row.layer == layer), None)


_WEIGHTS = (
    "this counts weights; a neuron is one output value: height · width · channels",
    "这是权重的个数；神经元是输出值：高·宽·通道数",
)
_BIAS = (
    "a kernel has one bias, not one for each input channel: (k·k·depth + 1) · kernels",
    "每个卷积核只有一个偏置，而不是每个输入通道一个：(k·k·深度+1)·核数",
)
_DEPTH = (
    "a kernel is as deep as the map it reads, not as the image; conv2, 4 and 5 read their own tower's half",
    "卷积核的深度等于它读取的特征图的通道数，不是图片的；conv2、4、5 只读本塔的一半",
)
_DEPTH_PAD = (
    f"{_DEPTH[0]}; with padding 2 the map would grow by two, and the formula beside it uses 1",
    f"{_DEPTH[1]}；填充为 2 时特征图会大 2，而旁边的公式用的是 1",
)
_COUNTS = (
    "the depth of the image is used for that of the map, and a bias is counted for each channel",
    "把图片的深度当成了特征图的深度，并且每个通道算了一个偏置",
)
_THREE = (
    f"{_COUNTS[0]}; the neurons given are a number of weights",
    f"{_COUNTS[1]}；所写的神经元数其实是权重数",
)
_POOL = (
    "max-pooling has no parameters; weight and bias are those of LeNet-5's subsampling",
    "最大池化没有参数；权重和偏置是 LeNet-5 降采样层的",
)
_THREE_CHANNELS = (
    "the three channels are the image's; this layer reads the maps of the one before",
    "三个通道是图片的；这一层读的是上一层的特征图",
)


def _counts(row: str, layer: str, side: int, kernels: int, map_side: int) -> Note:
    """The notes' rows on neurons, parameters and connections of conv4 and conv5, which make one row each."""
    per = f"({side}·{side}+1)·3·{kernels}"
    return Note(
        row,
        (
            Claim(layer, "neurons", side * side * 3 * kernels, f"{side}·{side}·3·{kernels}"),
            Claim(layer, "parameters", (side * side + 1) * 3 * kernels, per),
            Claim(layer, "connections", (side * side + 1) * 3 * kernels * map_side**2, f"{per}·{map_side}·{map_side}"),
        ),
        _THREE,
    )


NOTES: tuple[Note, ...] = (
    Note(
        "0",
        (Claim("network", "exchanges", None),),
        (
            "only the heading says two GPUs: neither the split nor where the towers meet is given",
            "只有标题提到两个 GPU：没有说怎么拆分，也没有说两塔在哪里交换",
        ),
        leaves_out=True,
    ),
    Note(
        "1",
        (Claim("conv1", "image", (224, 224, 3)),),
        (
            "as the paper says and its source crops; the 55×55 maps need 227, or the source's three zero rows and columns",
            "与论文和源码一致；但 55×55 的特征图需要 227，或源码在右、下补的三行零",
        ),
    ),
    Note("2", (Claim("conv1", "kernel", (11, 11, 3)), Claim("conv1", "stride", 4))),
    Note(
        "3",
        (Claim("conv1", "kernels", 55),),
        ("the side of the map, put in place of the number of kernels", "把特征图的边长写成了核的种类数"),
    ),
    Note(
        "4",
        (Claim("conv1", "side", 55), Claim("conv1", "side", (224 - 11 + 1) / 4 + 1, "(224-11+1)/4+1")),
        (
            "the side is right, the formula is not even whole: use 227 without the +1, or three zeros more than 224",
            "边长正确，但公式连整数都不是：应为 227 且没有 +1，或在 224 上补三个零",
        ),
    ),
    Note("5", (Claim("conv1", "neurons", 11 * 11 * 3 * 96, "11·11·3·96"),), _WEIGHTS),
    Note("6", (Claim("conv1", "parameters", (11 * 11 + 1) * 3 * 96, "(11·11+1)·3·96"),), _BIAS),
    Note("7", (Claim("conv1", "connections", (11 * 11 + 1) * 3 * 96 * 55 * 55, "(11·11+1)·3·96·55·55"),), _BIAS),
    Note("8", (Claim("relu1", "output", (55, 55, 96)),)),
    Note("9", (Claim("pool1", "output", (27, 27, 96)), Claim("pool1", "side", (55 - 3) / 2 + 1, "(55-3)/2+1"))),
    Note("10", (Claim("pool1", "parameters", 2 * 96, "2·96"),), _POOL),
    Note(
        "11",
        (
            Claim("norm1", "window", (5,)),
            Claim("conv1", "chain", "conv→relu→pool→norm"),
            Claim("norm1", "setting", None),
        ),
        (
            "size 5 is right, but k, α and β are missing, and pooling before the norm is CaffeNet's order",
            "大小 5 正确，但缺 k、α、β；先池化后归一化是 CaffeNet 的顺序",
        ),
        leaves_out=True,
    ),
    Note("12", (Claim("conv2", "input", (27, 27, 3)),), _THREE_CHANNELS),
    Note(
        "13", (Claim("conv2", "kernel", (5, 5, 3)), Claim("conv2", "stride", 1), Claim("conv2", "padding", 2)), _DEPTH
    ),
    Note("14", (Claim("conv2", "kernels", 256),)),
    Note("15", (Claim("conv2", "side", (27 - 5 + 2 * 2) / 1 + 1, "(27-5+2·2)/1+1"),)),
    Note("16", (Claim("conv2", "neurons", 5 * 5 * 3 * 256, "5·5·3·256"),), _WEIGHTS),
    Note("17", (Claim("conv2", "parameters", (5 * 5 + 1) * 3 * 256, "(5·5+1)·3·256"),), _COUNTS),
    Note("18", (Claim("conv2", "connections", (5 * 5 + 1) * 3 * 256 * 27 * 27, "(5·5+1)·3·256·27·27"),), _COUNTS),
    Note("19", (Claim("relu2", "output", (27, 27, 256)),)),
    Note("20", (Claim("pool2", "output", (13, 13, 256)), Claim("pool2", "side", (27 - 3) / 2 + 1, "(27-3)/2+1"))),
    Note("21", (Claim("pool2", "parameters", 2 * 256, "2·256"),), _POOL),
    Note(
        "22",
        (Claim("norm2", "name", "norm1"), Claim("norm2", "window", (5,))),
        (
            "the norm of the second block; its constants and its order lack what row 11 lacks",
            "这是第二块的归一化；常数与顺序的缺漏同第 11 行",
        ),
    ),
    Note(
        "23",
        (Claim("conv3", "input", (13, 13, 256)),),
        ("the maps of both towers: the first exchange", "两塔的特征图：第一次交换"),
    ),
    Note(
        "24",
        (Claim("conv3", "kernel", (3, 3, 3)), Claim("conv3", "stride", 1), Claim("conv3", "padding", 2)),
        _DEPTH_PAD,
    ),
    Note("25", (Claim("conv3", "kernels", 384),)),
    Note("26", (Claim("conv3", "side", (13 - 3 + 1 * 2) / 1 + 1, "(13-3+1·2)/1+1"),)),
    Note("27", (Claim("conv3", "neurons", 3 * 3 * 3 * 384, "3·3·3·384"),), _WEIGHTS),
    Note("28", (Claim("conv3", "parameters", (3 * 3 + 1) * 3 * 384, "(3·3+1)·3·384"),), _COUNTS),
    Note("29", (Claim("conv3", "connections", (3 * 3 + 1) * 3 * 384 * 13 * 13, "(3·3+1)·3·384·13·13"),), _COUNTS),
    Note(
        "29b",
        (Claim("conv3", "chain", "conv"), Claim("conv4", "chain", "conv")),
        ("both layers end in a ReLU, which the notes leave out", "两层之后都有 ReLU，笔记没有写"),
        leaves_out=True,
    ),
    Note("30", (Claim("conv4", "input", (13, 13, 384)),), ("each tower reads its own half", "每塔只读自己的一半")),
    Note(
        "31",
        (Claim("conv4", "kernel", (3, 3, 3)), Claim("conv4", "stride", 1), Claim("conv4", "padding", 2)),
        _DEPTH_PAD,
    ),
    Note("32", (Claim("conv4", "kernels", 384), Claim("conv4", "side", (13 - 3 + 1 * 2) / 1 + 1, "(13-3+1·2)/1+1"))),
    _counts("33", "conv4", 3, 384, 13),
    Note("34", (Claim("conv5", "input", (13, 13, 3)),), _THREE_CHANNELS),
    Note(
        "35", (Claim("conv5", "kernel", (3, 3, 3)), Claim("conv5", "stride", 1), Claim("conv5", "padding", 1)), _DEPTH
    ),
    Note("36", (Claim("conv5", "kernels", 256), Claim("conv5", "side", (13 - 3 + 2 * 1) / 1 + 1, "(13-3+2·1)/1+1"))),
    _counts("37", "conv5", 3, 256, 13),
    Note(
        "38",
        (
            Claim("relu5", "output", (13, 13, 256)),
            Claim("pool5", "output", (6, 6, 256)),
            Claim("pool5", "side", (13 - 3) / 2 + 1, "(13-3)/2+1"),
        ),
    ),
    Note(
        "39",
        (Claim("pool5", "parameters", 2 * 256, "2·256"), Claim("norm5", "window", (5,))),
        (f"{_POOL[0]}; nothing is normalised after conv5", f"{_POOL[1]}；conv5 之后没有归一化"),
    ),
    Note("40", (Claim("fc6", "chain", "fc→relu→drop"), Claim("fc6", "kernels", 4096))),
    Note(
        "41",
        (Claim("fc6", "parameters", 4096 * (256 + 1), "4096·(256+1)"),),
        (
            "the layer reads every pixel of the 256 maps, not one value a map",
            "该层读取 256 张特征图的全部像素，而不是每张一个值",
        ),
    ),
    Note("42", (Claim("fc7", "parameters", 4096 * (4096 + 1), "4096·(4096+1)"),)),
    Note(
        "43",
        (Claim("fc8", "chain", "fc→relu→drop"), Claim("fc8", "kernels", 4096)),
        (
            "the classifier: one output a class, a softmax after it, no ReLU and no dropout",
            "分类层：每类一个输出，其后是 softmax，没有 ReLU 和 dropout",
        ),
    ),
    Note(
        "44",
        (Claim("fc8", "parameters", 4096 * (1000 + 1), "4096·(1000+1)"),),
        ("inputs and outputs are swapped: the biases belong to the classes", "输入与输出写反了：偏置属于各个类别"),
    ),
)


def audit(what: Description | None = None) -> tuple[Audited, ...]:
    """Every row of the notes with the truth and its verdict; ``what`` must be the paper's network, which they describe."""
    what = what or describe("paper")
    if what.network != VARIANTS["paper"]:
        raise ValueError(
            f"--notes sets the notes beside variant 'paper' as published, not a changed network or variant={what.variant!r}: "
            "leave out the variant and the options that change it"
        )
    ungrouped = describe(variant("paper", conv_groups=1))
    found = []
    for note in NOTES:
        truths, merged = (tuple(_truth(network, claim) for claim in note.claims) for network in (what, ungrouped))
        agrees = all(claim.value == truth for claim, truth in zip(note.claims, truths, strict=True))
        found.append(Audited(note, truths, merged, "incomplete" if note.leaves_out else "right" if agrees else "wrong"))
    return tuple(found)


def sheet(what: Description | None = None, lang: str = "en") -> Sheet:
    """The audit as a table."""
    what = what or describe("paper")
    rows, verdicts = [], Counter[str]()
    for item in audit(what):
        verdicts[item.verdict] += 1
        figures = zip(item.note.claims, item.truths, item.merged, strict=True)
        said, truths = zip(*(_texts(what, *each, lang) for each in figures), strict=True)
        why = item.note.why[lang == "zh"]
        rows.append((item.note.row, "\n".join(said).rstrip(), "\n".join(truths).rstrip(), say(item.verdict, lang), why))
    claimed = sum(c.value for n in NOTES for c in n.claims if c.quantity == "parameters" and isinstance(c.value, int))
    totals = {"said": f"{claimed:,}", "truth": f"{VARIANTS['paper'].parameters:,}"}
    return Sheet(
        say("notes", lang),
        tuple(Column(say(name, lang)) for name in ("row", "said", "truth", "verdict", "reason")),
        tuple(rows),
        (say("summary", lang, **totals, **verdicts),),
        frozenset(range(len(rows))),
        styles={say("right", lang): "green", say("wrong", lang): "red", say("incomplete", lang): "yellow"},
    )


def _texts(what: Description, claim: Claim, truth: Value, merged: Value, lang: str) -> tuple[str, str]:
    """A claim as the notes put it and the truth beside it, each with a second line if either has more to say."""
    said = [
        f"{claim.layer} {say(claim.quantity, lang)}: {_text(claim.value, lang)}",
        f"= {claim.quote}" if claim.quote else "",
    ]
    real = [say("no layer", lang) if truth is None else _text(truth, lang), ""]
    if claim.quantity == "side" and claim.quote:
        real[1] = f"= {_row(what, claim.layer).formula}"  # type: ignore[union-attr]
    elif merged != truth and claim.quantity != "exchanges":
        real[1] = say("merged", lang, _text(merged, lang))
    lines = 2 if said[1] or real[1] else 1
    return "\n".join(said[:lines]), "\n".join(real[:lines])


def _text(value: Value, lang: str) -> str:
    if value is None:
        return say("nothing", lang)
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) if isinstance(value[0], str) else dimensions(value)
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}"


def records(what: Description | None = None, lang: str = "en") -> list[dict[str, object]]:
    """The audit as plain data, for JSON."""
    return [
        {
            "row": item.note.row,
            "verdict": item.verdict,
            "why": item.note.why[lang == "zh"],
            "claims": [
                {
                    "layer": c.layer,
                    "quantity": c.quantity,
                    "quote": c.quote,
                    "notes": c.value,
                    "truth": t,
                    "ungrouped": m,
                }
                for c, t, m in zip(item.note.claims, item.truths, item.merged, strict=True)
            ],
        }
        for item in audit(what)
    ]
