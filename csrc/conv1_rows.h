// The rows a block of conv1_backward.cu goes through, and how they come into its shared memory: a row of cells of the image,
// normalised and rounded, and a row of the gradient, masked. T is the kernel's traits.
#pragma once

#include "conv1_backward_device.h"

namespace conv1_grad {

// How output rows lie over blocks: all rows of all strips, a strip being some columns of an image.
struct Rows {
    int64_t total;
    int strips, columns;  // of an image, of a strip
};

// A row of cells, and where it lies. Output row `row - 2` is multiplied when it is there, if that is not before `first`.
struct Cursor {
    int64_t image, left;  // left: output rows behind this strip
    int strip, row, first, last;
    DEVICE bool multiplies() const { return row >= first + kWindow - 1; }
    DEVICE int column(const Rows& rows) const { return strip * rows.columns; }  // the strip's first output pixel
    DEVICE int width(const Rows& rows, int out_width) const {
        const int rest = out_width - column(rows);
        return rest < rows.columns ? rest : rows.columns;
    }
};

// Into a strip, at its output row `first`.
DEVICE void enter(Cursor& cursor, int first, int out_height) {
    const int rows = cursor.left < out_height - first ? static_cast<int>(cursor.left) : out_height - first;
    cursor.row = cursor.first = first;
    cursor.last = first + rows + kWindow - 2;
    cursor.left -= rows;
}

DEVICE Cursor first_row(const Rows& rows, int out_height) {
    const int64_t begin = rows.total * blockIdx.x / gridDim.x, end = rows.total * (blockIdx.x + 1) / gridDim.x;
    Cursor cursor;
    cursor.left = end - begin;
    cursor.image = begin / out_height / rows.strips;
    cursor.strip = static_cast<int>(begin / out_height % rows.strips);
    enter(cursor, static_cast<int>(begin % out_height), out_height);
    return cursor;
}

// False behind the last row.
DEVICE bool advance(Cursor& cursor, const Rows& rows, int out_height) {
    if (cursor.row < cursor.last) {
        ++cursor.row;
        return true;
    }
    if (cursor.left == 0) {
        return false;
    }
    if (++cursor.strip == rows.strips) {
        cursor.strip = 0;
        ++cursor.image;
    }
    enter(cursor, 0, out_height);
    return true;
}

// ---------------------------------------------------------------------------------------------------- the image

// A thread's column of the image through a row of cells.
struct Column {
    bool wanted;         // by the strip
    bool rows[kStride];  // which of its four pixels are in the image
    int at[kStride];     // where they lie in its first plane; 0 for those that are not
};

DEVICE Column column_of(const Conv1Images& in, const Cursor& cursor, const Rows& rows, int out_width) {
    Column column;
    const int t = threadIdx.x;
    const int w = kStride * cursor.column(rows) + t - in.pad_left, h = kStride * cursor.row - in.pad_top;
    column.wanted = t < kStride * (cursor.width(rows, out_width) + kWindow - 1);
    const bool inside = column.wanted && w >= 0 && w < in.width;
#pragma unroll
    for (int ry = 0; ry < kStride; ++ry) {
        column.rows[ry] = inside && h + ry >= 0 && h + ry < in.height;
        column.at[ry] = column.rows[ry] ? (h + ry) * in.row_stride + w * in.column_stride : 0;
    }
    return column;
}

// Its twelve numbers as they are; for those outside the image, others.
template <class Raw>
DEVICE void load_column(uint32_t (&raw)[kRuns], const Conv1Images& in, const Column& column, int64_t image) {
    const Raw* x = static_cast<const Raw*>(in.x) + image * in.image_stride;
#pragma unroll
    for (int c = 0; c < kColors; ++c) {
#pragma unroll
        for (int ry = 0; ry < kStride; ++ry) {
            raw[ry * kColors + c] = x[column.at[ry]];
        }
        x += in.plane_stride;
    }
}

DEVICE void load_image(uint32_t (&raw)[kRuns], const Conv1Images& in, const Column& column, int64_t image) {
    switch (in.source) {
        case Conv1Source::kFloat32: return load_column<uint32_t>(raw, in, column, image);
        case Conv1Source::kFloat16:
        case Conv1Source::kBFloat16: return load_column<uint16_t>(raw, in, column, image);
        case Conv1Source::kUint8: return load_column<uint8_t>(raw, in, column, image);
    }
}

template <Conv1Source kSource> DEVICE float to_float(uint32_t raw) {
    switch (kSource) {
        case Conv1Source::kFloat16: return half_to_float(raw);
        case Conv1Source::kBFloat16: return as_float(raw << 16);
        case Conv1Source::kUint8: return static_cast<float>(raw);
        default: return as_float(raw);
    }
}

// Normalised and rounded, into a row of the ring.
template <class T, Conv1Source kSource>
DEVICE void store_column(uint8_t* cell, const uint32_t (&raw)[kRuns], const Conv1Images& in, const Column& column) {
    float values[kRuns];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        values[run] = to_float<kSource>(raw[run]);
    }
    if (in.mean != nullptr) {
#pragma unroll
        for (int c = 0; c < kColors; ++c) {
            const float mean = in.mean[c], scale = in.scale[c];
#pragma unroll
            for (int run = c; run < kRuns; run += kColors) {
                values[run] = (values[run] - mean) * scale;
            }
        }
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        const uint32_t operand = T::Op::round(values[run]);
        T::Op::put(cell + run / 2 * T::kChunkBytes + run % 2 * kStride * T::kBytes, column.rows[run / kColors] ? operand : 0);
    }
}

