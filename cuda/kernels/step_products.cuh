// Phases of products: rows of one to three matrices times one input.
//
// A warp computes a row, or two at a time: those of gate and up, or neighbours where there are enough for all warps. Chunks of its rows
// come through a ring of stages in shared memory that belongs to the warp: a lane asks for them, as far ahead as the ring is long and
// across the ends of rows, and what has landed is multiplied, a piece a lane.
//
// All of this is inlined into the kernel. Beside the rings hardly any L1 cache is left, so that every register that is spilled, around a
// call or for want of room, is a trip to the L2 cache.
#pragma once
#include "step.cuh"

// Rows of one matrix that a warp computes, in groups of one or two.
struct Rows {
    const uint8_t* w0;    // the rows of the first group
    const uint8_t* w1;
    uint64_t step;        // bytes from a group to the next
    int n_group;
    int n_row;            // rows in all; with gates, pairs
    bool alone;           // the last group has but one
    float* out;           // of the first row
    const float* bias;    // of the first row, or null
    const float* bias2;   // with gates: of the first row of up
    const float* add;     // of the first row, or null
};

// What a lane adds to the results of a row.
struct Before {
    int mine;            // the row of 32 that is this lane's
    float bias, bias2, old;

    __device__ __forceinline__ void read(const Rows& m, int row) {
        bias = bias2 = old = 0.0f;
        if (row >= m.n_row) return;
        if (m.bias) bias = m.bias[row];
        if (m.bias2) bias2 = m.bias2[row];
        if (m.add) old = look(m.add + row);
    }
};

// A chunk of a row: blocks whose parts of all planes fill a stage.
template <class T> struct Chunk {
    static constexpr int BITS = 8 * (T::PLANES[0] + T::PLANES[1] + T::PLANES[2] + T::PLANES[3]) / T::BLOCK;
    static constexpr int ELEMENTS = T::BLOCK > 8 ? (BITS <= 4 ? 4096 : 2048) : 8 * 2048 / T::PLANES[0];
    static constexpr int BLOCKS = ELEMENTS / T::BLOCK, PIECES = ELEMENTS / T::PIECE;
    static constexpr int PARTS = pad16(T::PLANES[0] * BLOCKS) + pad16(T::PLANES[1] * BLOCKS) + pad16(T::PLANES[2] * BLOCKS) + pad16(T::PLANES[3] * BLOCKS);
    static constexpr int BYTES = (PARTS + 127) / 128 * 128;

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

// Whether the ring is empty, is only filled (the input of the phase is further away), or has been filled.
enum Fill { EMPTY, FILL, FILLED };

// What a warp asks for next: group, its rows, chunk, and stage of its ring.
struct Next {
    const uint8_t* w0;
    const uint8_t* w1;
    int group, chunk, stage;
};

// Rows of format T, R at a time, through the ring of a warp.
template <class T, int R> struct Stream {
    using C = Chunk<T>;
    static constexpr int STAGE = R * C::BYTES, STAGES = RING / STAGE < MAX_STAGES ? RING / STAGE : MAX_STAGES;
    static_assert(STAGES >= 2, "one stage lands while another is read");

    static __device__ __forceinline__ int chunks(int n_in) { return (n_in + C::ELEMENTS - 1) / C::ELEMENTS; }

    // `again`: it has been asked for.
    static __device__ __forceinline__ void ask(const Rows& m, int n_in, Next& next, bool again) {
        if (next.group == m.n_group) return;
        if (!again && elected()) {
            DYNAMIC_SHARED(StepShared, shared);
            const int warp = threadIdx.x / WARP, nb = n_in / T::BLOCK;
            unsigned char* to = shared->ring[warp] + next.stage * STAGE;
            uint64_t* landing = shared->landing[warp] + next.stage;
            // An odd last row is asked for once and not multiplied.
            const bool both = R == 2 && !(m.alone && next.group + 1 == m.n_group);
            expect(landing, C::bytes(nb, next.chunk) * (both ? 2 : 1));
            C::ask(to, next.w0, nb, next.chunk, landing);
            if (both) C::ask(to + C::BYTES, next.w1, nb, next.chunk, landing);
        }
        if (++next.stage == STAGES) next.stage = 0;
        if (++next.chunk == chunks(n_in)) next.chunk = 0, next.group++, next.w0 += m.step, next.w1 += m.step;
    }

    static __device__ __forceinline__ void fill(const Rows& m, int any_n_in, Next& next, bool again) {
        const int n_in = opaque(any_n_in);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) ask(m, n_in, next, again);
    }

    // The products, with the input in shared memory. A lane has what the results of a row are added to, `before` and what stands in
    // the output; they are read for 32 rows (pairs, with gates) at a time.
    static __device__ __forceinline__ void multiply(const Here& h, const Rows& m, Next& next, Before& before) {
        DYNAMIC_SHARED(StepShared, shared);
        const int warp = threadIdx.x / WARP, lane = opaque(threadIdx.x % WARP), n_in = opaque(h.p.n_in), n_piece = n_in / T::PIECE;
        const bool gated = h.p.gated;
        const Input in(h);
        const Spread x = in.view();
        const float scale = input_scale(h, in);
        uint32_t parity = shared->parity[warp];
        int stage = 0;
#pragma unroll 1
        for (int g = 0; g < m.n_group; g++) {
            float acc[R] = {};
#pragma unroll 1
            for (int c = 0; c < n_piece; c += C::PIECES) {
                landed(shared->landing[warp] + stage, (parity >> stage) & 1);
                parity ^= 1u << stage;
                const unsigned char* w = shared->ring[warp] + stage * STAGE;
                const uint32_t end = min(C::PIECES, n_piece - c);
#pragma unroll 1
                for (uint32_t p = lane; p < end; p += WARP) {
#pragma unroll
                    for (int k = 0; k < R; k++) acc[k] += T::dot(T::template load<Shared>(w + k * C::BYTES, C::BLOCKS, p), c + p, x);
                }
                __syncwarp();
                ask(m, n_in, next, false);
                if (++stage == STAGES) stage = 0;
            }
            // Of two rows the first one's sum comes to the lower half of the lanes, the second's to the upper.
            const bool upper = R == 2 && lane >= WARP / 2;
            float y = upper ? acc[R - 1] : acc[0];
            y += __shfl_xor_sync(ALL, R == 1 ? y : upper ? acc[0] : acc[R - 1], WARP / 2);
#pragma unroll
            for (int o = WARP / 4; o > 0; o /= 2) y += __shfl_xor_sync(ALL, y, o);
            y *= scale;
            const float other = __shfl_xor_sync(ALL, y, WARP / 2);
            const int width = R == 1 || gated ? WARP : WARP / 2, turn = g % width;
            int row = R == 1 || gated ? g : 2 * g + upper;
            if (gated) {
                // The lane that has the biases of this pair, whichever half it is in.
                const float a = (upper ? other : y) + before.bias;
                y = quotient(a, 1.0f + __expf(-a)) * ((upper ? y : other) + before.bias2);
            } else {
                y += before.bias;
            }
            if (lane % width == turn && row < m.n_row) {
                if (missing(before.old)) before.old = receive(m.add + row);
                hand_over(m.out + row, y + before.old);
            }
            if (turn == width - 1) before.read(m, before.mine + (R == 1 || gated ? g + 1 : 2 * (g + 1)));
        }
        __syncwarp();
        if (lane == 0) shared->parity[warp] = parity;
        __syncwarp();
    }
};

