// Phases of products: rows of one to three matrices times one input.
//
// A warp computes a row, or two at a time: those of gate and up, or neighbours where there are many. Its lanes take a piece each of
// 32 pieces; what is loaded is always several such rounds ahead of what is multiplied, across the ends of rows.
#pragma once
#include "step.cuh"

// Rows of one matrix that a warp computes, in groups of R.
struct Rows {
    const uint8_t* w0;    // first rows of a group
    const uint8_t* w1;
    uint64_t step;        // bytes from a group to the next
    int n_row;            // rows in all; with gates, pairs
    float* out;           // of the first row
    const float* bias;    // of the first row, or null
    const float* bias2;   // with gates: of the first row of up
};

// Words of a fragment, from which follows how many rounds are under way.
template <class T> struct Words { static constexpr int N = (sizeof(typename T::Frag) + 3) / 4; };
template <> struct Words<TQ4_K> { static constexpr int N = 12; };
constexpr int FLIGHT = 48;  // words of weights that a lane holds
__device__ constexpr int rounds_ahead(int words, int r) { return FLIGHT / (words * r) < 2 ? 2 : FLIGHT / (words * r) > 8 ? 8 : FLIGHT / (words * r); }

// `ready`: whether the input is in shared memory; if not, the first weights are asked for and then the input is read.
// `last`: whether the warp is done with the phase.
template <class T, int R, bool PLAIN> __device__ __noinline__ void rows(const Place at, const Rows m, const bool ready, const bool last) {
    const Here h = here(at);
    using Frag = typename T::Frag;
    constexpr int D = rounds_ahead(Words<T>::N, R);
    const int lane = threadIdx.x % WARP, n_in = h.p.n_in, n_piece = n_in / T::PIECE, nb = PLAIN ? n_in : n_in / (PLAIN ? 1 : T::PIECE == 32 ? 32 : 256);
    const int rounds = (n_piece + WARP - 1) / WARP, groups = h.p.mode == GATED ? m.n_row : (m.n_row + R - 1) / R, items = groups * rounds;
    const Input in(h);

    Frag f[D][R];
    int lg = 0, lr = 0;  // group and round to load next
    auto load = [&](Frag(&to)[R]) {
        const int p = min(lr * WARP + lane, n_piece - 1);  // lanes without a piece read the last once more
        const uint8_t* w0 = m.w0 + lg * m.step;
        to[0] = T::load(w0, nb, p);
        // An odd last row is computed twice.
        if (R == 2) to[R - 1] = T::load(h.p.mode != GATED && 2 * lg + 1 >= m.n_row ? w0 : m.w1 + lg * m.step, nb, p);
        if (++lr == rounds) lr = 0, lg++;
    };
#pragma unroll
    for (int d = 0; d < D; d++) {
        if (d < items) load(f[d]);
    }
    if (!ready) {
        read_input(h, in);
        prefetch_phase(h.a, h.next);
    }
    const Spread x = in.view();
    const float scale = input_scale(h, in);

    float acc[R] = {}, before = 0.0f;
    int cg = 0, cr = 0;  // group and round to multiply next
    for (int k = 0; k < items; k += D) {
#pragma unroll
        for (int d = 0; d < D; d++) {
            if (k + d >= items) break;
            if (cr == 0 && cg % (WARP / 2) == 0) {
                // What the results of the next rows are added to, a lane for each.
                const int row = (h.p.mode == GATED ? cg : cg * R) + lane;
                before = 0.0f;
                if (row < m.n_row && h.p.mode != GATED) {
                    if (m.bias) before = m.bias[row];
                    if (h.p.mode == ADD_TO) before += fresh(m.out + row);
                }
            }
            const int p = cr * WARP + lane, pc = min(p, n_piece - 1);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float v = T::dot(f[d][r], pc, x);
                acc[r] += p < n_piece ? v : 0.0f;
            }
            if (k + d + D < items) load(f[d]);
            if (++cr < rounds) continue;
            float y[R];
#pragma unroll
            for (int r = 0; r < R; r++) y[r] = scale * warp_sum(acc[r]), acc[r] = 0.0f;
            if (h.p.mode == GATED) {
                if (R == 2 && lane == 0) {
                    const float g = y[0] + (m.bias ? m.bias[cg] : 0.0f), u = y[R - 1] + (m.bias2 ? m.bias2[cg] : 0.0f);
                    m.out[cg] = silu(g) * u;
                }
            } else {
                const int first = cg * R % (WARP / 2 * R);
                float v = 0.0f;
#pragma unroll
                for (int r = 0; r < R; r++) {
                    if (lane == first + r) v = y[r];
                }
                if (lane >= first && lane < first + R && cg * R + lane - first < m.n_row) m.out[cg * R + lane - first] = v + before;
            }
            cr = 0, cg++;
        }
    }
    if (last) finish(h);
}

