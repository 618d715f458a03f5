// Phases of products: rows of one to three matrices times one input.
//
// A warp computes a row, or two at a time: those of gate and up, or neighbours where there are many. Chunks of its rows come through a
// ring of stages in shared memory that belongs to the warp: a lane asks for them, as far ahead as the ring is long and across the ends of
// rows, and what has landed is multiplied, a piece a lane.
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

// A chunk of a row: blocks whose parts of all planes fill a stage.
template <class T> struct Chunk {
    static constexpr int ELEMENTS = T::BLOCK > 8 ? 2048 : 8 * 2048 / T::PLANES[0];
    static constexpr int BLOCKS = ELEMENTS / T::BLOCK, PIECES = ELEMENTS / T::PIECE;
    static constexpr int BYTES = pad16(T::PLANES[0] * BLOCKS) + pad16(T::PLANES[1] * BLOCKS) + pad16(T::PLANES[2] * BLOCKS) + pad16(T::PLANES[3] * BLOCKS);

    // Asks for chunk c of a row of nb blocks.
    static __device__ __forceinline__ void ask(unsigned char* to, const uint8_t* row, int nb, int c, uint64_t* landing) {
        const int n = min(BLOCKS, nb - c * BLOCKS);
        constexpr int P[4] = {T::PLANES[0], T::PLANES[1], T::PLANES[2], T::PLANES[3]};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (P[i] == 0) break;
            copy(to, row + P[i] * BLOCKS * c, pad16(P[i] * n), landing);
            to += pad16(P[i] * BLOCKS), row += pad16(P[i] * nb);
        }
    }
    static __device__ __forceinline__ uint32_t bytes(int nb, int c) {
        const int n = min(BLOCKS, nb - c * BLOCKS);
        return pad16(T::PLANES[0] * n) + pad16(T::PLANES[1] * n) + pad16(T::PLANES[2] * n) + pad16(T::PLANES[3] * n);
    }
};

// Whether a call finds the ring empty, only fills it (the barrier of the phase is further away), or finds it filled.
enum Fill { EMPTY, FILL, FILLED };

// `ready`: whether the input is in shared memory; if not, the first weights are asked for and then the input is read.
// `last`: whether the warp is done with the phase.
template <class T, int R> __device__ __noinline__ void rows(const Place at, const Rows m, const Fill fill, const bool ready, const bool last) {
    using C = Chunk<T>;
    constexpr int STAGE = (R * C::BYTES + 127) / 128 * 128, STAGES = RING / STAGE < MAX_STAGES ? RING / STAGE : MAX_STAGES;
    static_assert(STAGES >= 2, "one stage lands while another is read");
    DYNAMIC_SHARED(StepShared, shared);
    const Here h = here(at);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, nb = h.p.n_in / T::BLOCK, n_piece = h.p.n_in / T::PIECE;
    const bool gated = h.p.mode == GATED;
    const int chunks = (nb + C::BLOCKS - 1) / C::BLOCKS, groups = gated ? m.n_row : (m.n_row + R - 1) / R;
    unsigned char* ring = shared->ring[warp];
    uint64_t* landing = shared->landing[warp];
    const Input in(h);

    int ag = 0, ac = 0, as = 0;  // group, chunk and stage to ask for next
    bool asked = fill == FILLED;
    auto ask = [&]() {
        if (ag == groups) return;
        if (lane == 0 && !asked) {
            // An odd last row is asked for once and not multiplied.
            const bool both = R == 2 && (gated || 2 * ag + 1 < m.n_row);
            expect(landing + as, C::bytes(nb, ac) * (both ? 2 : 1));
            C::ask(ring + as * STAGE, m.w0 + ag * m.step, nb, ac, landing + as);
            if (both) C::ask(ring + as * STAGE + C::BYTES, m.w1 + ag * m.step, nb, ac, landing + as);
        }
        if (++as == STAGES) as = 0;
        if (++ac == chunks) ac = 0, ag++;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) ask();
    asked = false;
    if (fill == FILL) return;
    if (!ready) read_input(h, in);
    const Spread x = in.view();
    const float scale = input_scale(h, in);
    uint32_t parity = shared->parity[warp];

    int stage = 0;
    float before = 0.0f;
#pragma unroll 1
    for (int g = 0; g < groups; g++) {
        if (!gated && g % (WARP / 2) == 0) {
            // What the results of the next rows are added to, a lane for each.
            const int row = g * R + lane;
            before = 0.0f;
            if (row < m.n_row) {
                if (m.bias) before = m.bias[row];
                if (h.p.mode == ADD_TO) before += fresh(m.out + row);
            }
        }
        float acc[R] = {};
#pragma unroll 1
        for (int c = 0; c < chunks; c++) {
            landed(landing + stage, (parity >> stage) & 1);
            parity ^= 1u << stage;
            const unsigned char* w = ring + stage * STAGE;
#pragma unroll 1
            for (int r = 0; r < C::PIECES / WARP; r++) {
                const int p = r * WARP + lane, px = c * C::PIECES + p;
                if (px >= n_piece) break;
#pragma unroll
                for (int k = 0; k < R; k++) acc[k] += T::dot(T::template load<Shared>(w + k * C::BYTES, C::BLOCKS, p), px, x);
            }
            __syncwarp();
            ask();
            if (++stage == STAGES) stage = 0;
        }
        float y[R];
#pragma unroll
        for (int k = 0; k < R; k++) y[k] = scale * warp_sum(acc[k]);
        if (gated) {
            if (lane == 0) m.out[g] = silu(y[0] + (m.bias ? m.bias[g] : 0.0f)) * (y[R - 1] + (m.bias2 ? m.bias2[g] : 0.0f));
        } else {
            const int k = lane - g * R % (WARP / 2 * R);
            if (k >= 0 && k < R && g * R + k < m.n_row) m.out[g * R + k] = before + (k == 0 ? y[0] : y[R - 1]);
        }
    }
    __syncwarp();
    if (lane == 0) shared->parity[warp] = parity;
    __syncwarp();
    if (last) finish(h);
}

