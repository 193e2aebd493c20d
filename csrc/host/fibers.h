// The threads of one CUDA block as fibers of one CPU thread: any interleaving is a list of turns, so it can be replayed.
//
// A fiber runs until it waits (for the block's barrier or for its warp) and then the next one in the order has its turn.
// Between two waits nothing else runs: whatever a kernel reads without having waited for it shows as a result that differs
// between orders, or as the NaN that shared memory begins with. What the scheduler itself can see it throws, on its own stack:
// a barrier that some threads passed by, a warp whose lanes wait for different things, a write between two shared arrays.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kRedZone = 64;    // bytes before, between and after shared arrays
constexpr size_t kSharedMemory = 227 << 10;
constexpr size_t kArrays = 16;     // at most, of a kernel
constexpr size_t kSlot = 40;       // bytes of a lane in a meeting of its warp: the largest is a product's 10 words
constexpr uint8_t kPoison = 0xff;  // every float type reads it as NaN

enum class Waits { kNothing, kBarrier, kWarp };

struct Copy {
    void* to;
    const void* from;  // null: zeros
    unsigned group;
};

// A product of a warpgroup that is under way; `form` adds to `count` sums from d on what is this thread's.
struct AsyncProduct {
    void (*form)(const AsyncProduct&);
    float* d;
    int count;
    uint64_t a, b;  // descriptors
    unsigned group;
};

// Sums that nobody may touch, as they were; in their place is NaN.
struct Hidden {
    float* d;
    std::vector<float> values;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;  // ASan's
    std::vector<Copy> copies;    // asynchronous ones, not made yet, in their order
    unsigned copy_groups = 0;    // closed so far
    std::vector<AsyncProduct> products;
    std::vector<Hidden> hidden;  // the sums of `products`
    unsigned product_groups = 0, asked = 0;  // asked: products so far
    bool sums_fenced = false;
    dim3 index;
    unsigned linear = 0, generation = 0;  // generation: of the exchange it waits for
    Waits waits = Waits::kNothing;
    bool done = false;
};

// One meeting of a warp: every lane leaves something, the last to come wakes all. Two buffers, used in turn: nobody can be
// two meetings ahead of a lane that has not yet read.
struct Warp {
    alignas(16) uint8_t buffers[2][kWarp * kSlot];
    unsigned arrived = 0, generation = 0;
    const void* operation = nullptr;  // what the lanes that are there have come for

    // Of the next meeting, a T for each lane.
    template <class T> auto slots() -> T (&)[kWarp] {
        static_assert(sizeof(T) <= kSlot && std::is_trivially_copyable_v<T>);
        return *reinterpret_cast<T(*)[kWarp]>(buffers[generation & 1]);
    }
};

struct SharedArray {
    int key;
    size_t offset, bytes;
};

struct Block {
    dim3 grid, block, index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<uint8_t> shared;  // red zone, array, red zone, array, ..., in the order of first use
    std::vector<SharedArray> arrays;
    std::vector<uint8_t> fenced;  // as `shared` was at the last fence.proxy.async
    std::vector<std::vector<std::pair<uint64_t, uint64_t>>> asked;  // by warpgroup: the products so far, both descriptors
    size_t used = 0, dynamic_bytes = 0;
    bool vote = false, arriving_vote = false;  // of the last barrier, of the next
    Fiber* current = nullptr;
    ucontext_t scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    std::function<void()> body;
    std::string error;
};

inline Block* the_block = nullptr;
inline int shared_limit = kSharedMemory;  // of the device that is played
// Of the turns: 0 forward, 1 reversed, both a warp after another, each as far as it can come; anything else is the seed of a
// shuffle for each round, in which each fiber has one turn.
inline int order = 0;
inline unsigned first_block = 0;  // along x; those before it do not run, where a tensor's end is all that fits into memory

inline void poison(const uint8_t* address, size_t bytes, bool on) {
#if defined(__SANITIZE_ADDRESS__)
    on ? __asan_poison_memory_region(address, bytes) : __asan_unpoison_memory_region(address, bytes);
#else
    (void)address, (void)bytes, (void)on;
#endif
}

