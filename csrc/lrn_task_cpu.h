// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// LRN alone: a task is a block of pixels with all their channels.

template <class T>
struct LrnTask {
    using A = sum_t<T>;

    const Call& call;
    const int64_t block = lrn_block(call), pixels = call.h * call.w;
    const Lrn<A> lrn = lrn_of<A>(call);
    const int64_t group = call.c / call.groups, window = lrn.before + lrn.after + 1;
    const int64_t halo = lrn.before > lrn.after ? lrn.before : lrn.after;
    const A** const rows = buffer<const A*>(Slot::rows, window);

    // The latest `window` channels, a row each.
    struct Ring {
        A* base;
        int64_t step, slots;
        A* operator[](int64_t c) const { return base + c % slots * step; }
    };

    Ring ring(Slot slot) const { return {buffer<A>(slot, window * block), block, window}; }

    // Channels of a tensor: fp32 and fp64 are read where they lie, bf16 from the latest copies in fp32.
    struct Source {
        static constexpr bool copied = !std::is_same<T, A>::value;
        const T* from;
        int64_t pixels;
        Ring copies;

        void enter(int64_t c, int64_t n) const {
            if constexpr (copied) load_row(from + c * pixels, 1, copies[c], n);
        }
        const A* operator[](int64_t c) const {
            if constexpr (copied) return copies[c];
            else return from + c * pixels;
        }
    };

    Source source(const void* tensor, int64_t offset, Slot slot) const {
        return {static_cast<const T*>(tensor) + offset, pixels, Source::copied ? ring(slot) : Ring{}};
    }

    // The rows of the window around channel c; zeros beyond its group.
    template <class Channels>
    void window_rows(const Channels& from, int64_t c, int64_t before, const A* zeros) const {
        int64_t first = c / group * group;
        for (int64_t r = 0; r < window; ++r) {
            int64_t other = c + r - before;
            rows[r] = other >= first && other < first + group ? from[other] : zeros;
        }
    }

    // NCHW: channels enter in their order, each a row of the block's pixels. What the window around channel `term` needs is
    // then there, and with the terms of its window the gradient of channel `done`: tensors are read and written once, in
    // order, and what lies between is the latest `window` rows.
    void planar(int64_t task, bool backward) const {
        int64_t blocks = ceil_div(pixels, block), image = task / blocks, at = task % blocks * block;
        int64_t n = pixels - at < block ? pixels - at : block, offset = image * call.c * pixels + at;
        T* out = static_cast<T*>(call.out) + offset;
        Source x = source(call.x, offset, Slot::raw), grad{};
        Ring direct{}, shared{};
        if (backward) grad = source(call.grad, offset, Slot::grad), direct = ring(Slot::direct), shared = ring(Slot::shared);
        A* zeros = buffer<A>(Slot::zeros, block);
        fill(zeros, A(0), n);
        A* result = buffer<A>(Slot::result, block);
        int64_t behind = backward ? lrn.before : 0;
        for (int64_t entering = 0; entering < call.c + lrn.after + behind; ++entering) {
            int64_t term = entering - lrn.after, done = term - behind;
            if (entering < call.c) x.enter(entering, n);
            if (backward && term >= 0 && term < call.c) {
                grad.enter(term, n);
                window_rows(x, term, lrn.before, zeros);
                backward_term_rows(rows, x[term], grad[term], direct[term], shared[term], n, lrn);
            }
            if (done < 0) continue;
            if (backward) window_rows(shared, done, lrn.after, zeros);
            else window_rows(x, done, lrn.before, zeros);
            finish(out + done * pixels, result, n, [&](A* to) {
                if (backward) backward_result(rows, x[done], direct[done], to, n, lrn);
                else normalise_rows(rows, x[done], to, n, lrn);
            });
        }
    }

    template <class F>
    void finish(T* out, A* result, int64_t n, const F& compute) const {
        if constexpr (std::is_same<T, A>::value) {
            compute(out);
        } else {
            compute(result);
            store_row(result, out, 1, n);
        }
    }

    void copy_in(const T* from, A* plane, int64_t n, int64_t pitch) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t g = 0; g < call.groups; ++g)
                load_row(from + i * call.c + g * group, 1, plane + halo + i * pitch + g * (group + halo), group);
    }

    void interleaved(int64_t task, bool backward) const {
        int64_t all = call.n * pixels, at = task * block, n = all - at < block ? all - at : block;
        Plane plane{1, n * call.groups, group, halo, 0};
        int64_t pitch = call.groups * (group + halo);
        A* x = buffer<A>(Slot::raw, plane.size());
        A* result = buffer<A>(Slot::result, plane.size());
        plane.clear_halo(x);
        copy_in(static_cast<const T*>(call.x) + at * call.c, x, n, pitch);
        if (backward) {
            A* grad = buffer<A>(Slot::grad, plane.size());
            plane.clear_halo(grad);
            copy_in(static_cast<const T*>(call.grad) + at * call.c, grad, n, pitch);
            A* direct = buffer<A>(Slot::direct, plane.size());
            A* shared = buffer<A>(Slot::shared, plane.size());
            backward_plane(plane, x, grad, direct, shared, result, rows, lrn);
        } else {
            normalise_plane(plane, x, result, rows, lrn);
        }
        T* out = static_cast<T*>(call.out) + at * call.c;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t g = 0; g < call.groups; ++g)
                store_row(result + halo + i * pitch + g * (group + halo), out + i * call.c + g * group, 1, group);
    }

    void run(int64_t begin, int64_t end, bool backward) const {
        for (int64_t task = begin; task < end; ++task)
            call.channels_last ? interleaved(task, backward) : planar(task, backward);
    }
};
