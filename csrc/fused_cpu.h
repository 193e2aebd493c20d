// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// Pooling, with LRN before or after it or without, ReLU and bias in front: what forward and backward share is how rows of
// x become planes. NCHW: a plane per phase of a row's columns; channels_last: one plane per row.

template <class T>
struct Rows {
    using A = sum_t<T>;

    const Call& call;
    const Window& w = call.window;
    const bool last = call.channels_last;
    const Lrn<A> lrn = lrn_of<A>(call);
    const int64_t group = call.c / call.groups, window = lrn.before + lrn.after + 1;
    const int64_t halo = !call.normalise ? 0 : lrn.before > lrn.after ? lrn.before : lrn.after;
    const int64_t reach = (w.kw - 1) * w.dw / w.sw;  // of the taps, in columns of a phase
    const Columns columns{w.sw, w.pw, call.w, call.ow + reach > ceil_div(call.w + w.pw, w.sw)
                                                  ? call.ow + reach
                                                  : ceil_div(call.w + w.pw, w.sw)};
    const int64_t phases = last ? 1 : w.sw;
    const int64_t pixel = call.groups * (group + halo);  // channels_last: from one pixel of a plane to the next
    const Plane row = last ? Plane{1, call.w * call.groups, group, halo, 0}
                           : Plane{columns.pitch, call.groups, group, halo, reach};
    const Plane pooled = last ? Plane{1, call.ow * call.groups, group, halo, 0} : row;
    const A** const rows = buffer<const A*>(Slot::rows, window);
    const A* const bias = call.bias ? bias_row() : nullptr;
    bool outside = w.pw > 0 || (call.ow - 1) * w.sw + (w.kw - 1) * w.dw >= call.w;  // a tap may miss the row

    const A* bias_row() const {
        A* row = buffer<A>(Slot::bias, call.c);
        load_row(static_cast<const T*>(call.bias), 1, row, call.c);
        return row;
    }

    // Row h of an image, as planes: a = x (+ bias) (then ReLU), each step rounded to x's type.
    void stage(const T* image, int64_t h, A* planes) const {
        for (int64_t phase = 0; phase < phases; ++phase) {
            A* plane = planes + phase * row.size();
            row.clear_halo(plane);
            if (last)
                stage_pixels(image + h * call.w * call.c, plane);
            else
                stage_phase(image + h * call.w, phase, plane);
            if (call.relu) {
                A* v = plane + row.lead();
                for (int64_t i = 0, n = row.body(); i < n; ++i) v[i] = v[i] <= 0 ? A(0) : v[i];
            }
        }
    }

    void stage_pixels(const T* from, A* plane) const {
        for (int64_t i = 0; i < call.w; ++i)
            for (int64_t g = 0; g < call.groups; ++g) {
                A* to = plane + row.lead() + i * pixel + g * (group + halo);
                load_row(from + i * call.c + g * group, 1, to, group);
                if (!bias) continue;
                for (int64_t c = 0; c < group; ++c) to[c] = rounded<T>(to[c] + bias[g * group + c]);
            }
    }

    void stage_phase(const T* from, int64_t phase, A* plane) const {
        int64_t begin, end;
        columns.valid(phase, begin, end);
        for (int64_t c = 0; c < call.c; ++c) {
            A* to = plane + row.channel(c);
            fill(to, A(0), begin);
            fill(to + end, A(0), columns.pitch - end);
            if (begin < end)
                load_row(from + c * call.h * call.w + columns.column(phase, begin), w.sw, to + begin, end - begin);
            if (!bias) continue;
            for (int64_t j = begin; j < end; ++j) to[j] = rounded<T>(to[j] + bias[c]);
        }
    }

