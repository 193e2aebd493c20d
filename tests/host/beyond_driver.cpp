// The last block of the fused backward on tensors of more than 2^31 elements, of which only the pages that it touches
// exist: what it writes must be what a small problem with the same end gives, bit for bit, and no other page may be
// touched. Exits 2 where so much address space cannot be had.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "device.h"
#include "lrn_pool_backward.h"

namespace {

struct Pages {  // zeros that take no memory until they are touched
    uint8_t* data;
    size_t bytes;
    explicit Pages(size_t count) : bytes(count) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            std::printf("%zu bytes of address space cannot be reserved\n", bytes);
            std::exit(2);
        }
        data = static_cast<uint8_t*>(p);
        madvise(p, bytes, MADV_NOHUGEPAGE);
    }
    ~Pages() { munmap(data, bytes); }
    Pages(const Pages&) = delete;

    // Pages that exist and end more than `tail` bytes before the end.
    size_t before(size_t tail) const {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), count = (bytes - tail) / page;
        std::vector<unsigned char> there(count);
        mincore(data, count * page, there.data());
        size_t touched = 0;
        for (const unsigned char one : there) {
            touched += one & 1;
        }
        return touched;
    }
};

struct Tensors {
    LrnPoolBackward problem;
    Pages x, grad, place, dx;
    Tensors(int64_t images, int height, int width, int channels, size_t size)
        : problem{nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, images, height, width,
                  (height - 3) / 2 + 1, (width - 3) / 2 + 1, channels, 2, 0, 0, 0.02f, 0.75f, 2, true},
          x(static_cast<size_t>(images) * height * width * channels * size),
          grad(static_cast<size_t>(images) * problem.out_height * problem.out_width * channels * size),
          place(grad.bytes / size), dx(x.bytes) {
        problem.x = x.data, problem.grad = grad.data, problem.place = place.data, problem.dx = dx.data;
    }
};

std::mt19937 generator(1);

void fill(const Pages& pages, size_t size) {
    for (size_t i = 0; i < pages.bytes; i += size) {
        const uint32_t bits = as_bits(static_cast<float>(generator() % 2001) / 500 - 2) >> (size == 2 ? 16 : 0);
        std::memcpy(pages.data + i, &bits, size);
    }
}

uint8_t* end_of(const Pages& pages, size_t bytes) { return pages.data + pages.bytes - bytes; }

int check(const char* name, int64_t images, int height, int width, int rows, ElementType type) {
    constexpr int kChannels = 96;
    const size_t size = type == ElementType::kFloat32 ? 4 : 2;
    Tensors small(1, rows, width, kChannels, size), large(images, height, width, kChannels, size);
    fill(small.x, size), fill(small.grad, size);
    for (size_t i = 0; i < small.place.bytes; ++i) {
        small.place.data[i] = static_cast<uint8_t>(generator() % 9);
    }
    for (auto [from, to] : {std::pair(&small.x, &large.x), std::pair(&small.grad, &large.grad),
                            std::pair(&small.place, &large.place)}) {
        std::memcpy(end_of(*to, from->bytes), from->data, from->bytes);
    }
    std::memset(end_of(large.dx, small.dx.bytes), host::kPoison, small.dx.bytes);
    host::first_block = 0;
    lrn_pool_backward(small.problem, type, nullptr);
    host::first_block = static_cast<unsigned>(lrn_pool_backward_partials(large.problem)) - 1;
    lrn_pool_backward(large.problem, type, nullptr);

    size_t written = 0, wrong = 0;
    const uint8_t *got = end_of(large.dx, small.dx.bytes), *want = small.dx.data;
    for (size_t i = 0; i < small.dx.bytes; i += size) {
        const bool poison = std::memcmp(got + i, "\xff\xff\xff\xff", size) == 0;
        written += !poison;
        wrong += !poison && std::memcmp(got + i, want + i, size) != 0;
    }
    size_t elsewhere = 0;
    for (auto [tensor, part] : {std::pair(&large.x, &small.x), std::pair(&large.grad, &small.grad),
                                std::pair(&large.place, &small.place), std::pair(&large.dx, &small.dx)}) {
        elsewhere += tensor->before(part->bytes);
    }
    const bool last = std::memcmp(got + small.dx.bytes - size, want + small.dx.bytes - size, size) == 0;
    const bool beyond = (large.x.bytes - small.x.bytes) / size > size_t{1} << 31;
    if (written < 500 || wrong != 0 || elsewhere != 0 || !last || !beyond) {
        std::printf("%s: %zu written, %zu of them wrong, %zu pages touched elsewhere, the last is %s\n", name, written,
                    wrong, elsewhere, last ? "right" : "wrong");
        return 1;
    }
    return 0;
}

}  // namespace

int main() {
    int failures = 0;
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16}) {
        failures += check("by images", 8192, 55, 55, 55, type);
        failures += check("inside one image", 1, 450001, 55, 5, type);
    }
    return failures;
}