template <int R> __device__ __forceinline__ void rows_of(uint32_t type, const Place& at, const Rows& m, Fill fill, bool ready, bool last) {
    switch (type) {
        case F32: rows<TF32, R>(at, m, fill, ready, last); break;
        case F16: rows<TF16, R>(at, m, fill, ready, last); break;
        case BF16: rows<TBF16, R>(at, m, fill, ready, last); break;
        case Q4_0: rows<TQ4_0, R>(at, m, fill, ready, last); break;
        case Q4_1: rows<TQ4_1, R>(at, m, fill, ready, last); break;
        case Q5_0: rows<TQ5_0, R>(at, m, fill, ready, last); break;
        case Q5_1: rows<TQ5_1, R>(at, m, fill, ready, last); break;
        case Q8_0: rows<TQ8_0, R>(at, m, fill, ready, last); break;
        case IQ4_NL: rows<TIQ4_NL, R>(at, m, fill, ready, last); break;
        case MXFP4: rows<TMXFP4, R>(at, m, fill, ready, last); break;
        case IQ4_XS: rows<TIQ4_XS, R>(at, m, fill, ready, last); break;
        case Q2_K: rows<TQ2_K, R>(at, m, fill, ready, last); break;
        case Q3_K: rows<TQ3_K, R>(at, m, fill, ready, last); break;
        case Q4_K: rows<TQ4_K, R>(at, m, fill, ready, last); break;
        case Q5_K: rows<TQ5_K, R>(at, m, fill, ready, last); break;
        case Q6_K: rows<TQ6_K, R>(at, m, fill, ready, last); break;
    }
}

__device__ __forceinline__ void products(const Place& at, const Fill fill) {
    const Here h = here(at);
    const Phase& p = h.p;
    const int all = phase_rows(p), b0 = share(all, blockIdx.x, gridDim.x), b1 = share(all, blockIdx.x + 1, gridDim.x);
    const int warp = threadIdx.x / WARP, n_warp = blockDim.x / WARP;
    const int lo = b0 + share(b1 - b0, warp, n_warp), hi = b0 + share(b1 - b0, warp + 1, n_warp);
    if (lo == hi) {
        if (fill == FILL) return;
        read_input(h, Input(h));
        finish(h);
        return;
    }
    if (p.mode == GATED) {
        const Matrix &g = p.m[0], &u = p.m[1];
        const Rows m = {g.w + lo * g.row_bytes, u.w + lo * u.row_bytes, g.row_bytes, hi - lo, g.out + lo,
                        g.bias ? g.bias + lo : nullptr, u.bias ? u.bias + lo : nullptr};
        rows_of<2>(g.type, at, m, fill, false, true);
        return;
    }
    bool ready = false;
    int base = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < p.n_mat; i++) {
        const Matrix& w = p.m[i];
        const int r0 = max(lo - base, 0), r1 = min(hi - base, int(w.n_out));
        base += w.n_out;
        if (r0 >= r1) continue;
        const bool many = r1 - r0 >= 8;
        const Rows m = {w.w + r0 * w.row_bytes, w.w + (r0 + 1) * w.row_bytes, many ? 2 * w.row_bytes : w.row_bytes, r1 - r0,
                        w.out + r0, w.bias ? w.bias + r0 : nullptr, nullptr};
        if (many) {
            rows_of<2>(w.type, at, m, ready ? EMPTY : fill, ready, hi <= base);
        } else {
            rows_of<1>(w.type, at, m, ready ? EMPTY : fill, ready, hi <= base);
        }
        // Behind the end of the phase its description may be overwritten.
        if (hi <= base || fill == FILL) return;
        ready = true;
    }
}
