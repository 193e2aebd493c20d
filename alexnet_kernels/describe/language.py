"""The words of ``describe`` in English and Chinese, and how it writes figures."""

from __future__ import annotations

from collections.abc import Sequence

LANGUAGES = ("en", "zh")

_SUMMARIES = {  # Chinese for geometry's one-line summaries
    "paper": "2012 年论文文字所述的网络（输入 227 像素才得到 55×55 的特征图）",
    "source2012": "当年真正训练的网络 layers-145.cfg：第 1 块 LRN 在 ReLU 之前，第 2 块多一个空间归一化，conv1 向上取整",
    "caffe": "bvlc_alexnet：论文的顺序，k = 1，LRN 跨全部通道",
    "caffenet": "bvlc_reference_caffenet：先池化后 LRN",
    "torchvision": "torchvision.models.alexnet：更窄、不分组、无 LRN、dropout 在全连接之前",
    "one_gpu": "论文的单 GPU 对照网络：特征图减半，conv5 保持原宽",
    "tiny": "宽度为论文八分之一的网络，供测试使用",
}

_WORDS: dict[str, tuple[str, str]] = {
    # the table of layers
    "layer": ("layer", "层"),
    "input": ("input", "输入"),
    "kernel": ("kernel", "卷积核"),
    "number": ("number", "个数"),
    "map": ("feature map", "特征图"),
    "neurons": ("neurons", "神经元"),
    "parameters": ("parameters", "可训练参数"),
    "connections": ("connections", "连接数"),
    "macs": ("MACs", "乘加数"),
    "total": ("total", "合计"),
    "with stride": ("stride {}", "步长 {}"),
    "with padding": ("pad {}", "填充 {}"),
    "channels": ("{} channels", "{} 个通道"),
    "tower": ("inside a tower", "塔内"),
    "global": ("across all channels", "跨全部通道"),
    "counting": (
        (
            "A neuron is one output value of a convolution or fully connected layer, a connection one of its multiplications "
            "or its bias; MACs leave the bias out: {} for one image."
        ),
        "神经元：卷积层或全连接层的一个输出值；连接：它的一次乘法或它的偏置；乘加数不含偏置，一幅图片共 {} 次。",
    ),
    # the two devices
    "devices": ("On two devices, batch {}, fp32", "两个设备，批量 {}，fp32"),
    "device": ("device {}", "设备 {}"),
    "before": ("arrives from the other device before the layer", "进入该层之前从另一设备传来"),
    "of": ("{} of {}", "{} / {}"),
    "each way": ("{} each way", "双向各 {}"),
    "one way": ("{} from device 1 to device 0", "{}，设备 1 到设备 0"),
    "mirror": (
        "The backward pass sends the same bytes the other way.",
        "反向传播沿相反方向传送同样多的字节。",
    ),
    # the notes
    "notes": ("The notes, row by row, beside the paper's network", "逐行核对笔记与论文网络"),
    "row": ("row", "行"),
    "said": ("the notes say", "笔记"),
    "truth": ("in truth", "实际"),
    "verdict": ("verdict", "判定"),
    "reason": ("why", "说明"),
    "right": ("right", "正确"),
    "wrong": ("wrong", "错误"),
    "incomplete": ("incomplete", "不全"),
    "nothing": ("nothing", "无"),
    "no layer": ("no such layer", "没有这一层"),
    "merged": ("{} ungrouped", "不分组 {}"),
    "summary": (
        (
            "{right} rows right, {wrong} wrong, {incomplete} incomplete. The notes' own parameter counts add up to {said}; "
            "the network has {truth}."
        ),
        "{right} 行正确，{wrong} 行错误，{incomplete} 行不全。笔记自己的参数量之和为 {said}，实际为 {truth}。",
    ),
    "network": ("network", "网络"),
    "stride": ("stride", "步长"),
    "padding": ("padding", "填充"),
    "side": ("map side", "特征图边长"),
    "image": ("input", "输入图片"),
    "kernels": ("kernels", "核的种类"),
    "output": ("output", "输出"),
    "name": ("name", "名称"),
    "chain": ("order", "顺序"),
    "window": ("window", "窗口"),
    "setting": ("constants", "常数"),
    "exchanges": ("exchanges before", "交换发生在"),
    # the picture
    "title": ("AlexNet on two devices", "两个设备上的 AlexNet"),
    "picture": (
        "variant {variant}:  {parameters} parameters,  {neurons} neurons,  {macs} MACs",
        "变体 {variant}：{parameters} 个参数，{neurons} 个神经元，{macs} 次乘加",
    ),
    "owns": ("{} parameters", "{} 个参数"),
    "picture foot": (
        "Between the lanes: bytes in each direction of one forward pass, batch {}, fp32. The backward pass mirrors them.",
        "两条泳道之间：一次前向传播中每个方向的字节数（批量 {}，fp32）。反向传播与之对称。",
    ),
    "pooled": ("pooled {}", "池化 {}"),
    "weights": ("{} × {} weights", "{} × {} 权重"),
    "kernels of": ("{} kernels {}", "{} 个核 {}"),
    "no font": (
        "no Chinese font is installed: the picture is labelled in English (for example, install Noto Sans CJK)",
        "没有安装中文字体：图中文字用英文（可安装 Noto Sans CJK 等字体）",
    ),
}


def check(lang: str) -> None:
    """Raise for a language that is neither English nor Chinese."""
    if lang not in LANGUAGES:
        raise ValueError(f"lang={lang!r} is not spoken here: use 'en' or 'zh'")


def say(key: str, lang: str, *values: object, **named: object) -> str:
    """The words for ``key``, with ``values`` put in."""
    check(lang)
    return _WORDS[key][LANGUAGES.index(lang)].format(*values, **named)


def summary(variant: str, english: str, lang: str) -> str:
    """What a variant is: geometry's own sentence, or its translation where there is one."""
    check(lang)
    return _SUMMARIES.get(variant, english) if lang == "zh" else english


def dimensions(shape: Sequence[int]) -> str:
    """``(27, 27, 96)`` as 27×27×96; a single number gets its thousands separated."""
    return f"{shape[0]:,}" if len(shape) == 1 else "×".join(map(str, shape))


def size_of(count: int) -> str:
    """Bytes as people read them: 11,075,584 is 10.56 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 100 * scale else 0}f} {unit}"
    return f"{count} B"
