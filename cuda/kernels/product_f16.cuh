// Products of f16 with f16 on tensor cores: tiles of 128 rows x 128 rows.
//
// A block goes over k in steps of 64, three of them in shared memory: one is multiplied while the next two are on their way. Rows there have
// 128 bytes whose units of 16 are mixed by the row's number, so that the eight rows of a fragment lie in different banks; it is the order that
// Hopper's products of four warps know as a swizzle of 128 bytes.
#pragma once
#include "elements.cuh"

constexpr int F16_TILE = 128, F16_K = 64, F16_STAGES = 3, F16_STAGE = 2 * F16_TILE * F16_K;  // a stage in halves

// A tile of ROWS rows x 64 into shared memory; rows behind the last are copies of it.
template <int ROWS> __device__ __forceinline__ void copy_tile(uint16_t* to, const uint16_t* from, int width, int n_row, int k0) {
#pragma unroll
    for (int i = 0; i < ROWS * 8 / 256; i++) {
        const int at = threadIdx.x + 256 * i, row = at / 8, unit = at % 8;
        copy16(to + row * F16_K + 8 * (unit ^ (row & 7)), from + size_t(min(row, n_row - 1)) * width + k0 + 8 * unit);
    }
}

// What 256 threads have of the products of TA rows with TB rows, as fragments of warps that read shared memory themselves.
template <int TA, int TB> struct Fragments {
    static constexpr int A = TA / 2, B = TB / 4;  // rows of a warp
    float acc[A / 16][B / 8][4] = {};

    static __device__ __forceinline__ int first_a() { return threadIdx.x / WARP % 2 * A; }
    static __device__ __forceinline__ int first_b() { return threadIdx.x / WARP / 2 * B; }
    // Adds the products of a stage, which are all there.
    __device__ __forceinline__ void add(const uint16_t* as, const uint16_t* bs) {
        const int lane = threadIdx.x % WARP;
        // The row of a fragment that this lane points at, and which half of its 16 elements.
        const int row_a = first_a() + lane % 16, half_a = lane / 16, row_b = first_b() + lane % 8 + 8 * (lane / 16), half_b = (lane / 8) % 2;
#pragma unroll
        for (int ks = 0; ks < F16_K / 16; ks++) {
            uint32_t fa[A / 16][4], fb[B / 16][4];
#pragma unroll
            for (int i = 0; i < A / 16; i++) {
                const int row = row_a + 16 * i;
                load_fragments(fa[i], as + row * F16_K + 8 * ((2 * ks + half_a) ^ (row & 7)));
            }
#pragma unroll
            for (int j = 0; j < B / 16; j++) {
                const int row = row_b + 16 * j;
                load_fragments(fb[j], bs + row * F16_K + 8 * ((2 * ks + half_b) ^ (row & 7)));
            }
#pragma unroll
            for (int i = 0; i < A / 16; i++) {
#pragma unroll
                for (int j = 0; j < B / 8; j++) mma_16816(acc[i][j], fa[i], {fb[j / 2][2 * (j % 2)], fb[j / 2][2 * (j % 2) + 1]});
            }
        }
    }
    // Behind it nobody reads the stage before any more, once all threads are here, and everybody sees what this one has written.
    __device__ __forceinline__ void settle() {}
    // Does something with every pair of rows that this thread has, and their sum.
    template <class F> __device__ __forceinline__ void each(F f) const {
        const int lane = threadIdx.x % WARP, group = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < A / 16; i++) {
#pragma unroll
            for (int j = 0; j < B / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) f(first_a() + 16 * i + group + 8 * (e / 2), first_b() + 8 * j + 2 * t + e % 2, acc[i][j][e]);
            }
        }
    }
};

#ifdef HAS_GROUP_PRODUCTS
// The same with Hopper's products of four warps, which read shared memory on their own while the threads go on.
template <int TA, int TB> struct Groups {
    static_assert(TA == 128, "64 rows for each four warps");
    float acc[TB / 8][4];  // nothing else may write there while a product is under way, not even zeros: the first product does
    bool begun = false;

    __device__ __forceinline__ void add(const uint16_t* as, const uint16_t* bs) {
        const uint16_t* a = as + threadIdx.x / 128 * 64 * F16_K;
        group_products_begin();
#pragma unroll
        for (int ks = 0; ks < F16_K / 16; ks++) mma_group(acc, a, bs, ks, begun || ks > 0);
        group_products_end();
        begun = true;
    }
    __device__ __forceinline__ void settle() {
        group_products_wait();
        copies_shown();
    }
    template <class F> __device__ __forceinline__ void each(F f) const {
        const int lane = threadIdx.x % WARP, row = 16 * (threadIdx.x / WARP) + lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < TB / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) f(row + 8 * (e / 2), 8 * j + 2 * t + e % 2, acc[j][e]);
        }
    }
};
#else
// What was compiled for any device of compute capability 9 has to do without.
template <int TA, int TB> using Groups = Fragments<TA, TB>;
#endif

// A tile of x w^T, with what `out` does with every sum of a row of x and a row of w that there are; all threads of a block together.
// x and w: the rows of the tile, `width` apart. Dynamic shared memory: 96 KiB.
template <class Sums, class Out>
__device__ __forceinline__ void product_f16(const uint16_t* x, int n_x, const uint16_t* w, int n_w, int width, Out out) {
    DYNAMIC_SHARED(uint16_t, tiles);
    const int steps = width / F16_K;
    auto fetch = [&](int step) {
        if (step < steps) {
            uint16_t* to = tiles + (step % F16_STAGES) * F16_STAGE;
            copy_tile<F16_TILE>(to, x, width, n_x, step * F16_K);
            copy_tile<F16_TILE>(to + F16_TILE * F16_K, w, width, n_w, step * F16_K);
        }
        copies_commit();
    };
    fetch(0);
    fetch(1);
    Sums sums;
    for (int step = 0; step < steps; step++) {
        copies_wait_but_one();
        sums.settle();
        __syncthreads();
        fetch(step + 2);
        const uint16_t* xs = tiles + (step % F16_STAGES) * F16_STAGE;
        sums.add(xs, xs + F16_TILE * F16_K);
    }
    sums.settle();
    sums.each([&](int i, int j, float sum) {
        if (i < n_x && j < n_w) out(i, j, sum);
    });
}
