// Prefill: matrix times the activations of a batch of tokens, on tensor cores.
//
// A block computes BM tokens x BN rows of the weights. It goes over k in steps of 32: activations are rounded to f16 and weights of
// any format dequantized to f16 into shared memory, then warps multiply fragments (m16n8k16, f32 sums). Rows of shared memory are
// padded to 40 halves, which puts the eight rows of a fragment into different banks.
#include "elements.cuh"

struct MulMat {
    const uint8_t* w;     // (n_out) rows
    const float* x;       // (n, n_in), rows x_stride apart
    float* out;           // (n, n_out), rows out_stride apart
    const float* bias;    // (n_out) or null
    uint64_t row_bytes;
    uint64_t next_w;      // bytes from one head's matrix to the next, where there are heads
    uint32_t type;
    uint32_t n_in;
    uint32_t n_out;
    uint32_t n;
    uint32_t add;         // out += instead of out =
    uint32_t x_stride;
    uint32_t out_stride;
    uint32_t next_x;      // elements from one head's part of a row to the next
    uint32_t next_out;
    uint32_t pad;
};

constexpr int BK = 32, LD = BK + 8;

__device__ __forceinline__ uint32_t pair_at(const uint16_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

// WM x WN: the part of the tile that a warp computes.
template <int BM, int BN, int WM, int WN> __device__ __forceinline__ void mul_mat_tile(const MulMat& a) {
    constexpr int MT = WM / 16, NT = WN / 8;
    __shared__ __align__(16) uint16_t xs[BM * LD];
    __shared__ __align__(16) uint16_t ws[BN * LD];
    const int n_in = a.n_in, n_out = a.n_out, n = a.n;
    // Tiles of tokens are neighbours in the grid, so that they read a tile of weights while it is in the L2 cache.
    const int tiles = (n + BM - 1) / BM, m0 = (blockIdx.x % tiles) * BM, n0 = (blockIdx.x / tiles) * BN;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, t = lane % 4;
    const int wm = (warp % (BM / WM)) * WM, wn = (warp / (BM / WM)) * WN;

    const size_t head = blockIdx.y, x_stride = a.x_stride;
    const uint8_t* weights = a.w + head * a.next_w;
    const float* inputs = a.x + head * a.next_x;
    const bool by_fours = (n_in | a.x_stride | a.next_x) % 4 == 0;
    float acc[MT][NT][4] = {};
    for (int k0 = 0; k0 < n_in; k0 += BK) {
        for (int i = threadIdx.x; i < BM * 2; i += blockDim.x) {
            const int row = i / 2, k = k0 + 16 * (i % 2), token = m0 + row;
            float v[16];
            if (token < n && k + 16 <= n_in && by_fours) {
                const float4* x = reinterpret_cast<const float4*>(inputs + token * x_stride + k);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 f = x[j];
                    v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
                }
            } else {
#pragma unroll
                for (int j = 0; j < 16; j++) v[j] = token < n && k + j < n_in ? inputs[token * x_stride + k + j] : 0.0f;
            }
            store16(xs + row * LD + 16 * (i % 2), v);
        }
        for (int i = threadIdx.x; i < BN * 2; i += blockDim.x) {
            const int row = i / 2, k = k0 + 16 * (i % 2);
            float v[16] = {};
            if (n0 + row < n_out && k < n_in) load16(a.type, weights + (n0 + row) * a.row_bytes, n_in, k, v);
            store16(ws + row * LD + 16 * (i % 2), v);
        }
        __syncthreads();
#pragma unroll
        for (int ks = 0; ks < BK; ks += 16) {
            uint32_t fb[NT][2];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const uint16_t* p = ws + (wn + 8 * j + group) * LD + ks + 2 * t;
                fb[j][0] = pair_at(p), fb[j][1] = pair_at(p + 8);
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                if (m0 + wm + 16 * i >= n) break;  // no tokens there; the same for the whole warp
                const uint16_t* p = xs + (wm + 16 * i + group) * LD + ks + 2 * t;
                const uint32_t fa[4] = {pair_at(p), pair_at(p + 8 * LD), pair_at(p + 8), pair_at(p + 8 * LD + 8)};
#pragma unroll
                for (int j = 0; j < NT; j++) mma_16816(acc[i][j], fa, fb[j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int token = m0 + wm + 16 * i + group + 8 * (e / 2), col = n0 + wn + 8 * j + 2 * t + e % 2;
                if (token >= n || col >= n_out) continue;
                float v = acc[i][j][e] + (a.bias ? a.bias[col] : 0.0f);
                float* out = a.out + head * a.next_out + size_t(token) * a.out_stride + col;
                *out = a.add ? *out + v : v;
            }
        }
    }
}

// Grid: (ceil(n / 64) * ceil(n_out / 64), heads). Block: 128. For small batches and small matrices.
KERNEL __launch_bounds__(128) mul_mat_64(const MulMat a) {
    begin();
    mul_mat_tile<64, 64, 32, 32>(a);
}

// Grid: (ceil(n / 128) * ceil(n_out / 128), heads). Block: 256.
KERNEL __launch_bounds__(256) mul_mat_128(const MulMat a) {
    begin();
    mul_mat_tile<128, 128, 64, 32>(a);
}