template <int R> __device__ __forceinline__ void rows_of(uint32_t type, const Place& at, const Rows& m, bool ready, bool last) {
    switch (type) {
        case F32: rows<TF32, R, true>(at, m, ready, last); break;
        case F16: rows<TF16, R, true>(at, m, ready, last); break;
        case BF16: rows<TBF16, R, true>(at, m, ready, last); break;
        case Q4_0: rows<TQ4_0, R, false>(at, m, ready, last); break;
        case Q4_1: rows<TQ4_1, R, false>(at, m, ready, last); break;
        case Q5_0: rows<TQ5_0, R, false>(at, m, ready, last); break;
        case Q5_1: rows<TQ5_1, R, false>(at, m, ready, last); break;
        case Q8_0: rows<TQ8_0, R, false>(at, m, ready, last); break;
        case IQ4_NL: rows<TIQ4_NL, R, false>(at, m, ready, last); break;
        case MXFP4: rows<TMXFP4, R, false>(at, m, ready, last); break;
        case IQ4_XS: rows<TIQ4_XS, R, false>(at, m, ready, last); break;
        case Q2_K: rows<TQ2_K, R, false>(at, m, ready, last); break;
        case Q3_K: rows<TQ3_K, R, false>(at, m, ready, last); break;
        case Q4_K: rows<TQ4_K, R, false>(at, m, ready, last); break;
        case Q5_K: rows<TQ5_K, R, false>(at, m, ready, last); break;
        case Q6_K: rows<TQ6_K, R, false>(at, m, ready, last); break;
    }
}

__device__ __forceinline__ void products(const Place& at) {
    const Here h = here(at);
    const Phase& p = h.p;
    const int all = phase_rows(p), b0 = share(all, blockIdx.x, gridDim.x), b1 = share(all, blockIdx.x + 1, gridDim.x);
    const int warp = threadIdx.x / WARP, n_warp = blockDim.x / WARP;
    const int lo = b0 + share(b1 - b0, warp, n_warp), hi = b0 + share(b1 - b0, warp + 1, n_warp);
    bool ready = false;
    if (p.mode == GATED) {
        if (lo < hi) {
            const Matrix &g = p.m[0], &u = p.m[1];
            const Rows m = {g.w + lo * g.row_bytes, u.w + lo * u.row_bytes, g.row_bytes, hi - lo, g.out + lo,
                            g.bias ? g.bias + lo : nullptr, u.bias ? u.bias + lo : nullptr};
            rows_of<2>(g.type, at, m, false, true);
            ready = true;
        }
    } else {
        int base = 0;
        for (uint32_t i = 0; i < p.n_mat; i++) {
            const Matrix& w = p.m[i];
            const int r0 = max(lo - base, 0), r1 = min(hi - base, int(w.n_out));
            base += w.n_out;
            if (r0 >= r1) continue;
            const bool many = r1 - r0 >= 8;
            const Rows m = {w.w + r0 * w.row_bytes, w.w + (r0 + 1) * w.row_bytes, many ? 2 * w.row_bytes : w.row_bytes, r1 - r0,
                            w.out + r0, w.bias ? w.bias + r0 : nullptr, nullptr};
            if (many) {
                rows_of<2>(w.type, at, m, ready, hi <= base);
            } else {
                rows_of<1>(w.type, at, m, ready, hi <= base);
            }
            ready = true;
        }
    }
    if (!ready) {
        read_input(h, Input(h));
        prefetch_phase(h.a, h.next);
        finish(h);
    }
}