template <class T>
DEVICE void store_image(uint8_t* row, const uint32_t (&raw)[kRuns], const Conv1Images& in, const Column& column) {
    uint8_t* cell = row + threadIdx.x / kStride * T::kCellBytes + threadIdx.x % kStride * T::kBytes;
    if (!column.wanted) {
        return;
    }
    switch (in.source) {
        case Conv1Source::kFloat32: return store_column<T, Conv1Source::kFloat32>(cell, raw, in, column);
        case Conv1Source::kFloat16: return store_column<T, Conv1Source::kFloat16>(cell, raw, in, column);
        case Conv1Source::kBFloat16: return store_column<T, Conv1Source::kBFloat16>(cell, raw, in, column);
        case Conv1Source::kUint8: return store_column<T, Conv1Source::kUint8>(cell, raw, in, column);
    }
}

// ---------------------------------------------------------------------------------------------------- the gradient

// A row of the gradient, and of `a`, on their way; zeros behind the last pixel.
template <class T>
DEVICE void copy_gradient(uint8_t* grad, uint8_t* a, const Conv1Backward& p, const Cursor& cursor, const Rows& rows) {
    const int vector = threadIdx.x % T::kVectors, first = threadIdx.x / T::kVectors;
    if (first >= T::kPixels) {
        return;
    }
    const int width = cursor.width(rows, p.out_width);
    const int64_t row = (cursor.image * p.out_height + cursor.row - (kWindow - 1)) * p.out_width + cursor.column(rows);
    const int64_t at = (row + first) * (T::kChannels * T::kBytes) + vector * 16;
    constexpr int kStep = T::kPixels * T::kChannels * T::kBytes;  // from one of the thread's pixels to the next
    grad += first * T::kPitch + vector * 16;
#pragma unroll
    for (int item = 0; item < T::kItems; ++item) {
        if (first + item * T::kPixels < T::kColumns) {
            copy_async_16(grad + item * T::kPixels * T::kPitch, static_cast<const uint8_t*>(p.grad) + at + item * kStep,
                          first + item * T::kPixels < width);
        }
    }
    if (p.a != nullptr) {
        a += threadIdx.x * 16;
#pragma unroll
        for (int item = 0; item < T::kItems; ++item) {
            if (first + item * T::kPixels < T::kColumns) {
                copy_async_16(a + item * kStep, static_cast<const uint8_t*>(p.a) + at + item * kStep,
                              first + item * T::kPixels < width);
            }
        }
    }
    copy_async_commit();
}

// What this thread copied becomes operands; its channels' bias sums grow, where they are formed here.
template <class T>
DEVICE void prepare_gradient(uint8_t* grad, const uint8_t* a, bool masked, float (&bias)[4]) {
    const int vector = threadIdx.x % T::kVectors, first = threadIdx.x / T::kVectors;
    copy_async_wait<0>();
    if (first >= T::kPixels) {
        return;
    }
    grad += first * T::kPitch + vector * 16;
    a += threadIdx.x * 16;
#pragma unroll
    for (int item = 0; item < T::kItems; ++item) {
        if (first + item * T::kPixels < T::kColumns) {
            uint32_t words[4];
            prepare<T::kType>(words, grad + item * T::kPixels * T::kPitch,
                              a + item * T::kPixels * T::kChannels * T::kBytes, masked);
            if (!T::kBiasTile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    bias[i] += as_float(words[i]);
                }
            }
        }
    }
}

}  // namespace conv1_grad
