// Products of rows of the weights with one column of activations: what kernels of decoding are made of.
//
// At batch 1 each weight is used once, so the time is that of reading the weights. A block computes two rows: its warps split the row, every
// lane multiplies a piece of each row with the same activations, and one reduction ends it.
#pragma once
#include "elements.cuh"

constexpr int ROWS = 2;       // rows of a block
constexpr int MAX_WARPS = 8;  // warps of a block

enum Mode : uint32_t {
    STORE = 0,   // out = w x (+ bias)
    ADD = 1,     // out += w x (+ bias)
    SQUARE = 2,  // out = max(w x (+ bias), 0)^2
    GATED = 3,   // out = glu(kind, seg[0] x (+ bias), seg[1] x (+ bias)), both of one type and shape; the kind of `Glu` is added
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
    Segment seg[4];
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
        acc[0] += T::dot(load_piece<T>(r0, n_in / T::BLOCK, p), p, x);
        acc[1] += T::dot(load_piece<T>(r1, n_in / T::BLOCK, p), p, x);
    }
}
template <class T> __device__ __forceinline__ void plain(const uint8_t* r0, const uint8_t* r1, int n_in, const Act& x, float (&acc)[ROWS]) {
    int p = threadIdx.x;
    for (; 8 * p + 8 <= n_in; p += blockDim.x) {
        acc[0] += T::dot(load_piece<T>(r0, n_in, p), p, x);
        acc[1] += T::dot(load_piece<T>(r1, n_in, p), p, x);
    }
    if (8 * p < n_in) acc[0] += T::dot_tail(r0, n_in, p, x), acc[1] += T::dot_tail(r1, n_in, p, x);
}

// Adds the products of this thread's pieces of two rows.
__device__ __forceinline__ void add_products(uint32_t type, const uint8_t* r0, const uint8_t* r1, int n, const Act& x, float (&acc)[ROWS]) {
    with_format(type, [&](auto of) {
        using T = typename decltype(of)::Type;
        if constexpr (T::BLOCK > 8) {
            blocks<T>(r0, r1, n, x, acc);
        } else {
            plain<T>(r0, r1, n, x, acc);
        }
    });
}

// The sums over the block, in threads below ROWS; the others have nothing.
__device__ __forceinline__ void block_rows(const float (&acc)[ROWS], float (&y)[ROWS]) {
    __shared__ float part[ROWS][MAX_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warp = blockDim.x / WARP;
    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[r]);
        if (lane == 0) part[r][warp] = sum;
    }
    __syncthreads();
    for (int r = 0; r < ROWS; r++) y[r] = 0.0f;
    if (threadIdx.x >= ROWS) return;
    for (int w = 0; w < n_warp; w++) {
        for (int r = 0; r < ROWS; r++) y[r] += part[r][w];
    }
}
