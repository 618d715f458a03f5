// Prefill with large batches: weights are unpacked to f16 once, activations too, and tensor cores multiply what is f16 on both sides.
//
// Unpacking costs four bytes of traffic an element, some of it in the L2 cache; in return the product is nothing but copies and mma. A block computes 128 tokens x 128 rows. It goes over k in steps of 64,
// three of them in shared memory: one is multiplied while the next two are on their way. Rows there have 128 bytes whose units of 16
// are mixed by the row's number, so that the eight rows of a fragment lie in different banks; it is the order that Hopper's products of four
// warps know as a swizzle of 128 bytes.
#include "types.cuh"

struct Unpack {
    const uint8_t* w;  // (n_row) rows
    uint16_t* out;     // (n_row, width) f16
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_in;
    uint32_t width;    // n_in rounded up to 64; the rest becomes zero
    uint32_t n_row;
};

// Grid: (ceil(width / 16 / threads), n_row). A thread unpacks 16 elements.
KERNEL unpack(const Unpack a) {
    begin();
    const int k = 16 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (k >= int(a.width) || row >= int(a.n_row)) return;
    float v[16] = {};
    if (k < int(a.n_in)) load16(a.type, a.w + row * a.row_bytes, a.n_in, k, v);
    store16(a.out + size_t(row) * a.width + k, v);
}

struct ToHalf {
    const float* x;  // (n, n_in)
    uint16_t* out;   // (n, width) f16
    uint32_t n_in;
    uint32_t width;  // n_in rounded up to 64; the rest becomes zero
};

// Grid: (ceil(width / 8 / threads), n). A thread takes 8 elements.
KERNEL to_half(const ToHalf a) {
    begin();
    const int k = 8 * (blockIdx.x * blockDim.x + threadIdx.x), n = a.n_in;
    if (k >= int(a.width)) return;
    const float* x = a.x + size_t(blockIdx.y) * n + k;
    float v[8] = {};
    if (n % 4 == 0 && k + 8 <= n) {
        const float4 v0 = reinterpret_cast<const float4*>(x)[0], v1 = reinterpret_cast<const float4*>(x)[1];
        v[0] = v0.x, v[1] = v0.y, v[2] = v0.z, v[3] = v0.w, v[4] = v1.x, v[5] = v1.y, v[6] = v1.z, v[7] = v1.w;
    } else {
        for (int i = 0; i < 8; i++) {
            if (k + i < n) v[i] = x[i];
        }
    }
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = uint32_t(float_to_half(v[2 * i])) | uint32_t(float_to_half(v[2 * i + 1])) << 16;
    *reinterpret_cast<uint4*>(a.out + size_t(blockIdx.y) * a.width + k) = make_uint4(w[0], w[1], w[2], w[3]);
}

// A matrix of a launch. Its rows begin at a multiple of 128 among the unpacked ones.
struct PartF16 {
    float* out;         // (n, stride)
    const float* bias;  // (n_out) or null
    uint32_t n_out;
    uint32_t stride;
};

struct MulMatF16 {
    PartF16 part[3];
    const uint16_t* w;  // (rows of all parts, width)
    const uint16_t* x;  // (n, width)
    uint32_t width;     // a multiple of 64
    uint32_t n;
    uint32_t add;       // out += instead of out =
    uint32_t n_part;
};

constexpr int F16_TILE = 128, F16_K = 64, F16_STAGES = 3, F16_STAGE = 2 * F16_TILE * F16_K;  // a stage in halves

// A tile of 128 rows x 64 into shared memory; rows behind the last are copies of it.
__device__ __forceinline__ void copy_tile(uint16_t* to, const uint16_t* from, int width, int row0, int n_row, int k0) {
#pragma unroll
    for (int i = 0; i < F16_TILE * 8 / 256; i++) {
        const int at = threadIdx.x + 256 * i, row = at / 8, unit = at % 8;
        copy16(to + row * F16_K + 8 * (unit ^ (row & 7)), from + size_t(min(row0 + row, n_row - 1)) * width + k0 + 8 * unit);
    }
}

// What 256 threads have of a tile, as fragments of warps that read shared memory themselves.
struct Fragments {
    float acc[4][4][4] = {};

