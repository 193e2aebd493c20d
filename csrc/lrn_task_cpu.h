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

    // The rows of the window around channel c of NCHW planes whose channels are `step` apart; zeros beyond its group.
    void window_rows(const A* base, int64_t step, int64_t c, int64_t before, const A* zeros) const {
        for (int64_t r = 0; r < window; ++r) {
            int64_t other = c + r - before;
            bool inside = other >= 0 && other < call.c && other / group == c / group;
            rows[r] = inside ? base + other * step : zeros;
        }
    }

    // NCHW: fp32 and fp64 are read where they lie, bf16 from a copy in fp32. Returns the channels and their distance.
    const A* channels(const T* from, int64_t n, Slot slot, int64_t& step) const {
        if constexpr (std::is_same<T, A>::value) {
            step = pixels;
            return from;
        } else {
            A* copy = buffer<A>(slot, call.c * block);
            for (int64_t c = 0; c < call.c; ++c) load_row(from + c * pixels, 1, copy + c * block, n);
            step = block;
            return copy;
        }
    }

    void planar(int64_t task, bool backward) const {
        int64_t blocks = ceil_div(pixels, block), image = task / blocks, at = task % blocks * block;
        int64_t n = pixels - at < block ? pixels - at : block, offset = image * call.c * pixels + at;
        T* out = static_cast<T*>(call.out) + offset;
        int64_t step, grad_step = 0;
        const A* x = channels(static_cast<const T*>(call.x) + offset, n, Slot::raw, step);
        const A* grad = nullptr;
        if (backward) grad = channels(static_cast<const T*>(call.grad) + offset, n, Slot::grad, grad_step);
        A* zeros = buffer<A>(Slot::zeros, block);
        fill(zeros, A(0), n);
        A* result = buffer<A>(Slot::result, block);
        A* direct = backward ? buffer<A>(Slot::direct, call.c * block) : nullptr;
        A* shared = backward ? buffer<A>(Slot::shared, call.c * block) : nullptr;
        for (int64_t c = 0; c < call.c; ++c) {
            window_rows(x, step, c, lrn.before, zeros);
            const A* middle = x + c * step;
            if (backward)
                backward_term_rows(rows, middle, grad + c * grad_step, direct + c * block, shared + c * block, n, lrn);
            else
                finish(out + c * pixels, result, n, [&](A* to) { normalise_rows(rows, middle, to, n, lrn); });
        }
        for (int64_t c = 0; backward && c < call.c; ++c) {
            window_rows(shared, block, c, lrn.after, zeros);
            finish(out + c * pixels, result, n, [&](A* to) {
                backward_result(rows, x + c * step, direct + c * block, to, n, lrn);
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
