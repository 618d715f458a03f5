// Small batches, up to 128 tokens: all of them are one tile, so weights are unpacked once, where they are multiplied.
//
// A matrix has too few tiles of 128 rows to occupy the device, so blocks share the columns of one, and a second kernel adds what they have, in
// one order.
#include "product_packed.cuh"

struct MulMatSmall {
    const uint8_t* w;    // (n_out) rows
    const uint16_t* x;   // (n, width) f16
    float* part;         // (gridDim.y, n, n_out)
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_in;
    uint32_t width;      // n_in rounded up to 64; x has zeros there
    uint32_t n_out;
    uint32_t n;          // no more than a tile
    uint32_t pad;
};

template <int TILE, class Sums> __device__ __forceinline__ void mul_mat_small_with(const MulMatSmall& a) {
    const int n_out = a.n_out, n0 = blockIdx.x * F16_TILE, steps = a.width / F16_K;
    const int from = steps * blockIdx.y / gridDim.y, to = steps * (blockIdx.y + 1) / gridDim.y;
    const Packed w = {a.w + n0 * a.row_bytes, a.row_bytes, a.type, int(a.n_in), n_out - n0};
    float* part = a.part + size_t(blockIdx.y) * a.n * n_out + n0;
    product_packed<TILE, Sums>(w, a.x, a.n, a.width, from, to, [&](int i, int j, float sum) { part[size_t(j) * n_out + i] = sum; });
}

// Grid: (ceil(n_out / 128), blocks that share the columns, no more than steps of 64). Block: 256. Dynamic shared memory: 56 KiB, or 80 with a tile
// of 128 tokens.
KERNEL __launch_bounds__(256, 2) mul_mat_small_64(const MulMatSmall a) {
    begin();
    ELSEWHERE(mul_mat_small_with<64, Fragments<F16_TILE, 64>>(a);)
}
KERNEL __launch_bounds__(256, 2) mul_mat_small_128(const MulMatSmall a) {
    begin();
    ELSEWHERE(mul_mat_small_with<128, Fragments<F16_TILE, 128>>(a);)
}

// The same for compute capability 9.0.
KERNEL __launch_bounds__(256, 3) mul_mat_small_64_hopper(const MulMatSmall a) {
    begin();
    ON_HOPPER(mul_mat_small_with<64, Groups<F16_TILE, 64>>(a);)
}
KERNEL __launch_bounds__(256, 2) mul_mat_small_128_hopper(const MulMatSmall a) {
    begin();
    ON_HOPPER(mul_mat_small_with<128, Groups<F16_TILE, 128>>(a);)
}

struct JoinParts {
    const float* part;  // (n_part, n, n_out)
    const float* bias;  // (n_out) or null
    float* out;         // (n, n_out)
    uint32_t n_part;
    uint32_t n_out;
    uint32_t n;
    uint32_t add;       // out += instead of out =
};

// Grid: (ceil(n_out / threads), n).
KERNEL join_parts(const JoinParts a) {
    begin();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n_out) return;
    const size_t at = size_t(blockIdx.y) * a.n_out + i;
    float sum = 0.0f;
    for (uint32_t p = 0; p < a.n_part; p++) sum += a.part[size_t(p) * a.n * a.n_out + at];
    if (a.bias) sum += a.bias[i];
    a.out[at] = a.add ? a.out[at] + sum : sum;
}
