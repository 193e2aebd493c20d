"""What each operation means, in plain torch: the specification, the test oracle and the portable implementation at once.

Everything here runs on any device and dtype and is differentiable to any order; nothing here checks arguments (that is
``functional``'s work) or knows about kernels. Response normalisation takes ``scale``, the factor of the plain sum of
squares: ``alpha`` in the paper's formula, ``alpha / size`` in torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Pair = int | tuple[int, int]

_BLOCK = 1 << 18  # elements a block of `_blocked`: its fp32 temporaries (1 MiB each) stay in a core's cache


_transforms_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a function transform is at work: those of ``torch.func``, forward mode, or what batches gradients for
    ``is_grads_batched``.

    Then a tensor may stand for many, which do not say how they lie in memory, and writing in place need not compose.
    """
    if _transforms_active() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and any(map(_is_batched, tensors))


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: fp32 for the half types, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _by_group(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """``x`` in the dtype that sums are formed in, and the dim that a window runs over: 1, or 2 behind the groups."""
    z = x.to(arithmetic_dtype(x.dtype))
    return (z, 1) if groups == 1 else (z.reshape(z.shape[0], groups, z.shape[1] // groups, *z.shape[2:]), 2)


def _window_sum(values: Tensor, dim: int, before: int, after: int) -> Tensor:
    """``Σ values[j]`` over ``c - before <= j <= c + after`` for each place c along ``dim``, inside it."""
    channels = values.shape[dim]
    if is_transformed():
        reach = F.pad(values, (0, 0) * (values.dim() - 1 - dim) + (before, after))
        return reach.unfold(dim, before + after + 1, 1).sum(-1)
    total = values.clone()
    for d in range(1, min(before, channels - 1) + 1):
        total.narrow(dim, d, channels - d).add_(values.narrow(dim, 0, channels - d))
    for d in range(1, min(after, channels - 1) + 1):
        total.narrow(dim, 0, channels - d).add_(values.narrow(dim, d, channels - d))
    return total


def _denominator(x: Tensor, dim: int, size: int, scale: float, k: float) -> Tensor:
    """``s = k + scale · Σ x²`` over a window of ``size`` channels, ``size // 2`` of them before: torch's rule for even sizes."""
    total = _window_sum(x * x, dim, size // 2, (size - 1) // 2)
    if is_transformed():
        return total * scale + k
    return total.mul_(scale).add_(k)


def _power(s: Tensor, beta: float | Tensor) -> Tensor:
    """``s^beta``; the usual 3/4 by square roots, several times faster than ``pow``."""
    if (
        not isinstance(beta, Tensor) and beta == 0.75
    ):  # a tensor, which may be a parameter, gets its gradient from `pow`
        root = s.sqrt()
        return root * root.sqrt()
    return s.pow(beta)


def lrn(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """``y_c = x_c / (k + scale · Σ_j x_j²)^beta``, j over the window of ``size`` channels around c inside c's group.

    ``x`` is ``[N, C, ...]`` with C divisible by ``groups``; the result has its shape and dtype. Paper, section 3.3.
    """
    if not x.is_floating_point():  # torch truncates its means of integers; nothing of ours applies
        parts = [F.local_response_norm(part, size, scale * size, beta, k) for part in x.chunk(groups, 1)]
        return parts[0] if groups == 1 else torch.cat(parts, 1)
    z, dim = _by_group(x, groups)
    y = (z / _power(_denominator(z, dim, size, scale, k), beta)).to(x.dtype)
    return y if dim == 1 else y.reshape(x.shape)


def lrn_backward(grad: Tensor, x: Tensor, size: int, scale: float, beta: float, k: float, groups: int = 1) -> Tensor:
    """Gradient of :func:`lrn`: ``dx_i = g_i s_i^-beta - 2·beta·scale·x_i Σ_j g_j x_j s_j^-(beta+1)``, j over those channels
    whose window holds i."""
    (z, dim), (g, _) = _by_group(x, groups), _by_group(grad, groups)
    s = _denominator(z, dim, size, scale, k)
    direct = g / _power(s, beta)
    shared = _window_sum(direct * z / s, dim, (size - 1) // 2, size // 2)
    dx = (direct - (2 * beta * scale) * z * shared).to(x.dtype)
    return dx if dim == 1 else dx.reshape(x.shape)


def by_blocks(op: Callable[..., Tensor], tensors: tuple[Tensor, ...], *args: float) -> Tensor:
    """``op(*tensors, *args)`` a few images at a time, so that temporaries stay in a CPU's cache.

    For operations whose images are independent, without gradients: each of ``tensors`` is ``[N, ...]``, the result is like
    the last of them. LRN gains about 1.6x by this on a 32 MiB cache.
    """
    like = tensors[-1]
    whole = like.device.type != "cpu" or like.numel() <= _BLOCK or like.shape[0] < 2
    if whole or is_transformed(*tensors):
        return op(*tensors, *args)
    images = max(1, _BLOCK * like.shape[0] // like.numel())
    out = torch.empty_like(like)
    for target, *block in zip(out.split(images), *(t.split(images) for t in tensors), strict=True):
        target.copy_(op(*block, *args))
    return out


def spatial_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``y = x / (k + alpha/size² · Σ x²)^beta``, the sum over a size x size neighbourhood inside each map (zeros outside).

    ``rnorm`` of the 2012 source (``layer.py:1183``), WITHIN_CHANNEL in Caffe. ``x`` is ``[N, C, H, W]``, ``size`` odd.
    """
    z = x.to(arithmetic_dtype(x.dtype))
    mean = F.avg_pool2d(z * z, size, stride=1, padding=size // 2)
    return (z / _power(mean.mul(alpha).add(k), beta)).to(x.dtype)


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """``max(0, conv2d(x, weight) + bias)``; in place, for nobody else holds the sum."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups), inplace=True)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``conv2d(x, weight) + bias``, then ``max(0, .)`` where ``relu``."""
    y = torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    return F.relu(y) if relu else y


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`conv2d` by x, weight and bias, those that ``mask`` names; the others have no elements.

    ``y`` is the result where a ReLU made it: what it cut off has no gradient; NaN passes.
    """
    dz = grad if y is None else grad.masked_fill(y <= 0, 0)
    sizes = (weight.shape[0],)
    found = torch.ops.aten.convolution_backward(
        dz, x, weight, sizes, stride, padding, dilation, False, (0, 0), groups, tuple(mask)
    )
    dx, dw, db = (grad.new_empty(0) if g is None else g for g in found)
    return dx, dw, db


def conv2d_second_gradient(
    by: Sequence[Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d_backward` by grad, x and weight, for the gradients ``by`` of its three results.

    A convolution is linear in x and in weight, so they are convolutions again; torch's own double backward would do, but not
    for shapes that are symbols.
    """
    by_dx, by_dw, by_db = by
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    dz = grad if y is None else grad.masked_fill(y <= 0, 0)
    by_dz, by_x, by_weight = torch.zeros_like(grad), None, None
    if mask[0]:
        by_dz = by_dz + torch.convolution(by_dx, weight, None, *geometry)
        backward = torch.ops.aten.convolution_backward(dz, by_dx, weight, None, *geometry, (False, True, False))
        by_weight = backward[1]
    if mask[1]:
        by_dz = by_dz + torch.convolution(x, by_dw, None, *geometry)
        by_x = torch.ops.aten.convolution_backward(dz, x, by_dw, None, *geometry, (True, False, False))[0]
    if mask[2]:
        by_dz = by_dz + by_db[:, None, None]
    return by_dz if y is None else by_dz.masked_fill(y <= 0, 0), by_x, by_weight


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``max(0, x weightᵀ + bias)``; in place, for nobody else holds the sum."""
    return F.relu(F.linear(x, weight, bias), inplace=True)


def linear_relu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_relu`, and :func:`dropout` of ``p`` after it, by ``x``, weight and bias, from the result ``y``.

    What ReLU or dropout put to 0 is 0 in ``y``. A gradient that ``mask`` does not ask for has no elements.
    """
    dz = (grad * (1 / (1 - p))).masked_fill(y <= 0, 0).reshape(-1, weight.shape[0])
    dx, dweight = linear_gradients(dz, x, weight, mask)
    total = dz.sum(0, dtype=arithmetic_dtype(dz.dtype)).to(dz.dtype) if mask[2] else dz.new_empty(0)
    return dx, dweight, total


def linear_gradients(dz: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """``dx = dz weight`` and ``dweight = dzᵀ x`` of ``z = x weightᵀ``, as far as ``mask`` asks; ``dz`` is [M, O]."""
    dx = (dz @ weight).view(x.shape) if mask[0] else dz.new_empty(0)
    return dx, dz.t() @ x.reshape(-1, x.shape[-1]) if mask[1] else dz.new_empty(0)


def random_words(seed: Tensor, count: int) -> Tensor:
    """``count`` random words of 32 bits in int64: Philox 4x32 with 10 rounds (Salmon et al. 2011), four from each counter.

    The key is the 64 bits of ``seed``, the counter ``i // 4`` in its lowest word: word ``i`` depends on ``seed`` and ``i`` alone.
    """
    low = 0xFFFFFFFF
    counter = torch.arange((count + 3) // 4, device=seed.device) & low
    zero = torch.zeros_like(counter)
    words, keys = [counter, zero, zero, zero], [seed & low, seed >> 32 & low]
    for _ in range(10):
        even, odd = (
            words[0] * 0xD2511F53,
            words[2] * 0xCD9E8D57,
        )  # the upper halves wrap into the sign, which `& low` drops
        words = [odd >> 32 & low ^ words[1] ^ keys[0], odd & low, even >> 32 & low ^ words[3] ^ keys[1], even & low]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return torch.stack(words, 1).flatten()[:count]


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x / (1 - p)`` where the :func:`random_words` of ``seed`` (int64, one element) are ``p · 2^32`` or more, else 0."""
    keep = random_words(seed, x.numel()).view(x.shape) >= round(p * 2**32)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


def max_pool2d(
    x: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> Tensor:
    """Largest value of each window; the first of equal ones takes the gradient, NaN wins over every number."""
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_with_indices(
    x: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool2d` and the flat position ``h·W + w`` of each maximum in its map, int64."""
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)


def max_pool2d_with_place(
    x: Tensor, window: Sequence[int], ceil_mode: bool = False, with_place: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool2d` and the ``place`` of each maximum: its tap ``row · KW + column`` in the window, uint8.

    ``window`` is ``kernel, stride, padding, dilation``, rows before columns, the kernel of 256 taps at most. Without place,
    that has no elements.
    """
    kernel, stride, padding, dilation = (tuple(window[i : i + 2]) for i in (0, 2, 4, 6))
    if not with_place:
        y = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        return y, x.new_empty(0, dtype=torch.uint8)
    y, index = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    top, left = _corners(y, window)
    width = x.shape[-1]
    row, column = (index // width - top) // dilation[0], (index % width - left) // dilation[1]
    return y, (row * kernel[1] + column).to(torch.uint8)


def _corners(pooled: Tensor, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first row [OH, 1] and column [OW] of each window; negative where it begins in the padding."""
    (sh, sw), (ph, pw) = window[2:4], window[4:6]
    rows, columns = (torch.arange(pooled.shape[axis], device=pooled.device) for axis in (2, 3))
    return (rows * sh - ph)[:, None], columns * sw - pw


def indices(place: Tensor, window: Sequence[int], width: int) -> Tensor:
    """torch's indices, ``h·width + w`` of each maximum in its map, int64, from its place."""
    (_, kw), (dh, dw) = window[0:2], window[6:8]
    top, left = _corners(place, window)
    tap = place.long()
    return (top + tap // kw * dh) * width + left + tap % kw * dw


def pick(x: Tensor, index: Tensor) -> Tensor:
    """``x``'s elements at ``index``, positions in each map: what pooling took, and the gradient of what it spreads."""
    return _rows(x).gather(2, _rows(index)).view(index.shape)


def _rows(maps: Tensor) -> Tensor:
    """Each map [H, W] as one row."""
    n, c, h, w = maps.shape
    return maps.reshape(n, c, h * w)


def max_pool2d_backward(grad: Tensor, place: Tensor, height: int, width: int, window: Sequence[int]) -> Tensor:
    """Gradient of :func:`max_pool2d`: ``dx[h, w] = Σ grad`` of the windows whose place is ``(h, w)``."""
    index = _rows(indices(place, window, width))
    values = _rows(grad.to(arithmetic_dtype(grad.dtype)))
    zeros = values.new_zeros(*index.shape[:2], height * width)
    return zeros.scatter_add(2, index, values).view(*index.shape[:2], height, width).to(grad.dtype)


def activation(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``x + bias`` [C] of its channel, then ``max(0, .)`` where ``relu``; in the dtype of ``x``."""
    a = x if bias is None else x + bias[:, None, None]
    return F.relu(a) if relu else a


def lrn_pool(
    x: Tensor,
    bias: Tensor | None,
    relu: bool,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    window: Sequence[int],
    ceil_mode: bool = False,
    pool_first: bool = False,
    with_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`lrn` of the :func:`activation`, and max pooling after it, or before it where ``pool_first``; with places."""
    a = activation(x, bias, relu)
    if not pool_first:
        return max_pool2d_with_place(lrn(a, size, scale, beta, k, groups), window, ceil_mode, with_place)
    pooled, place = max_pool2d_with_place(a, window, ceil_mode, with_place)
    return lrn(pooled, size, scale, beta, k, groups), place


def lrn_pool_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    place: Tensor,
    relu: bool,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    window: Sequence[int],
    pool_first: bool = False,
    with_bias_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`lrn_pool` by ``x`` and ``bias``: pooling's, LRN's and ReLU's one after the other, rounded once."""
    work = arithmetic_dtype(x.dtype)
    norm = (size, scale, beta, k, groups)
    a, g = activation(x, bias, relu).to(work), grad.to(work)
    if pool_first:
        g = lrn_backward(g, pick(a, indices(place, window, x.shape[-1])), *norm)
    g = max_pool2d_backward(g, place, x.shape[-2], x.shape[-1], window)
    if not pool_first:
        g = lrn_backward(g, a, *norm)
    if relu:
        g = g.masked_fill(a <= 0, 0)
    dbias = g.sum((0, 2, 3)).to(x.dtype) if with_bias_grad else x.new_empty(0)
    return g.to(x.dtype), dbias


def sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    masters: list[Tensor],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``d = g + weight_decay·w``, ``b ← momentum·b + d``, ``w ← w - lr·b`` (Nesterov: ``w - lr·(d + momentum·b)``), in place.

    ``w`` are the ``masters``, in whose dtype all of it is; ``weights`` become them, rounded. ``scaling`` is a factor that the
    gradients carry, and a number other than 0 where one of them is not finite: then nothing changes.
    """
    if scaling is not None and scaling[1].item():
        return
    g = [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)]
    if scaling is not None:
        g = [grad / scaling[0].to(grad) for grad in g]
    if maximize:
        g = list(torch._foreach_neg(g))
    if weight_decay:
        g = list(torch._foreach_add(g, masters, alpha=weight_decay))
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, g)
        g = list(torch._foreach_add(g, buffers, alpha=momentum)) if nesterov else buffers
    torch._foreach_add_(masters, g, alpha=-float(lr))
    for weight, master in zip(weights, masters, strict=True):
        if weight is not master:
            weight.copy_(master)


def pixels(x: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x - mean[c]) · scale[c]``, formed in fp32 (in fp64 for that), rounded to ``dtype``; the channels are dim -3."""
    z = x.to(arithmetic_dtype(x.dtype))  # integers stay: the subtraction converts them on the way, which saves a pass
    return ((z - mean[:, None, None]) * scale[:, None, None]).to(dtype)


def _image(x: Tensor, mean: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if mean is None or scale is None else pixels(x, mean, scale, dtype)


def even_padding(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """``x`` and what a convolution is still to pad, rows and columns: nothing where ``padding``, which is top, bottom, left,
    right, is uneven and has been put around ``x``."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def conv1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    stride: tuple[int, int],
    padding: Sequence[int],
    relu: bool,
) -> Tensor:
    """Convolution of images, and ReLU where asked for: ``x`` is floating point, or pixels that :func:`pixels` prepares.

    ``padding`` is top, bottom, left, right: zeros around the prepared image. The result has the weight's dtype.
    """
    image, left = even_padding(_image(x, mean, scale, weight.dtype), padding)
    return conv2d(image, weight, bias, relu, stride, left, (1, 1), 1)


def conv1_backward(
    grad: Tensor,
    a: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    stride: tuple[int, int],
    padding: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`conv1` by image, weight and bias, where ``mask`` asks for them (no elements where not); with ``a``,
    its result after ReLU, that of ReLU first. None by pixels: they are integers."""
    image, left = even_padding(_image(x, mean, scale, weight.dtype), padding)
    dx, dw, db = conv2d_backward(grad, image, weight, a, stride, left, (1, 1), 1, mask)
    if not mask[0]:
        return x.new_empty(0), dw, db
    top, _, start, _ = padding if left == (0, 0) else (0, 0, 0, 0)
    dx = dx[..., top : top + x.shape[-2], start : start + x.shape[-1]].to(x.dtype)
    return dx, dw, db
