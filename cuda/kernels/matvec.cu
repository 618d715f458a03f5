// Decode: matrix times one token's activations, for every weight format.
//
// A block computes pairs of rows one after the other: neighbours in one matrix, or the same row of gate and up. What it multiplies next is on its
// way while it multiplies, across the ends of rows, and memory does not wait for blocks that end and begin. Several matrices with one
// input (q, k, v) share a launch as segments of it.
#include "matvec.cuh"

// Sums of two rows over the block: of the first in thread 0, of both in thread 1. `turn` says which time it is.
__device__ __forceinline__ void join_rows(const float (&acc)[ROWS], int turn, float (&y)[ROWS]) {
    __shared__ float part[2][ROWS][MAX_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warp = blockDim.x / WARP;
    // Of two sums the first comes to the lower half of the lanes, the second to the upper.
    const bool upper = lane >= WARP / 2;
    float sum = upper ? acc[1] : acc[0];
    sum += __shfl_xor_sync(ALL, upper ? acc[0] : acc[1], WARP / 2);
#pragma unroll
    for (int o = WARP / 4; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
    if (n_warp == 1) {
        y[0] = sum, y[1] = __shfl_sync(ALL, sum, WARP / 2);
        return;
    }
    // Who still reads what a warp writes here has not been at the barrier since the time before last.
    float(&mine)[ROWS][MAX_WARPS] = part[turn % 2];
    if (lane % (WARP / 2) == 0) mine[upper][warp] = sum;
    __syncthreads();
    y[0] = y[1] = 0.0f;
    if (threadIdx.x >= ROWS) return;
    for (int w = 0; w < n_warp; w++) y[0] += mine[0][w], y[1] += mine[1][w];
}

// Two rows.
struct TwoRows {
    const uint8_t *r0, *r1;
};

// The products of every `step`th of n pairs of rows of a format, from the `first` on: `rows(i)` are those of a pair, `done(i, sums)` takes what
// this thread has of them.
template <class T, class Rows, class Done> __device__ __forceinline__ void stream_rows(int n_in, const Act& x, int first, int n, int step, Rows rows, Done done) {
    const int nb = T::BLOCK > 8 ? n_in / T::BLOCK : n_in, pieces = n_in / T::PIECE;
    TwoRows now = {}, then = {};
    typename T::Frag a0 = {}, a1 = {};
    float acc[ROWS] = {};
    // The first time around nothing is there yet: what asks for weights is long, and stands here once.
    int i = first - step, p = pieces + threadIdx.x;
    bool ends = true;
#pragma unroll 1
    while (true) {
        // What comes next.
        int next = i, at = p + blockDim.x;
        if (ends) {
            next = i + step, at = threadIdx.x;
            if (next < n) then = rows(next);
        }
        typename T::Frag b0 = {}, b1 = {};
        if (next < n && at < pieces) b0 = load_piece<T>(then.r0, nb, at), b1 = load_piece<T>(then.r1, nb, at);
        if (p < pieces) acc[0] += T::dot(a0, p, x), acc[1] += T::dot(a1, p, x);
        if (ends && i >= first) {
            if constexpr (T::BLOCK <= 8) {
                if (n_in % 8 != 0 && threadIdx.x == 0) acc[0] += T::dot_tail(now.r0, n_in, pieces, x), acc[1] += T::dot_tail(now.r1, n_in, pieces, x);
            }
            done(i, acc);
            acc[0] = acc[1] = 0.0f;
        }
        if (next >= n) return;
        i = next, p = at, now = then, a0 = b0, a1 = b1;
        ends = p - int(threadIdx.x) + int(blockDim.x) >= pieces;
    }
}

// Grid: (any, columns). Block: 32 * (1 .. MAX_WARPS) threads. A segment has ceil(n_out / ROWS) pairs of rows; gated there are n_out pairs in all.
KERNEL __launch_bounds__(WARP* MAX_WARPS, 2) mul_mat_vec(const IN_PLACE MatVec a) {
    begin();
    const int col = blockIdx.y;
    const size_t input = col / a.per_input;
    const size_t expert = a.ids ? a.ids[col] : 0;
    const Act x = {a.xf + input * a.n_in, a.xq + input * a.n_in, a.xds + input * (a.n_in / 32)};
    const bool gates = a.mode >= GATED;
    int before = 0, turn = 0;
#pragma unroll 1
    for (int s = 0; s < (gates ? 1 : int(a.n_seg)); s++) {
        const Segment& g = a.seg[s];
        const int n_out = g.n_out, n = gates ? n_out : (n_out + ROWS - 1) / ROWS;
        // Pairs of all segments are dealt out in turn.
        int first = int(blockIdx.x) - before % int(gridDim.x);
        if (first < 0) first += gridDim.x;
        before += n;
        auto rows = [&](int i) -> TwoRows {
            const uint8_t* w = g.w + expert * g.expert_bytes + size_t(gates ? i : ROWS * i) * g.row_bytes;
            if (gates) return {w, a.seg[1].w + expert * a.seg[1].expert_bytes + size_t(i) * a.seg[1].row_bytes};
            // An odd last row is computed twice and stored once.
            return {w, ROWS * i + 1 < n_out ? w + g.row_bytes : w};
        };
        auto done = [&](int i, const float (&acc)[ROWS]) {
            float y[ROWS];
            join_rows(acc, turn++, y);
            if (gates) {
                if (threadIdx.x != 0) return;
                if (g.bias) y[0] += g.bias[expert * n_out + i];
                if (a.seg[1].bias) y[1] += a.seg[1].bias[expert * n_out + i];
                g.out[size_t(col) * n_out + i] = glu(a.mode - GATED, y[0], y[1]);
                return;
            }
            const int r = ROWS * i + int(threadIdx.x);
            if (threadIdx.x >= ROWS || r >= n_out) return;
            float v = threadIdx.x == 0 ? y[0] : y[1];
            if (g.bias) v += g.bias[expert * n_out + r];
            float* out = g.out + size_t(col) * n_out + r;
            if (a.mode == SQUARE) v = fmaxf(v, 0.0f), v *= v;
            *out = a.mode == ADD ? *out + v : v;
        };
        with_format(g.type, [&](auto of) { stream_rows<typename decltype(of)::Type>(a.n_in, x, first, n, gridDim.x, rows, done); });
    }
}
