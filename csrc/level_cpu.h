// One instruction set's copy of the kernels (see lrn_pool_cpu.cpp), therefore without an include guard.

namespace ALEXNET_LEVEL {

namespace {

#include "rows_cpu.h"

#include "lrn_cpu.h"

#include "pool_cpu.h"

#include "lrn_task_cpu.h"

#include "fused_cpu.h"

#include "fused_backward_cpu.h"

template <class T>
void forward_of(const Call& call, int64_t begin, int64_t end) {
    if (call.pool)
        PoolForward<T>(call).run(begin, end);
    else
        LrnTask<T>{call}.run(begin, end, false);
}

template <class T>
void backward_of(const Call& call, int64_t begin, int64_t end) {
    if (call.pool)
        PoolBackward<T>(call).run(begin, end);
    else
        LrnTask<T>{call}.run(begin, end, true);
}

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
    switch (call.type) {
        case Type::f32: return forward_of<float>(call, begin, end);
        case Type::f64: return forward_of<double>(call, begin, end);
        case Type::bf16: return forward_of<bf16>(call, begin, end);
    }
}

void backward(const Call& call, int64_t begin, int64_t end) {
    switch (call.type) {
        case Type::f32: return backward_of<float>(call, begin, end);
        case Type::f64: return backward_of<double>(call, begin, end);
        case Type::bf16: return backward_of<bf16>(call, begin, end);
    }
}

}  // namespace ALEXNET_LEVEL
