// The last two tasks of every CPU kernel on tensors of more than 2^31 elements, of which only the pages that they touch
// exist. Their results must be those of a small tensor that has the same end, bit for bit. Prints "ok N", or what
// differs; exits 2 where so much address space cannot be had.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "lrn_pool_cpu.h"

using namespace alexnet_cpu;

namespace {

constexpr int64_t LIMIT = int64_t(1) << 31;
const Window PAPER{3, 3, 2, 2, 0, 0, 1, 1};

struct Pages {  // zeros that take no memory until they are touched
    uint8_t* data;
    size_t bytes;
    explicit Pages(int64_t count) : bytes(size_t(count)) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            printf("%zu bytes of address space cannot be reserved\n", bytes);
            exit(2);
        }
        data = static_cast<uint8_t*>(p);
    }
    ~Pages() { munmap(data, bytes); }
    Pages(const Pages&) = delete;
};

struct Shape {
    int64_t n, c, h, w;
    int64_t count() const { return n * c * h * w; }
    int64_t at(bool last, int64_t i, int64_t j, int64_t k, int64_t l) const {
        return last ? ((i * h + k) * w + l) * c + j : ((i * c + j) * h + k) * w + l;
    }
};

// Calls f(place in a, place in b) for the last `rows` rows and `columns` columns of the last image of two tensors.
template <class F>
void each_of_the_end(const Shape& a, const Shape& b, bool last, int64_t rows, int64_t columns, const F& f) {
    for (int64_t j = 0; j < a.c; ++j)
        for (int64_t k = 1; k <= rows; ++k)
            for (int64_t l = 1; l <= columns; ++l)
                f(a.at(last, a.n - 1, j, a.h - k, a.w - l), b.at(last, b.n - 1, j, b.h - k, b.w - l));
}

std::mt19937 generator(1);

void fill(const Pages& pages, size_t width) {  // small numbers, ties among them; bytes are taps
    for (size_t i = 0; i + width <= pages.bytes; i += width) {
        float v = float(int(generator() % 13)) / 2 - 3;
        uint32_t bits;
        memcpy(&bits, &v, 4);
        if (width == 1) pages.data[i] = uint8_t(generator() % 9);
        if (width == 2) bits >>= 16;
        if (width > 1) memcpy(pages.data + i, &bits, width);
    }
}

struct Problem {
    const char* name;
    bool backward, pool, normalise, pool_first;
};

struct Tensors {
    Shape in, out;
    Pages x, grad, place, y, made;  // made: places of forward
    Tensors(const Shape& in, const Shape& out, size_t width)
        : in(in), out(out), x(in.count() * int64_t(width)), grad(out.count() * int64_t(width)), place(out.count()),
          y(in.count() * int64_t(width)), made(out.count()) {}
};

Call describe(const Problem& p, const Tensors& t, Type type, bool last) {
    Call call;
    call.type = type, call.channels_last = last;
    call.n = t.in.n, call.c = t.in.c, call.h = t.in.h, call.w = t.in.w;
    call.normalise = p.normalise, call.pool = p.pool, call.pool_first = p.pool_first;
    call.size = 5, call.groups = 2, call.scale = 0.1, call.beta = 0.75, call.k = 2;
    if (p.pool) call.window = PAPER, call.oh = t.out.h, call.ow = t.out.w;
    call.relu = p.pool && p.normalise;
    call.x = t.x.data, call.out = t.y.data;
    if (p.backward) call.grad = t.grad.data, call.place = t.place.data;
    else call.place_out = p.pool ? t.made.data : nullptr;
    return call;
}

bool agree(const Problem& p, const Shape& large, const Shape& small, Type type, bool last) {
    size_t width = type == Type::bf16 ? 2 : 4;
    auto pooled = [&](const Shape& s) { return p.pool ? Shape{s.n, s.c, (s.h - 3) / 2 + 1, (s.w - 3) / 2 + 1} : s; };
    Tensors big(large, pooled(large), width), little(small, pooled(small), width);
    fill(little.x, width), fill(little.grad, width), fill(little.place, 1);
    each_of_the_end(large, small, last, small.h, small.w, [&](int64_t a, int64_t b) {
        memcpy(big.x.data + a * int64_t(width), little.x.data + b * int64_t(width), width);
    });
    each_of_the_end(big.out, little.out, last, little.out.h, little.out.w, [&](int64_t a, int64_t b) {
        memcpy(big.grad.data + a * int64_t(width), little.grad.data + b * int64_t(width), width);
        big.place.data[a] = little.place.data[b];
    });
    Call call = describe(p, big, type, last), other = describe(p, little, type, last);
    auto kernel = p.backward ? backward : forward;
    int64_t tasks = (p.backward ? backward_work(call) : forward_work(call)).tasks;
    kernel(call, tasks - 2, tasks);
    kernel(other, 0, (p.backward ? backward_work(other) : forward_work(other)).tasks);
    // a task is a row at least, or, of LRN alone, as many pixels as fit, the last one what is left
    const Shape &a = p.backward ? big.in : big.out, &b = p.backward ? little.in : little.out;
    int64_t wrong = 0, beyond = 0, columns = p.pool ? b.w : 8;
    each_of_the_end(a, b, last, 1, columns, [&](int64_t i, int64_t j) {
        beyond += i >= LIMIT;
        wrong += memcmp(big.y.data + i * int64_t(width), little.y.data + j * int64_t(width), width) != 0;
        if (p.pool && !p.backward) wrong += big.made.data[i] != little.made.data[j];
    });
    if (wrong) printf("%s: %lld values differ\n", p.name, static_cast<long long>(wrong));
    if (!beyond && large.count() == a.count()) printf("%s: nothing lies beyond 2^31\n", p.name);
    return wrong == 0 && (beyond > 0 || large.count() != a.count());
}

}  // namespace

int main() {
    const Problem problems[] = {
        {"lrn", false, false, true, false},          {"lrn backward", true, false, true, false},
        {"pool", false, true, false, false},         {"pool backward", true, true, false, false},
        {"lrn then pool", false, true, true, false}, {"its backward", true, true, true, false},
        {"pool then lrn", false, true, true, true},  {"its backward", true, true, true, true},
    };
    const Shape shapes[][2] = {
        {{8192, 96, 55, 55}, {1, 96, 55, 55}},  // by images
        {{1, 96, 4801, 4801}, {1, 96, 7, 13}},  // inside one image
    };
    int done = 0;
    for (const auto& shape : shapes)
        for (bool last : {false, true})
            for (Type type : {Type::bf16, Type::f32})
                for (const Problem& problem : problems) {
                    if (!agree(problem, shape[0], shape[1], type, last)) {
                        printf("(%s, %s, %s)\n", shape[0].n > 1 ? "many" : "huge", last ? "channels_last" : "NCHW",
                               type == Type::bf16 ? "bf16" : "fp32");
                        return 1;
                    }
                    ++done;
                }
    printf("ok %d\n", done);
    return 0;
}
