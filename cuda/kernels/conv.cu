// Causal convolutions along the tokens, every channel by itself: before delta nets and state spaces, and between the gates of LFM2
// (arXiv 2511.23404).
//
// The last inputs of a layer lie in device memory and are renewed in place. Where a pass begins at position 0 nothing came before it; since
// the position is read from device memory, one recorded launch serves every step.
#include "common.cuh"

struct SsmConv {
    const float* x;       // (n, width)
    const float* w;       // (d_conv, width), the oldest token first
    const float* bias;    // (width), or null
    float* past;          // (d_conv - 1, width) inputs of before the pass, the oldest first; its last ones when it is over
    const uint32_t* pos;  // (1) position of the first token
    const float* before;  // (n, width) factors of the inputs; looked at by short_conv alone
    const float* behind;  // (n, width) factors of the results, likewise
    float* out;           // (n, width), other memory than x
    int8_t* q;            // (n, width) the same quantized, or null; width is then a multiple of 32; written by short_conv alone
    float2* ds;           // (n, width / 32)
    uint32_t n;
    uint32_t width;
    uint32_t d_conv;      // 2 to MAX_CONV
    uint32_t pad;
};

constexpr int MAX_CONV = 8;     // tokens that a convolution sees
constexpr int CONV_TOKENS = 8;  // tokens of a thread
static_assert(CONV_TOKENS >= MAX_CONV - 1, "only the first tokens look back to before the pass");

// GATED: inputs and results have factors; otherwise silu is taken of results.
// A thread has a channel of some tokens; that of the first keeps the last inputs as well.
template <bool GATED> __device__ __forceinline__ void convolve(const SsmConv& a) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, t0 = blockIdx.y * CONV_TOKENS, n = a.n, d = a.d_conv;
    const size_t width = a.width;
    if (c >= int(width)) return;
    const bool fresh = *a.pos == 0;
    const auto here = [&](int t) { return GATED ? a.before[t * width + c] * a.x[t * width + c] : a.x[t * width + c]; };
    const auto input = [&](int t) { return t >= 0 ? here(t) : fresh ? 0.0f : a.past[(t + d - 1) * width + c]; };
    const float bias = a.bias ? a.bias[c] : 0.0f;
    // Weights, and inputs behind the one before the first token; those that the convolution does not see are zero.
    float w[MAX_CONV], seen[MAX_CONV];
#pragma unroll
    for (int i = 0; i < MAX_CONV; i++) {
        const int tap = i - (MAX_CONV - d);
        w[i] = tap >= 0 ? a.w[tap * width + c] : 0.0f;
        seen[i] = tap > 0 ? input(t0 - (MAX_CONV - i)) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < CONV_TOKENS; j++) {
        const int t = t0 + j;
        if (t >= n) break;
#pragma unroll
        for (int i = 0; i + 1 < MAX_CONV; i++) seen[i] = seen[i + 1];
        seen[MAX_CONV - 1] = here(t);
        float sum = bias;
#pragma unroll
        for (int i = 0; i < MAX_CONV; i++) sum += w[i] * seen[i];
        const size_t at = t * width + c;
        const float y = GATED ? a.behind[at] * sum : silu(sum);
        a.out[at] = y;
        // A warp's channels are a block: they are all there.
        if (GATED && a.q) quantize_block(y, a.q + at - threadIdx.x % WARP, a.ds + at / WARP);
    }
    if (blockIdx.y != 0) return;
    float last[MAX_CONV - 1];
#pragma unroll
    for (int i = 0; i < MAX_CONV - 1; i++) last[i] = i < d - 1 ? input(n - (d - 1) + i) : 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_CONV - 1; i++) {
        if (i < d - 1) a.past[i * width + c] = last[i];
    }
}

// out = silu(conv(x) + bias). Grid: (ceil(width / threads), ceil(n / CONV_TOKENS)).
KERNEL __launch_bounds__(128) ssm_conv(const SsmConv a) {
    begin();
    convolve<false>(a);
}

// out = behind * (conv(before * x) + bias), and the same quantized. The same grid.
KERNEL __launch_bounds__(128) short_conv(const SsmConv a) {
    begin();
    convolve<true>(a);
}
