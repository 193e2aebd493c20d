// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// The gradient of pooling, of LRN before or after it, of ReLU and of the bias, in one pass over x. A task is a strip of
// rows of one image, the same strips for any number of threads; nothing is added up across strips but the bias gradient.

template <class T>
struct PoolBackward : Rows<T> {
    using A = sum_t<T>;
    using Index = index_t<A>;
    using Rows<T>::call, Rows<T>::w, Rows<T>::last, Rows<T>::row, Rows<T>::pooled, Rows<T>::phases, Rows<T>::columns;

    const int64_t strip = strip_rows(call), strips = ceil_div(call.h, strip);
    const bool before = call.normalise && !call.pool_first, after = call.normalise && call.pool_first;
    const int64_t row_size = phases * row.size(), most = most_windows();
    A* const raw = buffer<A>(Slot::raw, before || call.relu ? strip * row_size : 0);
    A* const grads = buffer<A>(Slot::grad, most * pooled.size());
    Index* const places = buffer<Index>(Slot::taken, most * pooled.size());
    A* const sum = buffer<A>(Slot::best, row_size);
    A* const direct = buffer<A>(Slot::direct, call.normalise ? row.size() + pooled.size() : 0);
    A* const shared = buffer<A>(Slot::shared, call.normalise ? row.size() + pooled.size() : 0);
    A* const result = buffer<A>(Slot::result, call.normalise ? row.size() + pooled.size() : 0);
    A* const maxima = buffer<A>(Slot::ring, after ? pooled.size() : 0);

    explicit PoolBackward(const Call& c) : Rows<T>{c} {}

    // Rows of windows that may hold a row of h0 <= h < h1: first <= o < end.
    void windows(int64_t h0, int64_t h1, int64_t& first, int64_t& end) const {
        first = ceil_div(h0 + w.ph - (w.kh - 1) * w.dh, w.sh);
        end = (h1 - 1 + w.ph) / w.sh + 1;
        end = end < call.oh ? end : call.oh;
    }
    int64_t most_windows() const { return ((w.kh - 1) * w.dh + strip) / w.sh + 2; }

    // The gradient by the maxima of row o of windows, and their places.
    void stage_windows(int64_t image, int64_t o, A* grad, Index* place) const {
        int64_t at = this->pooled_at(image, o);
        const T* from = static_cast<const T*>(call.grad) + at;
        fill(place, Index(-1), pooled.size());
        fill(grad, A(0), pooled.size());
        this->each_pooled_run([&](int64_t i, int64_t j, int64_t n) {
            load_row(from + j, 1, grad + i, n);
            for (int64_t k = 0; k < n; ++k) place[i + k] = call.place[at + j + k];
        });
        if (!after) return;
        fill(maxima, A(0), pooled.size());
        this->each_pooled_run([&](int64_t i, int64_t j, int64_t n) { fetch_maxima(image, o, place, i, j, n); });
        backward_plane(pooled, maxima, grad, direct, shared, result, this->rows, this->lrn);
        this->each_pooled_run([&](int64_t i, int64_t, int64_t n) {
            for (int64_t k = 0; k < n; ++k) grad[i + k] = result[i + k];
        });
    }

    // The maxima themselves, from x and their places; a place that no forward can have given is held inside the picture.
    void fetch_maxima(int64_t image, int64_t o, const Index* place, int64_t i, int64_t j, int64_t n) const {
        const T* x = static_cast<const T*>(call.x) + image * call.c * call.h * call.w;
        for (int64_t k = 0; k < n; ++k) {
            int64_t c = last ? (j + k) % call.c : j / (call.oh * call.ow), column = last ? j / call.c : k;
            int64_t tap = place[i + k];
            int64_t y = clamped(o * w.sh - w.ph + tap / w.kw * w.dh, call.h);
            int64_t z = clamped(column * w.sw - w.pw + tap % w.kw * w.dw, call.w);
            A v = load(x[last ? (y * call.w + z) * call.c + c : (c * call.h + y) * call.w + z]);
            if (this->bias) v = rounded<T>(v + this->bias[c]);
            maxima[i + k] = call.relu && v <= 0 ? A(0) : v;
        }
    }
    static int64_t clamped(int64_t v, int64_t n) { return v < 0 ? 0 : v < n ? v : n - 1; }

