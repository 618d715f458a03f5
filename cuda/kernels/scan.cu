// State spaces (Mamba-2, arXiv 2405.21060): the scan over the tokens, and the norm of what it gives. Their convolution is in conv.cu.
#include "common.cuh"

struct SsmScan {
    const float* xbc;     // (n, width): x of all heads, then b of all groups, then c
    const float* dt;      // (n, n_head), of which a softplus is taken
    float* state;         // (n_head, head_dim, d_state)
    float* out;           // (n, n_head, head_dim)
    const uint32_t* pos;  // (1) position of the first token
    const float* a;       // (n_head) how fast a head forgets
    const float* bias;    // (n_head) added to dt
    const float* d;       // (n_head) how much of its own input it passes on
    uint32_t n;
    uint32_t n_head;
    uint32_t head_dim;    // a multiple of 16
    uint32_t n_group;     // groups of heads that lie side by side
    uint32_t d_state;     // a multiple of 4
    uint32_t width;
    uint32_t each;        // rows that lanes share: 1 or 2
    uint32_t pad;
};

constexpr int SCAN_BLOCK = 64;

// Which rows and columns a thread has: LANES lanes share R rows that lie side by side, and each has J quadruples of every one.
template <int LANES, int R, int J> struct ScanShare {
    static constexpr int COLUMNS = 4 * LANES * J;
    static constexpr int ROWS = SCAN_BLOCK / LANES * R;  // of a block, all of one head
    static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }
    static __device__ __forceinline__ int row() { return blockIdx.x * ROWS + threadIdx.x / LANES * R; }
    static __device__ __forceinline__ int column(int j) { return 4 * (lane() + LANES * j); }
};

// What a token writes with and reads with, as far as a lane has it, and what it brings to the rows. Columns that are not there stay zero.
template <class S, int R, int J> struct ScanInputs {
    float4 b[J], c[J];
    float x[R];
    __device__ __forceinline__ ScanInputs() {
#pragma unroll
        for (int j = 0; j < J; j++) b[j] = c[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    __device__ __forceinline__ void load(const float* x_at, const float* b_at, const float* c_at, int d) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            if (S::column(j) >= d) continue;
            b[j] = *reinterpret_cast<const float4*>(b_at + S::column(j));
            c[j] = *reinterpret_cast<const float4*>(c_at + S::column(j));
        }
        if constexpr (R == 2) {
            const float2 two = *reinterpret_cast<const float2*>(x_at);
            x[0] = two.x, x[1] = two.y;
        } else {
            x[0] = *x_at;
        }
    }
};

// s = keeps s + x b, and the part of s c that this lane has.
template <int J> __device__ __forceinline__ float scan_row(float4 (&s)[J], float keeps, float x, const float4 (&b)[J], const float4 (&c)[J]) {
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < J; j++) {
        s[j].x = keeps * s[j].x + x * b[j].x, s[j].y = keeps * s[j].y + x * b[j].y;
        s[j].z = keeps * s[j].z + x * b[j].z, s[j].w = keeps * s[j].w + x * b[j].w;
        sum[0] += s[j].x * c[j].x, sum[1] += s[j].y * c[j].y, sum[2] += s[j].z * c[j].z, sum[3] += s[j].w * c[j].w;
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Columns from `first` on. A token's inputs are fetched while the one before is worked on, and what it reads is added up over the lanes while
// the next one is.
template <int LANES, int R, int J> __device__ __forceinline__ void scan_columns(const SsmScan& a, int first) {
    using S = ScanShare<LANES, R, J>;
    const int n = a.n, inner = a.n_head * a.head_dim, d = min(int(a.d_state) - first, S::COLUMNS), row = S::row(), lane = S::lane();
    const int head = row / int(a.head_dim), group = head / int(a.n_head / a.n_group);
    const size_t width = a.width, n_head = a.n_head;
    const float rate = a.a[head], bias = a.bias[head], skip = a.d[head];
    float* state = a.state + size_t(row) * a.d_state + first;
    // No other launch of a pass has to do with this layer's state, and an upload stands between two passes: it is read ahead of the wait.
    float4 s[R][J];
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int e = S::column(j);
            s[r][j] = e < d ? *reinterpret_cast<const float4*>(state + size_t(r) * a.d_state + e) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
    begin();
    const float *x_at = a.xbc + row, *b_at = a.xbc + inner + size_t(group) * a.d_state + first, *c_at = b_at + size_t(a.n_group) * a.d_state;
    ScanInputs<S, R, J> even, odd;
    even.load(x_at, b_at, c_at, d);
    if (*a.pos == 0) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int j = 0; j < J; j++) s[r][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }
    const bool second = R == 2 && lane % 2;
    float dts = 0.0f, keep = 0.0f, read[R] = {}, passed = 0.0f;
    float* out = a.out + row + lane;
    // Adds up what a token reads: of two rows even lanes have the first, odd ones the second.
    const auto finish = [&](bool stores) {
        float sum = second ? read[R - 1] : read[0];
        if (R == 2) sum += __shfl_xor_sync(ALL, second ? read[0] : read[R - 1], 1);
#pragma unroll
        for (int o = R; o < LANES; o *= 2) sum += __shfl_xor_sync(ALL, sum, o);
        if (!stores) return;
        if (lane < R) *out = sum + (first > 0 ? *out : passed);
        out += inner;
    };
    const auto token = [&](int t, const ScanInputs<S, R, J>& now, ScanInputs<S, R, J>& next) {
        x_at += width, b_at += width, c_at += width;
        if (t + 1 < n) next.load(x_at, b_at, c_at, d);
        // Step sizes of the next 32 tokens, each by a lane.
        if (t % WARP == 0) {
            dts = softplus(a.dt[min(t + int(threadIdx.x % WARP), n - 1) * n_head + head] + bias);
            keep = expf(rate * dts);
        }
        const float dt = __shfl_sync(ALL, dts, t % WARP), keeps = __shfl_sync(ALL, keep, t % WARP);
        finish(t > 0);
#pragma unroll
        for (int r = 0; r < R; r++) read[r] = scan_row(s[r], keeps, dt * now.x[r], now.b, now.c);
        passed = skip * (second ? now.x[R - 1] : now.x[0]);
    };
#pragma unroll 1
    for (int t = 0; t < n; t += 2) {
        token(t, even, odd);
        if (t + 1 < n) token(t + 1, odd, even);
    }
    finish(true);
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int e = S::column(j);
            if (e < d) *reinterpret_cast<float4*>(state + size_t(r) * a.d_state + e) = s[r][j];
        }
    }
}

