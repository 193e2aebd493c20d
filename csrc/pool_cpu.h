// Compiled once per instruction set (see lrn_pool_cpu.cpp), therefore without an include guard.
// Max-pooling of rows of elements: each tap of the window is a row, all as long as the result.
//
//   forward   scanning the taps in torch's order, v replaces the maximum where v > maximum or v is NaN: the first of equal
//             values wins, NaN wins over every number
//   backward  a gather: the gradient of an element is the sum over the windows whose place it is

template <bool Places, int Taps, class A>
void pool_fixed(
    const A* const* taps, const int* ids, A* __restrict best, index_t<A>* __restrict place, int64_t n) {
    const A* row[Taps];
    index_t<A> id[Taps];
    for (int t = 0; t < Taps; ++t) row[t] = taps[t], id[t] = ids[t];
    for (int64_t i = 0; i < n; ++i) {
        A most = best[i];
        index_t<A> where = Places ? place[i] : 0;
#if defined(__GNUC__)
#pragma GCC unroll 9
#endif
        for (int t = 0; t < Taps; ++t) {
            A v = row[t][i];
            bool wins = (v > most) | (v != v);
            most = wins ? v : most;
            if (Places) where = wins ? id[t] : where;
        }
        best[i] = most;
        if (Places) place[i] = where;
    }
}

template <bool Places, class A>
void pool_rows_of(const A* const* taps, const int* ids, int64_t count, A* best, index_t<A>* place, int64_t n) {
    for (; count >= 9; count -= 9, taps += 9, ids += 9) pool_fixed<Places, 9>(taps, ids, best, place, n);
    for (; count >= 3; count -= 3, taps += 3, ids += 3) pool_fixed<Places, 3>(taps, ids, best, place, n);
    for (; count >= 1; count -= 1, taps += 1, ids += 1) pool_fixed<Places, 1>(taps, ids, best, place, n);
}

// `best` and `place` start as -inf and the first tap inside the picture
template <class A>
void pool_rows(const A* const* taps, const int* ids, int64_t count, A* best, index_t<A>* place, int64_t n) {
    if (place)
        pool_rows_of<true>(taps, ids, count, best, place, n);
    else
        pool_rows_of<false>(taps, ids, count, best, place, n);
}

template <class A>
void gather_row(A* __restrict to, const A* __restrict grad, const index_t<A>* __restrict place, int id, int64_t n) {
    const index_t<A> wanted = id;
    for (int64_t i = 0; i < n; ++i) to[i] += place[i] == wanted ? grad[i] : A(0);
}

// The sum of a row in an order that no vector width changes: sixteen running sums, then their sum.
template <class A>
A sum_row(const A* v, int64_t n) {
    A lane[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) lane[j] += v[i + j];
    for (; i < n; ++i) lane[i % 16] += v[i];
    A total = 0;
    for (int j = 0; j < 16; ++j) total += lane[j];
    return total;
}
