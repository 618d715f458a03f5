// Products of packed weights with f16 on tensor cores: tiles of 128 rows of weights x TILE rows of f16.
//
// Weights are unpacked where they are multiplied, in shared memory: while tensor cores multiply a stage, threads unpack the next one. That pays
// where a matrix has few tiles of columns, since each tile unpacks all of it.
#pragma once
#include "product_f16.cuh"

// Rows of weights, the first of a tile.
struct Packed {
    const uint8_t* w;
    uint64_t row_bytes;
    uint32_t type;
    int n_in;
    int n_row;  // rows from there on
};

// Elements k0 .. k0 + 64 of 128 rows into shared memory, as `copy_tile` would have copied them from f16.
__device__ __forceinline__ void unpack_tile(uint16_t* to, const Packed& a, int k0) {
    with_format(a.type, [&](auto of) {
#pragma unroll
        for (int i = 0; i < F16_TILE * F16_K / 16 / 256; i++) {
            const int at = threadIdx.x + 256 * i, row = at / 4, unit = 2 * (at % 4), k = k0 + 8 * unit;
            float v[16] = {};
            if (k < a.n_in) load16_of<typename decltype(of)::Type>(a.w + min(row, a.n_row - 1) * a.row_bytes, a.n_in, k, v);
            uint4 h[2];
            to_halves(h, v);
#pragma unroll
            for (int j = 0; j < 2; j++) *reinterpret_cast<uint4*>(to + row * F16_K + 8 * ((unit + j) ^ (row & 7))) = h[j];
        }
    });
}

// Steps `from` .. `to` (of 64 elements) of a tile of w x^T, with what `out` does with every sum of a row of w and a row of x that there are; all
// threads of a block together. x: (n_x, width) f16. Dynamic shared memory: two stages of w, three of x.
template <int TILE, class Sums, class Out>
__device__ __forceinline__ void product_packed(const Packed& w, const uint16_t* x, int n_x, int width, int from, int to, Out out) {
    constexpr int X_STAGES = 3, W_STAGES = 2, X_STAGE = TILE * F16_K, W_STAGE = F16_TILE * F16_K;  // a stage in halves
    DYNAMIC_SHARED(uint16_t, tiles);
    uint16_t* const ws = tiles + X_STAGES * X_STAGE;
    auto fetch = [&](int step) {
        if (step < to) copy_tile<TILE>(tiles + step % X_STAGES * X_STAGE, x, width, n_x, step * F16_K);
        copies_commit();
    };
    fetch(from);
    fetch(from + 1);
    unpack_tile(ws + from % W_STAGES * W_STAGE, w, from * F16_K);
    Sums sums;
    for (int step = from; step < to; step++) {
        copies_wait_but_one();
        sums.settle();
        __syncthreads();
        fetch(step + 2);
        sums.add(ws + step % W_STAGES * W_STAGE, tiles + step % X_STAGES * X_STAGE);
        if (step + 1 < to) unpack_tile(ws + (step + 1) % W_STAGES * W_STAGE, w, (step + 1) * F16_K);
    }
    sums.settle();
    sums.each([&](int i, int j, float sum) {
        if (i < w.n_row && j < n_x) out(i, j, sum);
    });
}