    // Columns that are not in the picture lose against every value.
    void hide_outside(A* planes) const {
        if (last || !outside) return;
        for (int64_t phase = 0; phase < phases; ++phase) {
            int64_t begin, end;
            columns.valid(phase, begin, end);
            for (int64_t c = 0; c < call.c; ++c) {
                A* v = planes + phase * row.size() + row.channel(c);
                fill(v, -std::numeric_limits<A>::infinity(), begin);
                fill(v + end, -std::numeric_limits<A>::infinity(), columns.pitch - end);
            }
        }
    }

    // A row of the result, or of a tensor of its shape: [c, ow] of NCHW, [ow, c] of channels_last.
    int64_t pooled_at(int64_t image, int64_t o) const {
        return last ? (image * call.oh + o) * call.ow * call.c : (image * call.c * call.oh + o) * call.ow;
    }

    template <class F>
    void each_pooled_run(const F& run) const {  // (place in the plane, place in the tensor's row, length)
        if (last)
            for (int64_t i = 0; i < call.ow; ++i)
                for (int64_t g = 0; g < call.groups; ++g)
                    run(row.lead() + i * pixel + g * (group + halo), i * call.c + g * group, group);
        else
            for (int64_t c = 0; c < call.c; ++c) run(pooled.channel(c), c * call.oh * call.ow, call.ow);
    }
};

// A task is a row of the result. The rows of x that its windows meet are kept, normalised, in a ring: within one run of
// tasks each is read and normalised once.
template <class T>
struct PoolForward : Rows<T> {
    using A = sum_t<T>;
    using Index = index_t<A>;
    using Rows<T>::call, Rows<T>::w, Rows<T>::last, Rows<T>::row, Rows<T>::pooled, Rows<T>::phases, Rows<T>::columns;

    const int64_t span = (w.kh - 1) * w.dh + 1, ahead = 4, slots = span + ahead - 1, slot_size = phases * row.size();
    // channels_last, nothing to compute or convert before the comparison: the taps are read where they lie
    const bool direct = last && std::is_same<T, A>::value && row.halo == 0 && !call.relu && !call.bias &&
                        (!call.normalise || call.pool_first);
    A* const ring = buffer<A>(Slot::ring, direct ? 0 : slots * slot_size);
    A* const raw = buffer<A>(Slot::raw, call.normalise && !call.pool_first ? ahead * slot_size : 0);
    A* const best = buffer<A>(Slot::best, pooled.size());
    A* const result = buffer<A>(Slot::result, call.pool_first && call.normalise ? pooled.size() : 0);
    Index* const place = call.place_out ? buffer<Index>(Slot::place, pooled.size()) : nullptr;
    const A** const taps = buffer<const A*>(Slot::taps, w.kh * w.kw);
    int* const ids = buffer<int>(Slot::ids, w.kh * w.kw);

    explicit PoolForward(const Call& c) : Rows<T>{c} {}

    A* slot(int64_t h) const { return ring + h % slots * slot_size; }
    const A* pixels(const T* image, int64_t h) const {
        if constexpr (std::is_same<T, A>::value)
            if (direct) return image + h * call.w * call.c;
        return slot(h) + row.lead();
    }

    void produce(const T* image, int64_t from, int64_t to) const {
        bool first = call.normalise && !call.pool_first;  // all rows at once: NCHW rows are neighbours in each channel
        for (int64_t h = from; h < to; ++h) this->stage(image, h, first ? raw + (h - from) * slot_size : slot(h));
        for (int64_t h = from; h < to; ++h) {
            A* planes = slot(h);
            for (int64_t phase = 0; first && phase < phases; ++phase) {
                A* plane = planes + phase * row.size();
                normalise_plane(row, raw + (h - from) * slot_size + phase * row.size(), plane, this->rows, this->lrn);
                round_row<T>(plane + row.lead(), row.body());
            }
            this->hide_outside(planes);
        }
    }

    static int64_t first_inside(int64_t at, int64_t dilation, int64_t taps) {  // number of the first tap not before 0
        int64_t tap = ceil_div(-at, dilation);
        return tap < taps ? tap : taps - 1;
    }