template <int R> __device__ __forceinline__ void scan_all(const SsmScan& a) {
    if (a.d_state <= 32) {
        scan_columns<8, R, 1>(a, 0);
    } else if (a.d_state <= 64) {
        scan_columns<8, R, 2>(a, 0);
    } else if (a.d_state <= 128) {
        scan_columns<8, R, 4>(a, 0);
    } else {
        // Columns meet only in what is read; a thread adds to what it has written itself.
        for (int first = 0; first < int(a.d_state); first += ScanShare<16, R, 4>::COLUMNS) scan_columns<16, R, 4>(a, first);
    }
}

// The scan, token by token: S = exp(a dt) S + dt x b^T, out = S c + d x, dt = softplus(dt + bias). Rows of a state have nothing to do with each
// other: a few lanes have one or two of them for all tokens. Grid: (n_head * head_dim / rows of a block): SCAN_BLOCK / 8 rows, half as many where
// d_state is more than 128, and two of each where `each` is 2. Block: SCAN_BLOCK.
KERNEL __launch_bounds__(SCAN_BLOCK, 6) ssm_scan(const SsmScan a) {
    if (a.each == 2) {
        scan_all<2>(a);
    } else {
        scan_all<1>(a);
    }
}

struct RmsNormGroups {
    float* x;         // (n, width), changed in place
    const float* up;  // (n, width): silu(x) * up is normed, or null: x
    const float* w;   // (width)
    int8_t* q;        // (n, width), the same quantized, or null; parts are then multiples of 32
    float2* ds;       // (n, width / 32)
    uint32_t width;   // a multiple of the parts, of which there are gridDim.x
    float eps;
};

// x = x / rms(x) * w over each of some parts of a row. Grid: (parts, n). Block: a multiple of 32 threads.
KERNEL __launch_bounds__(1024) rms_norm_groups(const RmsNormGroups a) {
    begin();
    __shared__ float scratch[WARP];
    const int n = a.width / gridDim.x, from = blockIdx.x * n;
    const size_t at = size_t(blockIdx.y) * a.width + from;
    float* x = a.x + at;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float v = x[i];
        if (a.up) x[i] = v = silu(v) * a.up[at + i];
        sum += v * v;
    }
    const float scale = rsqrtf(block_sum(sum, scratch) / float(n) + a.eps);
    // The same elements once more; a warp takes 32 together, so that it can quantize them.
    for (int i0 = threadIdx.x / WARP * WARP; i0 < n; i0 += blockDim.x) {
        const int i = i0 + threadIdx.x % WARP;
        float v = 0.0f;
        if (i < n) x[i] = v = x[i] * scale * a.w[from + i];
        if (a.q) quantize_block(v, a.q + at + i0, a.ds + (at + i0) / WARP);
    }
}
