// Prefill with large batches: weights are unpacked to f16 once, activations too, and tensor cores multiply what is f16 on both sides.
//
// Unpacking costs four bytes of traffic an element, some of it in the L2 cache; in return the product is nothing but copies and mma
// (product_f16.cuh). A block computes 128 tokens x 128 rows.
#include "product_f16.cuh"

struct Unpack {
    const uint8_t* w;       // (n_row) rows
    uint16_t* out;          // (n_row, width) f16
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_in;
    uint32_t width;         // n_in rounded up to 64; the rest becomes zero
    uint32_t n_row;
};

// Grid: (ceil(width / 16 / threads), n_row). A thread unpacks 16 elements, so that what neighbours write lies together.
KERNEL unpack(const Unpack a) {
    begin();
    const int k = 16 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (k >= int(a.width) || row >= int(a.n_row)) return;
    uint4 h[2] = {};
    if (k < int(a.n_in)) {
        with_format(a.type, [&](auto of) {
            using T = typename decltype(of)::Type;
            halves_of<T, 1>(h, raw_of<T, 1>(a.w + row * a.row_bytes, a.n_in, k), k);
        });
    }
    uint4* out = reinterpret_cast<uint4*>(a.out + size_t(row) * a.width + k);
    out[0] = h[0], out[1] = h[1];
}

struct ToHalf {
    const float* x;         // (n, n_in), or with an order (columns / per_input, n_in)
    uint16_t* out;          // (n, width) f16
    const uint32_t* order;  // null, or (n) column of each row of `out`
    uint32_t n_in;
    uint32_t width;         // n_in rounded up to 64; the rest becomes zero
    uint32_t per_input;     // columns that share an input
    uint32_t pad;
};

// Grid: (ceil(width / 8 / threads), n). A thread takes 8 elements.
KERNEL to_half(const ToHalf a) {
    begin();
    const int k = 8 * (blockIdx.x * blockDim.x + threadIdx.x), n = a.n_in;
    if (k >= int(a.width)) return;
    const float* x = a.x + size_t(a.order ? a.order[blockIdx.y] / a.per_input : blockIdx.y) * n + k;
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

template <class Sums> __device__ __forceinline__ void mul_mat_f16_with(const MulMatF16& a) {
    const int width = a.width, n = a.n;
    // Tiles of tokens are neighbours in the grid, so that they read a tile of weights while it is in the L2 cache.
    const int of = (n + F16_TILE - 1) / F16_TILE, m0 = (blockIdx.x % of) * F16_TILE;
    int tile = blockIdx.x / of, which = 0;
    const uint16_t* w = a.w + size_t(tile) * F16_TILE * width;
    while (which + 1 < int(a.n_part) && tile >= int(a.part[which].n_out + F16_TILE - 1) / F16_TILE) {
        tile -= (a.part[which].n_out + F16_TILE - 1) / F16_TILE, which++;
    }
    const PartF16 part = which == 0 ? a.part[0] : which == 1 ? a.part[1] : a.part[2];
    const int n0 = tile * F16_TILE, n_out = part.n_out;
    product_f16<Sums>(a.x + size_t(m0) * width, n - m0, w, n_out - n0, width, [&](int i, int j, float sum) {
        const int token = m0 + i, col = n0 + j;
        float* out = part.out + size_t(token) * part.stride + col;
        const float v = sum + (part.bias ? part.bias[col] : 0.0f);
        *out = a.add ? *out + v : v;
    });
}

// Grid: (ceil(n / 128) * sum over parts of ceil(n_out / 128)). Block: 256. Dynamic shared memory: 96 KiB.
KERNEL __launch_bounds__(256, 2) mul_mat_f16(const MulMatF16 a) {
    begin();
    ELSEWHERE(mul_mat_f16_with<Fragments<F16_TILE, F16_TILE>>(a);)
}

// The same for compute capability 9.0.
KERNEL __launch_bounds__(256, 2) mul_mat_f16_hopper(const MulMatF16 a) {
    begin();
    ON_HOPPER(mul_mat_f16_with<Groups<F16_TILE, F16_TILE>>(a);)
}
