"""The mended interpreter: bf16 as hardware has it. Without a GPU, what the other tests here say of bf16 rests on this."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: nothing is interpreted"
)


@triton.jit
def narrow(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_rounds_to_the_nearest_with_ties_to_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (2**16 - 16,)).to(torch.int32)
    bits[::4] = bits[::4] & -65536 | 32768  # ties
    special = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan")]).repeat(2)
    x = torch.cat([bits.view(torch.float32), special])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    narrow[(1,)](x, y, x.numel())
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_multiplies_values() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float())
