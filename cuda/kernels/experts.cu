// Prefill of a mixture of experts: the columns of a batch (pairs of token and chosen expert) are sorted by expert, so that tensor cores multiply
// all columns of an expert with its weights, which are unpacked to f16 before (gemm_f16.cu). In small batches most experts have few columns or
// none; mat-vecs (matvec.cu) serve those.
#include "product_f16.cuh"

struct MoeSort {
    const uint32_t* ids;    // (n) expert of each column
    uint32_t* order;        // (n) columns by rising expert
    uint32_t* first;        // (n_expert + 1) where those of an expert begin in `order`; then n
    uint32_t* first_tile;   // (n_expert + 1) where its tiles begin: a tile has F16_TILE columns of one expert, or what is left of them
    uint32_t* tile_expert;  // (tiles) expert of each tile
    uint32_t n;
    uint32_t n_expert;
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
            const uint32_t count = counts[e], end = tile + (count + F16_TILE - 1) / F16_TILE;
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
    const uint16_t* w;            // (e1 - e0, n_out, width) f16, those of the experts from e0 on
    const uint16_t* x;            // (columns, width) f16, in sorted order
    const uint32_t* order;        // as in `MoeSort`; null: results stay in sorted order
    const uint32_t* first;
    const uint32_t* first_tile;
    const uint32_t* tile_expert;
    const float* bias;            // (n_expert, n_out) or null
    float* out;                   // (columns, n_out)
    uint32_t width;               // a multiple of 64
    uint32_t n_out;
    uint32_t e0;
    uint32_t e1;
};

template <class Sums> __device__ __forceinline__ void mul_mat_experts_with(const MulMatExperts& a) {
    const int width = a.width, n_out = a.n_out, n0 = blockIdx.y * F16_TILE;
    const uint32_t tile = a.first_tile[a.e0] + blockIdx.x;
    if (tile >= a.first_tile[a.e1]) return;
    const uint32_t e = a.tile_expert[tile];
    const int m0 = a.first[e] + (tile - a.first_tile[e]) * F16_TILE, n_x = int(a.first[e + 1]) - m0;
    const uint16_t* w = a.w + (size_t(e - a.e0) * n_out + n0) * width;
    product_f16<Sums>(a.x + size_t(m0) * width, n_x, w, n_out - n0, width, [&](int i, int j, float sum) {
        const size_t column = a.order ? a.order[m0 + i] : m0 + i;
        a.out[column * n_out + n0 + j] = sum + (a.bias ? a.bias[size_t(e) * n_out + n0 + j] : 0.0f);
    });
}

// Grid: (tiles that the experts may have at most, ceil(n_out / 128)). Block: 256. Dynamic shared memory: 96 KiB.
KERNEL __launch_bounds__(256, 2) mul_mat_experts(const MulMatExperts a) {
    begin();
    mul_mat_experts_with<Fragments>(a);
}

// The same for compute capability 9.0.
KERNEL __launch_bounds__(256, 2) mul_mat_experts_hopper(const MulMatExperts a) {
    begin();
    mul_mat_experts_with<Groups>(a);
}