inline void start_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, stack, size);
#endif
}

inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, stack, size);
#endif
}

// From a fiber back to the scheduler; returns when the fiber has its next turn.
inline void yield() {
    Block& b = *the_block;
    Fiber& me = *b.current;
    start_switch(me.done ? nullptr : &me.fake_stack, b.scheduler_stack, b.scheduler_stack_size);
    swapcontext(&me.context, &b.scheduler);
    finish_switch(me.fake_stack, &b.scheduler_stack, &b.scheduler_stack_size);
}

inline void fiber_main() {
    Block& b = *the_block;
    finish_switch(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
    b.body();
    b.current->done = true;
    yield();
}

inline void turn(Fiber& fiber) {
    Block& b = *the_block;
    b.current = &fiber;
    void* fake = nullptr;
    start_switch(&fake, fiber.stack.get(), kStack);
    swapcontext(&b.scheduler, &fiber.context);
    finish_switch(fake, nullptr, nullptr);
}

// An error that a fiber finds: the scheduler throws it, for an exception cannot leave a fiber's stack.
inline void fail(const char* message) {
    the_block->error = message;
    yield();
}

// Waits until all 32 lanes have come for the same operation; the last does `work` before any goes on.
template <class Work> void meet(Warp& warp, const void* operation, Work work) {
    Fiber& me = *the_block->current;
    me.generation = warp.generation;
    if (warp.arrived > 0 && warp.operation != operation) {
        fail("lanes of a warp have come for different operations");
    }
    warp.operation = operation;
    if (++warp.arrived == kWarp) {
        work();
        warp.arrived = 0;
        ++warp.generation;
    }
    me.waits = Waits::kWarp;
    if (warp.generation == me.generation) {
        yield();
    }
    me.waits = Waits::kNothing;
}

// What a lane gives, seen by all 32: `pick` reads the others' values once they are all there.
template <class Pick>
uint32_t exchange(uint32_t value, Pick pick) {
    static const char operation = 0;
    Warp& warp = the_block->warps[the_block->current->linear / kWarp];
    uint32_t(&values)[kWarp] = warp.slots<uint32_t>();
    values[the_block->current->linear % kWarp] = value;
    meet(warp, &operation, [] {});
    return pick(values);
}

inline void barrier() {
    the_block->current->waits = Waits::kBarrier;
    yield();
}

// A barrier that tells all whether any of them said yes.
inline bool barrier_vote(bool yes) {
    the_block->arriving_vote |= yes;
    barrier();
    return the_block->vote;
}

// The shared array `key` of this block: made, and filled with NaN, at its first use.
inline void* shared_array(int key, size_t bytes) {
    Block& b = *the_block;
    for (const SharedArray& array : b.arrays) {
        if (array.key == key) {
            return b.shared.data() + array.offset;
        }
    }
    const size_t offset = b.used + kRedZone;
    if (offset + bytes + kRedZone > b.shared.size()) {
        fail("the launch asked for too little shared memory");
    }
    b.arrays.push_back({key, offset, bytes});
    b.used = (offset + bytes + 15) / 16 * 16;
    poison(b.shared.data() + offset, bytes, false);
    return b.shared.data() + offset;
}

// An array inside the dynamic shared memory that the launch asked for.
inline void* dynamic_shared(size_t offset, size_t bytes) {
    if (offset + bytes > the_block->dynamic_bytes) {
        fail("the launch asked for too little shared memory");
    }
    return shared_array(static_cast<int>(offset), bytes);
}

inline void check_red_zones(Block& b) {
    poison(b.shared.data(), b.shared.size(), false);
    size_t at = 0;
    for (size_t i = 0; i <= b.arrays.size(); ++i) {
        const size_t end = i < b.arrays.size() ? b.arrays[i].offset : b.shared.size();
        for (; at < end; ++at) {
            if (b.shared[at] != kPoison) {
                throw std::runtime_error("write between shared arrays, before array " + std::to_string(i));
            }
        }
        at = i < b.arrays.size() ? end + b.arrays[i].bytes : end;
    }
}

inline bool asleep(const Block& b, const Fiber& f) {
    return f.waits == Waits::kBarrier ||
           (f.waits == Waits::kWarp && b.warps[f.linear / kWarp].generation == f.generation);
}

// After a round in which every fiber had its turn: opens the barrier if all have come, throws if nobody can go on.
inline bool finished(Block& b) {
    size_t done = 0, at_barrier = 0, in_warp = 0;
    for (const Fiber& f : b.fibers) {
        done += f.done;
        at_barrier += !f.done && f.waits == Waits::kBarrier;
        in_warp += !f.done && f.waits == Waits::kWarp && asleep(b, f);
    }
    if (at_barrier == b.fibers.size()) {
        for (Fiber& f : b.fibers) {
            f.waits = Waits::kNothing;
        }
        b.vote = std::exchange(b.arriving_vote, false);
    } else if (done < b.fibers.size() && done + at_barrier + in_warp == b.fibers.size()) {
        throw std::runtime_error("threads wait for each other: " + std::to_string(at_barrier) + " at __syncthreads, " +
                                 std::to_string(in_warp) + " in a warp operation, " + std::to_string(done) + " returned");
    }
    return done == b.fibers.size();
}

inline void run_block(Block& b, std::vector<unsigned>& turns, std::mt19937& random) {
    poison(b.shared.data(), b.shared.size(), false);
    std::fill(b.shared.begin(), b.shared.end(), kPoison);
    poison(b.shared.data(), b.shared.size(), true);
    b.arrays.clear();
    b.fenced.assign(b.shared.size(), kPoison);
    b.asked.assign((b.fibers.size() + 4 * kWarp - 1) / (4 * kWarp), {});
    b.used = 0;
    b.vote = b.arriving_vote = false;
    b.warps.assign((b.fibers.size() + kWarp - 1) / kWarp, {});
    for (Fiber& f : b.fibers) {
        f.waits = Waits::kNothing;
        f.done = false;
        f.copies.clear();
        f.copy_groups = 0;
        f.products.clear();
        f.hidden.clear();
        f.product_groups = f.asked = 0;
        f.sums_fenced = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
    }
    do {
        if (order > 1) {
            std::shuffle(turns.begin(), turns.end(), random);
        }
        for (size_t from = 0; from < turns.size(); from += kWarp) {
            for (bool moved = true; moved;) {
                moved = false;
                for (size_t i = from; i < std::min(from + kWarp, turns.size()); ++i) {
                    Fiber& f = b.fibers[turns[i]];
                    if (!f.done && !asleep(b, f)) {
                        turn(f);
                        moved = order < 2;
                    }
                    if (!b.error.empty()) {
                        throw std::runtime_error(b.error);
                    }
                }
            }
        }
    } while (!finished(b));
    check_red_zones(b);
    for (const Fiber& f : b.fibers) {
        if (f.asked != b.asked[f.linear / (4 * kWarp)].size()) {
            throw std::runtime_error("a warp has passed by a product of its warpgroup");
        }
    }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
    Block b;
    b.grid = grid;
    b.block = block;
    b.body = std::move(body);
    b.fibers.resize(block.x * block.y * block.z);
    b.dynamic_bytes = shared_bytes;
    b.shared.resize(kSharedMemory + kArrays * (kRedZone + 16));
    std::vector<unsigned> turns;
    for (unsigned i = 0; i < b.fibers.size(); ++i) {
        b.fibers[i].stack = std::make_unique<char[]>(kStack);
        b.fibers[i].linear = i;
        b.fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        turns.push_back(i);
    }
    if (order == 1) {
        std::reverse(turns.begin(), turns.end());
    }
    std::mt19937 random(static_cast<unsigned>(order));
    the_block = &b;
    for (b.index.z = 0; b.index.z < grid.z; ++b.index.z) {
        for (b.index.y = 0; b.index.y < grid.y; ++b.index.y) {
            for (b.index.x = first_block; b.index.x < grid.x; ++b.index.x) {
                run_block(b, turns, random);
            }
        }
    }
    the_block = nullptr;
}

}  // namespace host
