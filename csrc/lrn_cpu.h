// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// Response normalisation of rows of elements. `rows` are the channels of the window, from the first to the last, each as
// long as the row in the middle; which tensor or buffer they lie in is the caller's business.
//
//   forward   s = k + scale · Σ_j x_j²,  y = x / s^beta
//   backward  d_j = g_j / s_j^beta,  t_j = d_j x_j / s_j,  dx_i = d_i - 2 beta scale x_i Σ_j t_j  (j: whose window holds i)

enum class Power { half, three_quarters, one, any };

inline Power power_of(double beta) {
    return beta == 0.75 ? Power::three_quarters : beta == 0.5 ? Power::half : beta == 1 ? Power::one : Power::any;
}

// v / s^beta. Over s^3/4 it is v · s^1/4 / s: fewer roundings than with s^3/4 made of roots, of which two are on its way as well.
template <Power P, class A>
inline A over_power(A v, A s, A beta) {
    if (P == Power::one) return v / s;
    if (P == Power::any) return v * std::pow(s, -beta);
    A root = std::sqrt(s);
    if (P == Power::three_quarters) root = std::sqrt(root);
    return v * (s > std::numeric_limits<A>::max() ? A(0) : root) / s;  // not inf / inf
}

template <class A>
struct Lrn {
    int64_t before, after;  // channels of the window on either side, no more than a group has
    A scale, beta, k;
    double coefficient;
    Power kind;
};

constexpr int64_t BLOCK = 512;  // elements whose sum of squares is held at once, where the window is not the usual one

template <bool Squares, class A>
inline A term(A v) {
    return Squares ? v * v : v;
}

// sum[i] = Σ_r rows[r][i]², or of the values themselves
template <bool Squares, class A>
void sum_rows(const A* const* rows, int64_t count, int64_t at, A* __restrict sum, int64_t n) {
    const A* first = rows[0] + at;
    for (int64_t i = 0; i < n; ++i) sum[i] = term<Squares>(first[i]);
    for (int64_t r = 1; r < count; ++r) {
        const A* row = rows[r] + at;
        for (int64_t i = 0; i < n; ++i) sum[i] += term<Squares>(row[i]);
    }
}

template <bool Squares, class A>
inline A sum_of_five(A a, A b, A c, A d, A e) {
    return (((term<Squares>(a) + term<Squares>(b)) + term<Squares>(c)) + term<Squares>(d)) + term<Squares>(e);
}

template <Power P, class A>
void normalise(const A* const* rows, const A* x, A* __restrict y, int64_t n, const Lrn<A>& p) {
    const A scale = p.scale, k = p.k, beta = p.beta;
    if (p.before == 2 && p.after == 2) {
        const A *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *e = rows[4];
        for (int64_t i = 0; i < n; ++i) {
            A s = k + scale * sum_of_five<true>(a[i], b[i], c[i], d[i], e[i]);
            y[i] = over_power<P>(c[i], s, beta);
        }
        return;
    }
    A sum[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        sum_rows<true>(rows, p.before + p.after + 1, at, sum, m);
        for (int64_t i = 0; i < m; ++i) y[at + i] = over_power<P>(x[at + i], k + scale * sum[i], beta);
    }
}

template <Power P, class A>
void backward_terms(
    const A* const* rows, const A* x, const A* g, A* __restrict direct, A* __restrict t, int64_t n, const Lrn<A>& p) {
    const A scale = p.scale, k = p.k, beta = p.beta;
    if (p.before == 2 && p.after == 2) {
        const A *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *e = rows[4];
        for (int64_t i = 0; i < n; ++i) {
            A s = k + scale * sum_of_five<true>(a[i], b[i], c[i], d[i], e[i]);
            A v = over_power<P>(g[i], s, beta);
            direct[i] = v;
            t[i] = v * c[i] / s;
        }
        return;
    }
    A sum[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        sum_rows<true>(rows, p.before + p.after + 1, at, sum, m);
        for (int64_t i = 0; i < m; ++i) {
            A s = k + scale * sum[i];
            A v = over_power<P>(g[at + i], s, beta);
            direct[at + i] = v;
            t[at + i] = v * x[at + i] / s;
        }
    }
}

// `rows` are now of t, over the mirrored window
template <class A>
void backward_result(const A* const* rows, const A* x, const A* direct, A* __restrict dx, int64_t n, const Lrn<A>& p) {
    const A f = A(p.coefficient);
    if (p.before == 2 && p.after == 2) {
        const A *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3], *e = rows[4];
        for (int64_t i = 0; i < n; ++i)
            dx[i] = direct[i] - f * x[i] * sum_of_five<false>(a[i], b[i], c[i], d[i], e[i]);
        return;
    }
    A sum[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t m = n - at < BLOCK ? n - at : BLOCK;
        sum_rows<false>(rows, p.before + p.after + 1, at, sum, m);
        for (int64_t i = 0; i < m; ++i) dx[at + i] = direct[at + i] - f * x[at + i] * sum[i];
    }
}

template <class A>
void normalise_rows(const A* const* rows, const A* x, A* y, int64_t n, const Lrn<A>& p) {
    switch (p.kind) {
        case Power::half: return normalise<Power::half>(rows, x, y, n, p);
        case Power::three_quarters: return normalise<Power::three_quarters>(rows, x, y, n, p);
        case Power::one: return normalise<Power::one>(rows, x, y, n, p);
        case Power::any: return normalise<Power::any>(rows, x, y, n, p);
    }
}

template <class A>
void backward_term_rows(
    const A* const* rows, const A* x, const A* g, A* direct, A* t, int64_t n, const Lrn<A>& p) {
    switch (p.kind) {
        case Power::half: return backward_terms<Power::half>(rows, x, g, direct, t, n, p);
        case Power::three_quarters: return backward_terms<Power::three_quarters>(rows, x, g, direct, t, n, p);
        case Power::one: return backward_terms<Power::one>(rows, x, g, direct, t, n, p);
        case Power::any: return backward_terms<Power::any>(rows, x, g, direct, t, n, p);
    }
}

template <class A>
Lrn<A> lrn_of(const Call& call) {
    int64_t most = call.c / call.groups - 1;
    int64_t before = call.size / 2, after = (call.size - 1) / 2;
    return {before < most ? before : most, after < most ? after : most, A(call.scale), A(call.beta), A(call.k),
            2 * call.beta * call.scale, power_of(call.beta)};
}

// A whole plane at once. `rows` has room for the window's rows.
template <class A>
void normalise_plane(const Plane& plane, const A* x, A* y, const A** rows, const Lrn<A>& p) {
    const A* middle = x + plane.lead();
    for (int64_t r = 0; r <= p.before + p.after; ++r) rows[r] = middle + (r - p.before) * plane.step;
    normalise_rows(rows, middle, y + plane.lead(), plane.body(), p);
}

// dx of the plane's x and gradient; `direct` and `t` are planes to work in
template <class A>
void backward_plane(
    const Plane& plane, const A* x, const A* g, A* direct, A* t, A* dx, const A** rows, const Lrn<A>& p) {
    const A* middle = x + plane.lead();
    int64_t n = plane.body(), lead = plane.lead();
    for (int64_t r = 0; r <= p.before + p.after; ++r) rows[r] = middle + (r - p.before) * plane.step;
    backward_term_rows(rows, middle, g + lead, direct + lead, t + lead, n, p);
    plane.clear_halo(t);  // 0 / 0 there, where k is 0
    for (int64_t r = 0; r <= p.before + p.after; ++r) rows[r] = t + lead + (r - p.after) * plane.step;
    backward_result(rows, middle, direct + lead, dx + lead, n, p);
}