    static __device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
    // Adds the products of a stage, which are all there.
    __device__ __forceinline__ void add(const uint16_t* xs, const uint16_t* ws) {
        const int lane = threadIdx.x % WARP, wm = (warp() % 2) * 64, wn = (warp() / 2) * 32;
        // The row of a fragment that this lane points at, and which half of its 16 elements.
        const int row_a = wm + lane % 16, half_a = lane / 16, row_b = wn + lane % 8 + 8 * (lane / 16), half_b = (lane / 8) % 2;
#pragma unroll
        for (int ks = 0; ks < F16_K / 16; ks++) {
            uint32_t fa[4][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = row_a + 16 * i;
                load_fragments(fa[i], xs + row * F16_K + 8 * ((2 * ks + half_a) ^ (row & 7)));
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = row_b + 16 * j;
                load_fragments(fb[j], ws + row * F16_K + 8 * ((2 * ks + half_b) ^ (row & 7)));
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) mma_16816(acc[i][j], fa[i], {fb[j / 2][2 * (j % 2)], fb[j / 2][2 * (j % 2) + 1]});
            }
        }
    }
    // Behind it nobody reads the stage before any more, once all threads are here.
    __device__ __forceinline__ void settle() {}
    // Does something with every token and row of the tile that this thread has, and their sum.
    template <class F> __device__ __forceinline__ void each(F f) const {
        const int lane = threadIdx.x % WARP, group = lane / 4, t = lane % 4, wm = (warp() % 2) * 64, wn = (warp() / 2) * 32;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) f(wm + 16 * i + group + 8 * (e / 2), wn + 8 * j + 2 * t + e % 2, acc[i][j][e]);
            }
        }
    }
};

#ifdef HAS_GROUP_PRODUCTS
// The same with Hopper's products of four warps, which read shared memory on their own while the threads go on.
struct Groups {
    float acc[16][4];  // nothing else may write there while a product is under way, not even zeros: the first product does
    bool begun = false;

    __device__ __forceinline__ void add(const uint16_t* xs, const uint16_t* ws) {
        const uint16_t* x = xs + threadIdx.x / 128 * 64 * F16_K;
        group_products_begin();
#pragma unroll
        for (int ks = 0; ks < F16_K / 16; ks++) mma_group(acc, x, ws, ks, begun || ks > 0);
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
        for (int j = 0; j < 16; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) f(row + 8 * (e / 2), 8 * j + 2 * t + e % 2, acc[j][e]);
        }
    }
};
#else
// What was compiled for any device of compute capability 9 has to do without.
using Groups = Fragments;
#endif

template <class Sums> __device__ __forceinline__ void mul_mat_f16_with(const MulMatF16& a) {
    DYNAMIC_SHARED(uint16_t, tiles);
    const int width = a.width, n = a.n, steps = width / F16_K;
    // Tiles of tokens are neighbours in the grid, so that they read a tile of weights while it is in the L2 cache.
    const int of = (n + F16_TILE - 1) / F16_TILE, m0 = (blockIdx.x % of) * F16_TILE;
    int tile = blockIdx.x / of, which = 0;
    const uint16_t* w = a.w + size_t(tile) * F16_TILE * width;
    while (which + 1 < int(a.n_part) && tile >= int(a.part[which].n_out + F16_TILE - 1) / F16_TILE) {
        tile -= (a.part[which].n_out + F16_TILE - 1) / F16_TILE, which++;
    }
    const PartF16 part = which == 0 ? a.part[0] : which == 1 ? a.part[1] : a.part[2];
    const int n0 = tile * F16_TILE, n_out = part.n_out;
    auto fetch = [&](int step) {
        if (step < steps) {
            uint16_t* to = tiles + (step % F16_STAGES) * F16_STAGE;
            copy_tile(to, a.x, width, m0, n, step * F16_K);
            copy_tile(to + F16_TILE * F16_K, w, width, 0, n_out - n0, step * F16_K);
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
        const int token = m0 + i, col = n0 + j;
        if (token >= n || col >= n_out) return;
        float* out = part.out + size_t(token) * part.stride + col;
        const float v = sum + (part.bias ? part.bias[col] : 0.0f);
        *out = a.add ? *out + v : v;
    });
}

// Grid: (ceil(n / 128) * sum over parts of ceil(n_out / 128)). Block: 256. Dynamic shared memory: 96 KiB.
KERNEL __launch_bounds__(256, 2) mul_mat_f16(const MulMatF16 a) {
    begin();
    mul_mat_f16_with<Fragments>(a);
}

// The same for compute capability 9.0.
KERNEL __launch_bounds__(256, 2) mul_mat_f16_hopper(const MulMatF16 a) {
    begin();
    mul_mat_f16_with<Groups>(a);
}