    // sum = the gradient by row h of what was pooled; windows in ascending order, as torch adds them.
    void gather(int64_t h, int64_t first, int64_t end) const {
        fill(sum, A(0), row_size);
        for (int64_t o = first; o < end; ++o) {
            int64_t distance = h + w.ph - o * w.sh;
            if (distance < 0 || distance % w.dh || distance / w.dh >= w.kh) continue;
            int id = int(distance / w.dh * w.kw);
            const A* grad = grads + (o - first) * pooled.size() + pooled.lead();
            const Index* place = places + (o - first) * pooled.size() + pooled.lead();
            if (last) {
                gather_pixels(grad, place, id);
                continue;
            }
            for (int64_t j = w.kw - 1; j >= 0; --j) {
                A* to = sum + j * w.dw % w.sw * row.size() + row.lead() + j * w.dw / w.sw;
                gather_row(to, grad, place, id + int(j), pooled.body());
            }
        }
    }

    void gather_pixels(const A* grad, const Index* place, int id) const {
        for (int64_t i = 0; i < call.ow; ++i)
            for (int64_t j = w.kw - 1; j >= 0; --j) {
                int64_t column = i * w.sw - w.pw + j * w.dw, at = i * this->pixel;
                if (column < 0 || column >= call.w) continue;
                A* to = sum + row.lead() + column * this->pixel;
                gather_row(to, grad + at, place + at, id + int(j), this->pixel - row.halo);
            }
    }

    // dx of one plane: LRN's gradient where it stood before the pooling, ReLU's mask.
    const A* finish_plane(const A* a, A* grad) const {
        A* dx = grad;
        if (before) {
            backward_plane(row, a, grad, direct, shared, result, this->rows, this->lrn);
            dx = result;
        }
        if (call.relu) {
            A* to = dx + row.lead();
            const A* from = a + row.lead();
            for (int64_t i = 0, n = row.body(); i < n; ++i) to[i] = from[i] <= 0 ? A(0) : to[i];
        }
        return dx;
    }

    void write_pixels(const A* dx, T* out, double* partial) const {
        for (int64_t i = 0; i < call.w; ++i)
            for (int64_t g = 0; g < call.groups; ++g) {
                const A* from = dx + row.lead() + i * this->pixel + g * (this->group + row.halo);
                store_row(from, out + i * call.c + g * this->group, 1, this->group);
                for (int64_t c = 0; partial && c < this->group; ++c) partial[g * this->group + c] += from[c];
            }
    }

    void write_phase(const A* dx, int64_t phase, T* out, double* partial) const {
        int64_t begin, end;
        columns.valid(phase, begin, end);
        for (int64_t c = 0; begin < end && c < call.c; ++c) {
            const A* from = dx + row.channel(c) + begin;
            store_row(from, out + c * call.h * call.w + columns.column(phase, begin), w.sw, end - begin);
            if (partial) partial[c] += sum_row(from, end - begin);
        }
    }

    void run(int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            int64_t image = task / strips, h0 = task % strips * strip, h1 = h0 + strip, first, stop;
            h1 = h1 < call.h ? h1 : call.h;
            int64_t at = image * call.c * call.h * call.w;
            double* partial = call.bias_partial ? call.bias_partial + task * call.c : nullptr;
            if (partial) fill(partial, 0.0, call.c);
            windows(h0, h1, first, stop);
            for (int64_t o = first; o < stop; ++o)
                stage_windows(image, o, grads + (o - first) * pooled.size(), places + (o - first) * pooled.size());
            for (int64_t h = h0; (before || call.relu) && h < h1; ++h)
                this->stage(static_cast<const T*>(call.x) + at, h, raw + (h - h0) * row_size);
            for (int64_t h = h0; h < h1; ++h) {
                gather(h, first, stop);
                for (int64_t phase = 0; phase < phases; ++phase) {
                    int64_t plane = phase * row.size();
                    const A* dx = finish_plane(raw + (h - h0) * row_size + plane, sum + plane);
                    T* out = static_cast<T*>(call.out) + at + h * call.w * (last ? call.c : 1);
                    last ? write_pixels(dx, out, partial) : write_phase(dx, phase, out, partial);
                }
            }
        }
    }
};
