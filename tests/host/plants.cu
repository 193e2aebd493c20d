// A small right kernel and the same with one bug planted: what host execution has to catch.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "device.h"

namespace {

enum Plant { kNone, kMissingBarrier, kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite, kDivergentBarrier, kMissingLane };

constexpr int kThreads = 64;

// out[i] = in[63 - i] + the value of the lane before, by two shared arrays that lie side by side.
template <Plant kPlant> __global__ void mirror(const float* in, float* out) {
    DYNAMIC_SHARED(float, values, 0, kThreads);
    DYNAMIC_SHARED(float, mirrored, kThreads * 4, kThreads);
    const int i = threadIdx.x;
    values[i] = in[i + (kPlant == kGlobalRead)];
    if (kPlant == kSharedWrite && i == kThreads - 1) {
        values[i + 1] = 1;
    }
    if (kPlant != kMissingBarrier && !(kPlant == kDivergentBarrier && i == 5)) {
        __syncthreads();
    }
    mirrored[i] = values[kThreads - 1 - i + (kPlant == kSharedRead)];
    float before = 0;
    if (!(kPlant == kMissingLane && i == 40)) {
        before = shuffle_up(mirrored[i]);
    }
    out[i + (kPlant == kGlobalWrite)] = mirrored[i] + before;
}

template <Plant kPlant> int run() {
    std::vector<float> in(kThreads), first;
    for (int i = 0; i < kThreads; ++i) {
        in[i] = static_cast<float>(i);
    }
    for (int order : {0, 1, 7}) {
        std::vector<float> out(kThreads);
        host::order = order;
        try {
            launch(mirror<kPlant>, dim3(1), dim3(kThreads), 2 * kThreads * 4, nullptr, static_cast<const float*>(in.data()),
                   out.data());
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 1;
        }
        for (int i = 0; i < kThreads; ++i) {
            const float mirrored = in[kThreads - 1 - i];
            if (!(out[i] == mirrored + (i % 32 ? in[kThreads - i] : mirrored))) {
                std::fprintf(stderr, "wrong result in order %d\n", order);
                return 1;
            }
        }
    }
    return 0;
}

}  // namespace

int main(int, char** arguments) {
    int (*const runs[])() = {run<kNone>, run<kMissingBarrier>, run<kGlobalRead>, run<kGlobalWrite>,
                             run<kSharedRead>, run<kSharedWrite>, run<kDivergentBarrier>, run<kMissingLane>};
    return runs[std::atoi(arguments[1])]();
}
