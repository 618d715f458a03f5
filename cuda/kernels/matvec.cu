// Decode: matrix times one token's activations, for every weight format.
//
// At batch 1 each weight is used once, so the time is that of reading the weights. A block computes two rows (of one matrix, or the
// same row of gate and up): its warps split the row, every lane multiplies a piece of each row with the same activations, and
// one reduction ends it. Several matrices with one input (q, k, v) share a launch as segments of its grid.
#include "types.cuh"

constexpr int ROWS = 2;       // rows of a block
constexpr int MAX_WARPS = 8;  // warps of a block

enum Mode : uint32_t {
    STORE = 0,   // out = w x (+ bias)
    ADD = 1,     // out += w x (+ bias)
    GATED = 2,   // out = glu(kind, seg[0] x (+ bias), seg[1] x (+ bias)), both of one type and shape; the kind of `Glu` is added
};

struct Segment {
    const uint8_t* w;       // (n_expert or 1, n_out) rows
    uint64_t row_bytes;     // of one row
    uint64_t expert_bytes;  // of all rows of an expert
    float* out;             // (columns, n_out)
    const float* bias;      // (n_expert or 1, n_out) or null
    uint32_t type;
    uint32_t n_out;
};

struct MatVec {
    Segment seg[3];
    const float* xf;        // (inputs, n_in)
    const int8_t* xq;       // (inputs, n_in), null if every segment is of plain numbers
    const float2* xds;      // (inputs, n_in / 32)
    const uint32_t* ids;    // (columns) expert of each column, or null: expert 0
    uint32_t n_seg;
    uint32_t n_in;
    uint32_t mode;
    uint32_t per_input;     // columns that share an input: column c multiplies input c / per_input
};

template <class T> __device__ __forceinline__ void blocks(const uint8_t* r0, const uint8_t* r1, int n_in, const Act& x, float (&acc)[ROWS]) {
    for (int p = threadIdx.x; p < n_in / T::PIECE; p += blockDim.x) {
        acc[0] += T::dot(T::template load<Global>(r0, n_in / T::BLOCK, p), p, x);
        acc[1] += T::dot(T::template load<Global>(r1, n_in / T::BLOCK, p), p, x);
    }
}
template <class T> __device__ __forceinline__ void plain(const uint8_t* r0, const uint8_t* r1, int n_in, const Act& x, float (&acc)[ROWS]) {
    int p = threadIdx.x;
    for (; 8 * p + 8 <= n_in; p += blockDim.x) {
        acc[0] += T::dot(T::template load<Global>(r0, n_in, p), p, x);
        acc[1] += T::dot(T::template load<Global>(r1, n_in, p), p, x);
    }
    if (8 * p < n_in) acc[0] += T::dot_tail(r0, n_in, p, x), acc[1] += T::dot_tail(r1, n_in, p, x);
}

// Grid: (blocks of all segments, columns). Block: 32 * (1 .. MAX_WARPS) threads.
// A segment has ceil(n_out / ROWS) blocks; gated there are n_out blocks in all.
KERNEL __launch_bounds__(WARP* MAX_WARPS) mul_mat_vec(const MatVec a) {
    begin();
    const int col = blockIdx.y;
    int block = blockIdx.x, s = 0;
    if (a.mode < GATED) {
        while (s + 1 < int(a.n_seg) && block >= int(a.seg[s].n_out + ROWS - 1) / ROWS) {
            block -= (a.seg[s].n_out + ROWS - 1) / ROWS;
            s++;
        }
    }
    const Segment& g = s == 0 ? a.seg[0] : s == 1 ? a.seg[1] : a.seg[2];
    const size_t input = col / a.per_input;
    const size_t expert = a.ids ? a.ids[col] : 0;
    const Act x = {a.xf + input * a.n_in, a.xq + input * a.n_in, a.xds + input * (a.n_in / 32)};

    const uint8_t *r0, *r1;
    int row;  // first row of the block
    if (a.mode >= GATED) {
        row = block;
        r0 = a.seg[0].w + expert * a.seg[0].expert_bytes + row * a.seg[0].row_bytes;
        r1 = a.seg[1].w + expert * a.seg[1].expert_bytes + row * a.seg[1].row_bytes;
    } else {
        row = block * ROWS;
        r0 = g.w + expert * g.expert_bytes + row * g.row_bytes;
        // An odd last row is computed twice and stored once.
        r1 = row + 1 < int(g.n_out) ? r0 + g.row_bytes : r0;
    }

    float acc[ROWS] = {};
    const int n = a.n_in;
    switch (g.type) {
        case F32: plain<TF32>(r0, r1, n, x, acc); break;
        case F16: plain<TF16>(r0, r1, n, x, acc); break;
        case BF16: plain<TBF16>(r0, r1, n, x, acc); break;
        case Q4_0: blocks<TQ4_0>(r0, r1, n, x, acc); break;
        case Q4_1: blocks<TQ4_1>(r0, r1, n, x, acc); break;
        case Q5_0: blocks<TQ5_0>(r0, r1, n, x, acc); break;
        case Q5_1: blocks<TQ5_1>(r0, r1, n, x, acc); break;
        case Q8_0: blocks<TQ8_0>(r0, r1, n, x, acc); break;
        case IQ4_NL: blocks<TIQ4_NL>(r0, r1, n, x, acc); break;
        case MXFP4: blocks<TMXFP4>(r0, r1, n, x, acc); break;
        case IQ4_XS: blocks<TIQ4_XS>(r0, r1, n, x, acc); break;
        case Q2_K: blocks<TQ2_K>(r0, r1, n, x, acc); break;
        case Q3_K: blocks<TQ3_K>(r0, r1, n, x, acc); break;
        case Q4_K: blocks<TQ4_K>(r0, r1, n, x, acc); break;
        case Q5_K: blocks<TQ5_K>(r0, r1, n, x, acc); break;
        case Q6_K: blocks<TQ6_K>(r0, r1, n, x, acc); break;
    }

    __shared__ float part[ROWS][MAX_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warp = blockDim.x / WARP;
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0) part[r][warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= ROWS) return;
    float y[ROWS] = {};
    for (int w = 0; w < n_warp; w++) {
        for (int r = 0; r < ROWS; r++) y[r] += part[r][w];
    }

    if (a.mode >= GATED) {
        if (threadIdx.x != 0) return;
        if (a.seg[0].bias) y[0] += a.seg[0].bias[expert * g.n_out + row];
        if (a.seg[1].bias) y[1] += a.seg[1].bias[expert * g.n_out + row];
        g.out[size_t(col) * g.n_out + row] = glu(a.mode - GATED, y[0], y[1]);
        return;
    }
    const int r = row + threadIdx.x;
    if (r >= int(g.n_out)) return;
    float v = threadIdx.x == 0 ? y[0] : y[1];
    if (g.bias) v += g.bias[expert * g.n_out + r];
    float* out = g.out + size_t(col) * g.n_out + r;
    *out = a.mode == ADD ? *out + v : v;
}
