// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// Elements, and planes: how rows of a tensor lie in a thread's buffers, as fp32 or fp64.

template <class T>
struct Arithmetic {
    using type = float;
    using index = int32_t;  // as wide as the values, so that a mask of one selects the other
};
template <>
struct Arithmetic<double> {
    using type = double;
    using index = int64_t;
};
template <class T>
using sum_t = typename Arithmetic<T>::type;
template <class A>
using index_t = typename Arithmetic<A>::index;

struct bf16 {
    uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline void store(float& out, float v) { out = v; }
inline void store(double& out, double v) { out = v; }
inline void store(bf16& out, float v) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = uint16_t(v != v ? 0x7fc0u : rounded);
}

template <class T>
inline sum_t<T> rounded(sum_t<T> v) {
    T narrow;
    store(narrow, v);
    return load(narrow);
}

template <class T>
void round_row(sum_t<T>* v, int64_t n) {
    if (sizeof(T) == sizeof(sum_t<T>)) return;
    for (int64_t i = 0; i < n; ++i) v[i] = rounded<T>(v[i]);
}

template <class T>
void load_row(const T* __restrict from, int64_t stride, sum_t<T>* __restrict to, int64_t n) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
    else if (stride == 2)
        for (int64_t i = 0; i < n; ++i) to[i] = load(from[2 * i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = load(from[stride * i]);
}

template <class T>
void store_row(const sum_t<T>* __restrict from, T* __restrict to, int64_t stride, int64_t n) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
    else if (stride == 2)
        for (int64_t i = 0; i < n; ++i) store(to[2 * i], from[i]);
    else
        for (int64_t i = 0; i < n; ++i) store(to[stride * i], from[i]);
}

template <class A>
void fill(A* to, A value, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class A>
A* buffer(Slot slot, int64_t count) {
    return static_cast<A*>(scratch(slot, size_t(count) * sizeof(A)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// Channels in a buffer: `segments` groups of `channels`, neighbouring channels `step` apart, and `halo` channels of zeros
// before, between and behind the groups. A window over channels is then a sum of shifted rows with no border to look at,
// and one loop runs over everything: NCHW has a row of pixels per channel (step = its length, a segment per group),
// channels_last has step = 1 and a segment per pixel and group.
struct Plane {
    int64_t step, segments, channels, halo, slack;

    int64_t lead() const { return halo * step; }
    int64_t segment() const { return (channels + halo) * step; }
    int64_t body() const { return segments * segment() - halo * step; }  // without the zeros behind the last one
    int64_t size() const { return lead() + segments * segment() + slack; }
    int64_t channel(int64_t c) const { return lead() + (c + c / channels * halo) * step; }  // NCHW

    template <class A>
    void clear_halo(A* plane) const {
        if (halo == 0) return;
        fill(plane, A(0), lead());
        for (int64_t s = 0; s < segments; ++s) fill(plane + lead() + s * segment() + channels * step, A(0), lead());
    }
};

// Columns of NCHW rows, taken apart by their place within the stride: the columns that one tap of a pooling window meets
// are then neighbours. Column `phase + sw * j` of the padded row is number j of its phase.
struct Columns {
    int64_t stride, padding, width, pitch;

    void valid(int64_t phase, int64_t& from, int64_t& to) const {
        from = ceil_div(padding - phase, stride);
        to = ceil_div(width + padding - phase, stride);
        to = to < pitch ? to : pitch;
        from = from < to ? from : to;
    }
    int64_t column(int64_t phase, int64_t j) const { return j * stride + phase - padding; }
};
