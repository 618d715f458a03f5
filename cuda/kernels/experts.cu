// Prefill of a mixture of experts: the columns of a batch (pairs of token and chosen expert) are sorted by expert, so that tensor cores multiply
// all columns of an expert with its weights. An expert has few columns, a tile of them or two, so its weights are unpacked where they are
// multiplied, in shared memory: what dense products do (gemm_f16.cu), to write f16 and to read it again, would take far longer than to multiply.
// In small batches most experts have one column or none; mat-vecs (matvec.cu) serve those.
#include "product_packed.cuh"

struct MoeSort {
    const uint32_t* ids;    // (n) expert of each column
    uint32_t* order;        // (n) columns by rising expert
    uint32_t* first;        // (n_expert + 1) where those of an expert begin in `order`; then n
    uint32_t* first_tile;   // (n_expert + 1) where its tiles begin: a tile has `tile` columns of one expert, or what is left of them
    uint32_t* tile_expert;  // (tiles) expert of each tile
    uint32_t n;
    uint32_t n_expert;
    uint32_t tile;
    uint32_t pad;
};

// Grid: (1). Dynamic shared memory: n_expert counters.
KERNEL __launch_bounds__(256) moe_sort(const MoeSort a) {
    begin();
    DYNAMIC_SHARED(uint32_t, counts);
    const int n = a.n, n_expert = a.n_expert;
    for (int e = threadIdx.x; e < n_expert; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += blockDim.x) count_in_block(counts + a.ids[c]);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t column = 0, tile = 0;
        for (int e = 0; e < n_expert; e++) {
            const uint32_t count = counts[e], end = tile + (count + a.tile - 1) / a.tile;
            a.first[e] = column, a.first_tile[e] = tile;
            counts[e] = column, column += count;
            for (; tile < end; tile++) a.tile_expert[tile] = e;
        }
        a.first[n_expert] = column, a.first_tile[n_expert] = tile;
    }
    __syncthreads();
    // Columns of an expert come in any order: each is multiplied by itself.
    for (int c = threadIdx.x; c < n; c += blockDim.x) a.order[count_in_block(counts + a.ids[c])] = c;
}

struct MulMatExperts {
    const uint8_t* w;             // (n_expert, n_out) rows
    const uint16_t* x;            // (columns, width) f16, in sorted order
    const uint32_t* order;        // as in `MoeSort`; null: results stay in sorted order
    const uint32_t* first;
    const uint32_t* first_tile;
    const uint32_t* tile_expert;
    const float* bias;            // (n_expert, n_out) or null
    float* out;                   // (columns, n_out)
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_in;
    uint32_t width;               // n_in rounded up to 64; columns have zeros there
    uint32_t n_out;
    uint32_t n_expert;
    uint32_t pad;
};

// TILE: columns of a tile.
template <int TILE, class Sums> __device__ __forceinline__ void mul_mat_experts_with(const MulMatExperts& a) {
    const uint32_t tile = blockIdx.x;
    if (tile >= a.first_tile[a.n_expert]) return;
    const uint32_t e = a.tile_expert[tile];
    const int width = a.width, n_out = a.n_out, n0 = blockIdx.y * F16_TILE;
    const int m0 = a.first[e] + (tile - a.first_tile[e]) * TILE, n_x = int(a.first[e + 1]) - m0;
    const Packed w = {a.w + (size_t(e) * n_out + n0) * a.row_bytes, a.row_bytes, a.type, int(a.n_in), n_out - n0};
    product_packed<TILE, Sums>(w, a.x + size_t(m0) * width, n_x, width, 0, width / F16_K, [&](int i, int j, float sum) {
        const size_t column = a.order ? a.order[m0 + j] : m0 + j;
        a.out[column * n_out + n0 + i] = sum + (a.bias ? a.bias[size_t(e) * n_out + n0 + i] : 0.0f);
    });
}

// Grid: (tiles there may be at most, ceil(n_out / 128)). Block: 256. Dynamic shared memory: 56 KiB, or 80 with tiles of 128 columns.
KERNEL __launch_bounds__(256, 2) mul_mat_experts_64(const MulMatExperts a) {
    begin();
    ELSEWHERE(mul_mat_experts_with<64, Fragments<F16_TILE, 64>>(a);)
}
KERNEL __launch_bounds__(256, 2) mul_mat_experts_128(const MulMatExperts a) {
    begin();
    ELSEWHERE(mul_mat_experts_with<128, Fragments<F16_TILE, 128>>(a);)
}

// The same for compute capability 9.0.
KERNEL __launch_bounds__(256, 3) mul_mat_experts_64_hopper(const MulMatExperts a) {
    begin();
    ON_HOPPER(mul_mat_experts_with<64, Groups<F16_TILE, 64>>(a);)
}
KERNEL __launch_bounds__(256, 2) mul_mat_experts_128_hopper(const MulMatExperts a) {
    begin();
    ON_HOPPER(mul_mat_experts_with<128, Groups<F16_TILE, 128>>(a);)
}
