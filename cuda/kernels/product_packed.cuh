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

// Steps `from` .. `to` (of 64 elements) of a tile of w x^T, with what `out` does with every sum of a row of w and a row of x that there are; all
// threads of a block together. x: (n_x, width) f16. Dynamic shared memory: two stages of w, three of x.
//
// A thread unpacks half a row of each step. What it needs for that is on its way to registers since it unpacked the step before (but not of f32,
// for which there are too few).
template <int TILE, class Sums, class T, class Out>
__device__ __forceinline__ void product_packed_of(const Packed& w, const uint16_t* x, int n_x, int width, int from, int to, Out out) {
    constexpr int X_STAGES = 3, W_STAGES = 2, X_STAGE = TILE * F16_K, W_STAGE = F16_TILE * F16_K;  // a stage in halves
    static_assert(F16_TILE * F16_K == 32 * 256, "a thread takes half of a row");
    DYNAMIC_SHARED(uint16_t, tiles);
    const int row = threadIdx.x / 2, unit = 4 * (threadIdx.x % 2);
    const uint8_t* const packed = w.w + min(row, w.n_row - 1) * w.row_bytes;
    uint16_t* const mine = tiles + X_STAGES * X_STAGE + row * F16_K;
    constexpr int COPIES = TILE * 8 / 256;
    const uint16_t* inputs[COPIES];
    uint16_t* copies = tiles + threadIdx.x / 8 * F16_K + 8 * (threadIdx.x % 8 ^ threadIdx.x / 8 % 8);
#pragma unroll
    for (int i = 0; i < COPIES; i++) inputs[i] = x + size_t(min(int(threadIdx.x / 8 + 32 * i), n_x - 1)) * width + 8 * (threadIdx.x % 8);
    auto fetch = [&](int step) {
        if (step < to) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) copy16(copies + step % X_STAGES * X_STAGE + 32 * i * F16_K, inputs[i] + step * F16_K);
        }
        copies_commit();
    };
    using Raw = typename T::template Raw<2>;
    constexpr bool EARLY = sizeof(Raw) < 128;
    Raw raw;
    auto ask = [&](int step) {
        const int k = step * F16_K + 8 * unit;
        if (!EARLY || step >= to) return;
        // Of zeros nothing but zeros is made.
        if (k < w.n_in) raw = raw_of<T, 2>(packed, w.n_in, k);
        else raw = {};
    };
    auto unpack = [&](int step) {
        const int k = step * F16_K + 8 * unit;
        uint4 h[4];
        if (!EARLY) raw = k < w.n_in ? raw_of<T, 2>(packed, w.n_in, k) : Raw{};
        halves_of<T, 2>(h, raw, k);
#pragma unroll
        for (int j = 0; j < 4; j++) *reinterpret_cast<uint4*>(mine + step % W_STAGES * W_STAGE + 8 * ((unit + j) ^ (row & 7))) = h[j];
    };
    ask(from);
    fetch(from);
    fetch(from + 1);
    unpack(from);
    ask(from + 1);
    Sums sums;
    for (int step = from; step < to; step++) {
        copies_wait_but_one();
        sums.settle();
        __syncthreads();
        fetch(step + 2);
        sums.add(tiles + X_STAGES * X_STAGE + step % W_STAGES * W_STAGE, tiles + step % X_STAGES * X_STAGE);
        if (step + 1 < to) unpack(step + 1);
        ask(step + 2);
    }
    sums.settle();
    sums.each([&](int i, int j, float sum) {
        if (i < w.n_row && j < n_x) out(i, j, sum);
    });
}
template <int TILE, class Sums, class Out>
__device__ __forceinline__ void product_packed(const Packed& w, const uint16_t* x, int n_x, int width, int from, int to, Out out) {
    with_format(w.type, [&](auto of) { product_packed_of<TILE, Sums, typename decltype(of)::Type>(w, x, n_x, width, from, to, out); });
}
