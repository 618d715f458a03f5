// Gated delta nets (arXiv 2412.06464): norms and gates, and the rule that corrects a state. Their convolution is in conv.cu.
//
// What a layer keeps of the tokens before lies in device memory and is renewed in place. Where a pass begins at position 0 nothing came before
// it; since the position is read from device memory, one recorded launch serves every step.
#include "common.cuh"

struct SplitHeads {
    const float* x;  // (n_elem / head_dim, 2, head_dim)
    float* first;    // (n_elem / head_dim, head_dim)
    float* second;   // likewise
    uint64_t n_elem;
    uint32_t head_dim;
    uint32_t pad;
};

// Takes apart two parts of each head. Grid: (ceil(n_elem / threads)).
KERNEL split_heads(const SplitHeads a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= a.n_elem) return;
    const uint64_t d = a.head_dim, at = i / d * 2 * d + i % d;
    a.first[i] = a.x[at], a.second[i] = a.x[at + d];
}

struct L2Norm {
    float* x;        // (n, stride), of which rows begin with n_head heads
    uint32_t units;  // n * n_head
    uint32_t n_head;
    uint32_t head_dim;
    uint32_t stride;
    float eps;
    uint32_t pad;
};

// x / sqrt(|x|^2 + eps) of each head. Grid: (ceil(units / warps of a block)). A warp does a head.
KERNEL l2_norm_first(const L2Norm a) {
    begin();
    const uint32_t unit = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (unit >= a.units) return;
    float* x = a.x + size_t(unit / a.n_head) * a.stride + unit % a.n_head * a.head_dim;
    const int lane = threadIdx.x % WARP, d = a.head_dim;
    float sum = 0.0f;
    for (int i = lane; i < d; i += WARP) sum += x[i] * x[i];
    const float scale = rsqrtf(warp_sum(sum) + a.eps);
    for (int i = lane; i < d; i += WARP) x[i] *= scale;
}

// What is kept of a state, and how much of a correction is made.
__device__ __forceinline__ float kept(float alpha, float a, float dt) {
    return expf(a * softplus(alpha + dt));
}
__device__ __forceinline__ float corrected(float beta) { return 1.0f / (1.0f + expf(-beta)); }

struct DeltaGates {
    float* alpha;     // (n_elem)
    float* beta;      // (n_elem)
    const float* a;   // (n_head)
    const float* dt;  // (n_head)
    uint32_t n_elem;
    uint32_t n_head;
};

// alpha = exp(a softplus(alpha + dt)), beta = sigmoid(beta). Grid: (ceil(n_elem / threads)).
KERNEL delta_gates(const DeltaGates a) {
    begin();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n_elem) return;
    a.alpha[i] = kept(a.alpha[i], a.a[i % a.n_head], a.dt[i % a.n_head]);
    a.beta[i] = corrected(a.beta[i]);
}

struct DeltaNet {
    const float* qkv;     // (n, width): queries and keys of n_head_k heads each, values of n_head_v
    const float* alpha;   // (n, n_head_v) what is kept of the state
    const float* beta;    // (n, n_head_v) how much of a correction is made
    float* state;         // (n_head_v, head_dim of values, head_dim of keys)
    float* out;           // (n, n_head_v, head_dim)
    const uint32_t* pos;  // (1) position of the first token
    const float* a;       // (n_head_v) as in `DeltaGates`; looked at by gated_delta_step alone
    const float* dt;      // likewise
    uint32_t n;
    uint32_t n_head_k;
    uint32_t n_head_v;
    uint32_t head_dim;      // a multiple of 16, at most 256
    uint32_t width;
    uint32_t side_by_side;  // value heads of a key head are neighbours
    float scale;
    float eps;              // of the norms of queries and keys, likewise
};

constexpr int DELTA_LANES = 8;  // lanes that share a row of a state
constexpr int DELTA_ROWS = 16;  // rows of a block

// A token's query and key, as far as a lane has them, its value of a row, and the gates.
template <int J> struct DeltaInputs {
    float4 q[J], k[J];
    float v, alpha, beta;
    __device__ __forceinline__ void load(const DeltaNet& a, int t, int head_k, int head, int row) {
        const int d = a.head_dim, lane = threadIdx.x % DELTA_LANES;
        const float* x = a.qkv + size_t(t) * a.width;
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int e = 4 * (lane + DELTA_LANES * j);
            q[j] = k[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (e >= d) continue;
            q[j] = *reinterpret_cast<const float4*>(x + head_k * d + e);
            k[j] = *reinterpret_cast<const float4*>(x + (a.n_head_k + head_k) * d + e);
        }
        v = x[2 * a.n_head_k * d + row];
        alpha = a.alpha[size_t(t) * a.n_head_v + head], beta = a.beta[size_t(t) * a.n_head_v + head];
    }
};

__device__ __forceinline__ void add_products(float& sum, const float4& a, const float4& b) {
    sum += a.x * b.x, sum += a.y * b.y, sum += a.z * b.z, sum += a.w * b.w;
}

// The sum over the lanes of a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int o = DELTA_LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(ALL, x, o);
    return x;
}