// Does something with the stream of a format.
template <int R, class F> __device__ __forceinline__ void with_stream(uint32_t type, F f) {
    switch (type) {
        case F32: f(Stream<TF32, R>()); break;
        case F16: f(Stream<TF16, R>()); break;
        case BF16: f(Stream<TBF16, R>()); break;
        case Q4_0: f(Stream<TQ4_0, R>()); break;
        case Q4_1: f(Stream<TQ4_1, R>()); break;
        case Q5_0: f(Stream<TQ5_0, R>()); break;
        case Q5_1: f(Stream<TQ5_1, R>()); break;
        case Q8_0: f(Stream<TQ8_0, R>()); break;
        case IQ4_NL: f(Stream<TIQ4_NL, R>()); break;
        case MXFP4: f(Stream<TMXFP4, R>()); break;
        case IQ4_XS: f(Stream<TIQ4_XS, R>()); break;
        case Q2_K: f(Stream<TQ2_K, R>()); break;
        case Q3_K: f(Stream<TQ3_K, R>()); break;
        case Q4_K: f(Stream<TQ4_K, R>()); break;
        case Q5_K: f(Stream<TQ5_K, R>()); break;
        case Q6_K: f(Stream<TQ6_K, R>()); break;
    }
}
template <class F> __device__ __forceinline__ void with_rows(uint32_t type, int wide, F f) {
    if (wide == 2) {
        with_stream<2>(type, f);
    } else {
        with_stream<1>(type, f);
    }
}

__device__ __forceinline__ void products(const uint32_t phase, const Fill fill) {
    const Here h = here(phase);
    const Phase& p = h.p;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, bits = h.a.warp_bits, n_in = p.n_in, gated = p.gated;
    int i = 0;
    for (uint32_t k = 1; k < p.n_mat && !gated; k++) i = blockIdx.x >= p.m[k].first ? k : i;
    const Matrix& w = p.m[i];
    const int block = blockIdx.x - w.first, rest = w.rest, n = w.per_block + (block < rest), each = n >> bits, more = n & ((1 << bits) - 1);
    const int wide = w.wide, step = gated ? 1 : wide, n_out = w.n_out;  // rows of a group, and rows from a group to the next
    const int g0 = w.per_block * block + min(block, rest) + each * warp + min(warp, more), g1 = g0 + each + (warp < more), r0 = step * g0;
    const uint8_t *w0 = w.w + r0 * w.row_bytes, *w1 = gated ? p.m[1].w + r0 * w.row_bytes : w0 + w.row_bytes;
    const Rows m = {w0, w1, step * w.row_bytes, g1 - g0, min(step * g1, n_out) - r0, step * g1 > n_out, w.out + r0,
                    w.bias ? w.bias + r0 : nullptr, gated && p.m[1].bias ? p.m[1].bias + r0 : nullptr, w.add ? w.add + r0 : nullptr};
    Next next = {m.w0, m.w1, 0, 0, 0};
    with_rows(w.type, wide, [&](auto stream) { stream.fill(m, n_in, next, fill == FILLED); });
    if (fill == FILL) return;
    Before before;
    before.mine = step == 2 ? 2 * (lane % 16) + lane / 16 : lane;
    before.read(m, before.mine);
    read_input(h);
    with_rows(w.type, wide, [&](auto stream) { stream.multiply(h, m, next, before); });
    trace(h, 1);
}