    void start(A* best, Index* place, int64_t n, int64_t id) const {
        fill(best, -std::numeric_limits<A>::infinity(), n);
        if (place) fill(place, Index(id), n);
    }

    void reduce(const T* image, int64_t o) const {
        int64_t top = o * w.sh - w.ph, first = first_inside(top, w.dh, w.kh) * w.kw;
        if (last) {
            for (int64_t i = 0; i < call.ow; ++i) reduce_pixel(image, i, top, first);
            return;
        }
        A* to = best + pooled.lead();
        Index* where = place ? place + pooled.lead() : nullptr;
        start(to, where, pooled.body(), first);
        for (int64_t c = 0; where && w.pw > 0 && c < call.c; ++c)
            for (int64_t i = 0; i < call.ow; ++i)
                place[pooled.channel(c) + i] = Index(first + first_inside(i * w.sw - w.pw, w.dw, w.kw));
        int64_t count = 0;
        for (int64_t i = 0; i < w.kh; ++i) {
            int64_t h = top + i * w.dh;
            if (h < 0 || h >= call.h) continue;
            for (int64_t j = 0; j < w.kw; ++j, ++count) {
                taps[count] = slot(h) + j * w.dw % w.sw * row.size() + row.lead() + j * w.dw / w.sw;
                ids[count] = int(i * w.kw + j);
            }
        }
        pool_rows(taps, ids, count, to, where, pooled.body());
    }

    void reduce_pixel(const T* image, int64_t i, int64_t top, int64_t first) const {
        int64_t left = i * w.sw - w.pw, at = pooled.lead() + i * this->pixel, n = this->pixel - row.halo, count = 0;
        A* to = best + at;
        Index* where = place ? place + at : nullptr;
        start(to, where, n, first + first_inside(left, w.dw, w.kw));
        for (int64_t a = 0; a < w.kh; ++a) {
            int64_t h = top + a * w.dh;
            if (h < 0 || h >= call.h) continue;
            const A* from = pixels(image, h);
            for (int64_t b = 0; b < w.kw; ++b) {
                int64_t column = left + b * w.dw;
                if (column < 0 || column >= call.w) continue;
                taps[count] = from + column * this->pixel;
                ids[count++] = int(a * w.kw + b);
            }
        }
        pool_rows(taps, ids, count, to, where, n);
    }

    void finish(int64_t image, int64_t o) const {
        const A* from = best;
        if (call.pool_first && call.normalise) {
            pooled.clear_halo(best);
            normalise_plane(pooled, best, result, this->rows, this->lrn);
            from = result;
        }
        int64_t at = this->pooled_at(image, o);
        T* out = static_cast<T*>(call.out) + at;
        this->each_pooled_run([&](int64_t i, int64_t j, int64_t n) { store_row(from + i, out + j, 1, n); });
        if (!place) return;
        this->each_pooled_run([&](int64_t i, int64_t j, int64_t n) {
            for (int64_t k = 0; k < n; ++k) call.place_out[at + j + k] = uint8_t(place[i + k]);
        });
    }

    void run(int64_t begin, int64_t end) const {
        while (begin < end) {
            int64_t image = begin / call.oh, o = begin % call.oh, stop = o + end - begin;
            stop = stop < call.oh ? stop : call.oh;
            begin += stop - o;
            const T* x = static_cast<const T*>(call.x) + image * call.c * call.h * call.w;
            int64_t needed = (stop - 1) * w.sh - w.ph + span;
            needed = needed < call.h ? needed : call.h;
            for (int64_t done = 0; o < stop; ++o) {
                int64_t top = o * w.sh - w.ph, bottom = top + span;
                bottom = bottom < call.h ? bottom : call.h;
                if (done < top) done = top;
                while (!direct && done < bottom) {
                    int64_t to = done + ahead < needed ? done + ahead : needed;
                    produce(x, done, to);
                    done = to;
                }
                reduce(x, o);
                finish(image, o);
            }
        }
    }
};