// J: quadruples of a row that a lane has; head_dim <= 32 J. AHEAD: a token's inputs are fetched while the one before is worked on. RAW: queries and
// keys have not been normed yet, and gates are what they are made of.
template <int J, bool AHEAD, bool RAW> __device__ __forceinline__ void delta_rule(const DeltaNet& a) {
    const int d = a.head_dim, n = a.n, lane = threadIdx.x % DELTA_LANES;
    const int row = blockIdx.x * DELTA_ROWS + threadIdx.x / DELTA_LANES, head = row / d;
    const int head_k = a.side_by_side ? head / int(a.n_head_v / a.n_head_k) : head % int(a.n_head_k);
    float* state = a.state + size_t(row) * d;
    const bool fresh = *a.pos == 0;
    float4 s[J];
#pragma unroll
    for (int j = 0; j < J; j++) {
        const int e = 4 * (lane + DELTA_LANES * j);
        s[j] = fresh || e >= d ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *reinterpret_cast<const float4*>(state + e);
    }
    DeltaInputs<J> now;
    if (AHEAD) now.load(a, 0, head_k, head, row);
#pragma unroll 1
    for (int t = 0; t < n; t++) {
        DeltaInputs<J> next;
        if (AHEAD) {
            if (t + 1 < n) next.load(a, t + 1, head_k, head, row);
        } else {
            now.load(a, t, head_k, head, row);
        }
        // What the state says of key and query before it is corrected, and what the correction will add to the answer.
        float sk = 0.0f, sq = 0.0f, kq = 0.0f;
#pragma unroll
        for (int j = 0; j < J; j++) add_products(sk, s[j], now.k[j]), add_products(sq, s[j], now.q[j]), add_products(kq, now.k[j], now.q[j]);
        sk = row_sum(sk), sq = row_sum(sq), kq = row_sum(kq);
        if (RAW) {
            float kk = 0.0f, qq = 0.0f;
#pragma unroll
            for (int j = 0; j < J; j++) add_products(kk, now.k[j], now.k[j]), add_products(qq, now.q[j], now.q[j]);
            const float of_k = rsqrtf(row_sum(kk) + a.eps), of_q = rsqrtf(row_sum(qq) + a.eps);
            sk *= of_k, sq *= of_q, kq *= of_k * of_q;
#pragma unroll
            for (int j = 0; j < J; j++) now.k[j].x *= of_k, now.k[j].y *= of_k, now.k[j].z *= of_k, now.k[j].w *= of_k;
            now.alpha = kept(now.alpha, a.a[head], a.dt[head]), now.beta = corrected(now.beta);
        }
        const float change = now.beta * (now.v - now.alpha * sk);
        if (lane == 0) a.out[size_t(t) * a.n_head_v * d + row] = a.scale * (now.alpha * sq + change * kq);
#pragma unroll
        for (int j = 0; j < J; j++) {
            s[j].x = now.alpha * s[j].x + change * now.k[j].x, s[j].y = now.alpha * s[j].y + change * now.k[j].y;
            s[j].z = now.alpha * s[j].z + change * now.k[j].z, s[j].w = now.alpha * s[j].w + change * now.k[j].w;
        }
        if (AHEAD) now = next;
    }
#pragma unroll
    for (int j = 0; j < J; j++) {
        const int e = 4 * (lane + DELTA_LANES * j);
        if (e < d) *reinterpret_cast<float4*>(state + e) = s[j];
    }
}

// The gated delta rule, token by token: S = alpha S, S += beta (v - S k) k^T, out = scale S q. Rows of a state have nothing to do with each
// other: eight lanes have one for all tokens. Grid: (n_head_v * head_dim / DELTA_ROWS). Block: DELTA_ROWS * DELTA_LANES.
KERNEL __launch_bounds__(DELTA_ROWS* DELTA_LANES, 4) gated_delta_net(const DeltaNet a) {
    begin();
    if (a.head_dim <= 32) {
        delta_rule<1, true, false>(a);
    } else if (a.head_dim <= 64) {
        delta_rule<2, true, false>(a);
    } else if (a.head_dim <= 128) {
        delta_rule<4, true, false>(a);
    } else {
        delta_rule<8, false, false>(a);
    }
}

// The same of one token whose queries and keys have not been normed and whose gates have not been made: what comes before the rule in a model, in
// one launch with it.
KERNEL __launch_bounds__(DELTA_ROWS* DELTA_LANES, 4) gated_delta_step(const DeltaNet a) {
    begin();
    if (a.head_dim <= 64) {
        delta_rule<2, false, true>(a);
    } else if (a.head_dim <= 128) {
        delta_rule<4, false, true>(a);
    } else {
        delta_rule<8, false, true>(a);
    }
}

struct GatedNorm {
    const float* x;  // (units, head_dim)
    const float* w;  // (head_dim)
    float* gate;     // (units, head_dim), changed in place
    int8_t* q;       // (units, head_dim), the same quantized, or null; head_dim is then a multiple of 32
    float2* ds;      // (units, head_dim / 32)
    uint32_t units;
    uint32_t head_dim;
    float eps;
    uint32_t pad;
};

// gate = silu(gate) * x / rms(x) * w of each head. Grid: (ceil(units / warps of a block)). A warp does a head.
KERNEL gated_norm(const GatedNorm a) {
    begin();
    const uint32_t unit = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (unit >= a.units) return;
    const int lane = threadIdx.x % WARP, d = a.head_dim;
    const size_t at = size_t(unit) * d;
    float sum = 0.0f;
    for (int i = lane; i < d; i += WARP) sum += a.x[at + i] * a.x[at + i];
    const float scale = rsqrtf(warp_sum(sum) / float(d) + a.eps);
    for (int i0 = 0; i0 < d; i0 += WARP) {
        const int i = i0 + lane;
        float v = 0.0f;
        if (i < d) a.gate[at + i] = v = silu(a.gate[at + i]) * (a.x[at + i] * scale * a.w[i]);
        if (a.q) quantize_block(v, a.q + at + i0, a.ds + (at + i0) / WARP);
    }
}
