// The number formats of the kernels: no torch, no CUDA.
#pragma once

enum class ElementType { kFloat32, kFloat16, kBFloat16 };
