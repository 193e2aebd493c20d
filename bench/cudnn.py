"""cuDNN's own LRN and pooling, which torch does not use, called by ctypes as a second ruler beside torch's.

Every call goes to torch's current stream, so it can be captured in a CUDA graph. cuDNN's LRN has ``alpha / n`` in its
formula, like torch; a window over towers is a tensor whose towers are images, which needs contiguous NCHW.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable
from ctypes import c_double, c_int, c_uint, c_void_p
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}  # cudnnDataType_t
_POOLING_MAX, _PROPAGATE_NAN, _LRN_CROSS_CHANNEL = 0, 1, 0
_CALL = [c_void_p, c_void_p]

# name: what it takes; all return a cudnnStatus_t
SIGNATURES: dict[str, list[type]] = {
    "cudnnCreate": [c_void_p],
    "cudnnSetStream": [c_void_p, c_void_p],
    "cudnnCreateTensorDescriptor": [c_void_p],
    "cudnnSetTensor4dDescriptorEx": [c_void_p, *[c_int] * 9],
    "cudnnDestroyTensorDescriptor": [c_void_p],
    "cudnnCreateLRNDescriptor": [c_void_p],
    "cudnnSetLRNDescriptor": [c_void_p, c_uint, c_double, c_double, c_double],
    "cudnnDestroyLRNDescriptor": [c_void_p],
    "cudnnCreatePoolingDescriptor": [c_void_p],
    "cudnnSetPooling2dDescriptor": [c_void_p, *[c_int] * 8],
    "cudnnDestroyPoolingDescriptor": [c_void_p],
    "cudnnLRNCrossChannelForward": [*_CALL, c_int, c_void_p, *_CALL, c_void_p, *_CALL],
    "cudnnLRNCrossChannelBackward": [*_CALL, c_int, c_void_p, *_CALL, *_CALL, *_CALL, c_void_p, *_CALL],
    "cudnnPoolingForward": [*_CALL, c_void_p, *_CALL, c_void_p, *_CALL],
    "cudnnPoolingBackward": [*_CALL, c_void_p, *_CALL, *_CALL, *_CALL, c_void_p, *_CALL],
}


class CudnnError(RuntimeError):
    """cuDNN could not be loaded, or returned a status other than success."""


@functools.cache
def library() -> ctypes.CDLL:
    """The libcudnn that torch uses, with every signature declared.

    Raises:
        CudnnError: there is none, or it lacks a function.
    """
    names = ["libcudnn.so.9"] if sys.platform != "win32" else ["cudnn64_9.dll"]
    spec = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        names.insert(0, str(Path(folder) / "lib" / names[-1]))
    names += [str(p) for p in Path(torch.__file__).with_name("lib").glob("libcudnn.so*")]
    errors = []
    for name in names:
        try:
            found = ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
            continue
        for function, arguments in SIGNATURES.items():
            if not hasattr(found, function):
                raise CudnnError(f"{name} has no {function}")
            getattr(found, function).argtypes = arguments
            getattr(found, function).restype = c_int
        found.cudnnGetErrorString.argtypes, found.cudnnGetErrorString.restype = [c_int], ctypes.c_char_p
        found.cudnnGetVersion.restype = ctypes.c_size_t
        return found
    raise CudnnError(f"no cuDNN 9 could be loaded ({'; '.join(errors)})")


def _check(status: int, what: str) -> None:
    if status:
        raise CudnnError(f"{what}: {library().cudnnGetErrorString(status).decode()}")


def _call(name: str, *arguments: object) -> None:
    _check(getattr(library(), name)(*arguments), name)


class _Descriptor:
    """A cuDNN descriptor that lives as long as this object."""

    def __init__(self, kind: str, setter: str, *values: float) -> None:
        self.kind, self.value = kind, c_void_p()
        _call(f"cudnnCreate{kind}Descriptor", ctypes.byref(self.value))
        _call(setter, self.value, *values)

    def __del__(self) -> None:
        if self.value:
            getattr(library(), f"cudnnDestroy{self.kind}Descriptor")(self.value)


def _tensor(t: Tensor) -> _Descriptor:
    return _Descriptor("Tensor", "cudnnSetTensor4dDescriptorEx", _DTYPES[t.dtype], *t.shape, *t.stride())


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cudnnCreate", ctypes.byref(handle))
    return handle


def _stream(t: Tensor) -> c_void_p:
    handle = _handle(t.device.index or 0)
    _call("cudnnSetStream", handle, torch.cuda.current_stream(t.device).cuda_stream)
    return handle


_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
_SCALES = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


def _towers(t: Tensor, groups: int) -> Tensor:
    """Towers as images: a view of contiguous NCHW."""
    return t.view(t.shape[0] * groups, t.shape[1] // groups, *t.shape[2:])


def lrn(
    x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Callable[[], Tensor]]]:
    """Forward of ``x`` as a call, and for a gradient the backward as a call; buffers are allocated here, once."""
    y, towers = torch.empty_like(x), _towers(x, groups) if groups > 1 else x
    shape = _tensor(towers)
    norm = _Descriptor("LRN", "cudnnSetLRNDescriptor", size, alpha, beta, k)

    def forward() -> Tensor:
        _call(
            "cudnnLRNCrossChannelForward", _stream(x), norm.value, _LRN_CROSS_CHANNEL,
            _SCALES[0], shape.value, x.data_ptr(), _SCALES[1], shape.value, y.data_ptr(),
        )  # fmt: skip
        return y

    def backward(grad: Tensor) -> Callable[[], Tensor]:
        dx = torch.empty_like(x)
        forward()

        def call() -> Tensor:
            _call(
                "cudnnLRNCrossChannelBackward", _stream(x), norm.value, _LRN_CROSS_CHANNEL,
                _SCALES[0], shape.value, y.data_ptr(), shape.value, grad.data_ptr(), shape.value, x.data_ptr(),
                _SCALES[1], shape.value, dx.data_ptr(),
            )  # fmt: skip
            return dx

        return call

    return forward, backward


def max_pool2d(
    x: Tensor, kernel: int, stride: int
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Callable[[], Tensor]]]:
    """As :func:`lrn`, for a max-pooling without padding. It keeps no indices: backward compares again."""
    height, width = ((side - kernel) // stride + 1 for side in x.shape[2:])
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    y = torch.empty(*x.shape[:2], height, width, dtype=x.dtype, device=x.device, memory_format=layout)
    shape_x, shape_y = _tensor(x), _tensor(y)
    window = (kernel, kernel, 0, 0, stride, stride)
    pool = _Descriptor("Pooling", "cudnnSetPooling2dDescriptor", _POOLING_MAX, _PROPAGATE_NAN, *window)

    def forward() -> Tensor:
        _call(
            "cudnnPoolingForward", _stream(x), pool.value,
            _SCALES[0], shape_x.value, x.data_ptr(), _SCALES[1], shape_y.value, y.data_ptr(),
        )  # fmt: skip
        return y

    def backward(grad: Tensor) -> Callable[[], Tensor]:
        dx = torch.empty_like(x)
        forward()

        def call() -> Tensor:
            _call(
                "cudnnPoolingBackward", _stream(x), pool.value,
                _SCALES[0], shape_y.value, y.data_ptr(), shape_y.value, grad.data_ptr(),
                shape_x.value, x.data_ptr(), _SCALES[1], shape_x.value, dx.data_ptr(),
            )  # fmt: skip
            return dx

        return call

    return forward, backward
