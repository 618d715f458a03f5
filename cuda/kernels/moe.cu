// Mixture of experts: choosing experts and adding up what they say. The experts' matrices are mat-vecs with a column for each
// pair of token and chosen expert.
#include "types.cuh"

struct MoeRoute {
    const float* logits;  // (n, n_expert) of the router
    uint32_t* ids;        // (n, n_used) chosen experts, best first
    float* weights;       // (n, n_used)
    uint32_t n_expert;
    uint32_t n_used;
    uint32_t norm;        // the weights of a token are made to sum to one
    uint32_t pad;
};

// Softmax over all experts, then the best n_used; equal ones by index. Grid: (n). Block: 32.
// Dynamic shared memory: n_expert floats.
KERNEL moe_route(const MoeRoute a) {
    begin();
    DYNAMIC_SHARED(float, left);  // logits of the experts not yet chosen
    const int lane = threadIdx.x, n = a.n_expert;
    const float* x = a.logits + size_t(blockIdx.x) * n;
    float mx = -INFINITY;
    for (int i = lane; i < n; i += WARP) left[i] = x[i], mx = fmaxf(mx, x[i]);
    mx = warp_max(mx);
    float all = 0.0f;
    for (int i = lane; i < n; i += WARP) all += __expf(x[i] - mx);
    all = warp_sum(all);
    __syncwarp();
    float chosen = 0.0f;
    for (int u = 0; u < int(a.n_used); u++) {
        float best = -INFINITY;
        int id = n;
        for (int i = lane; i < n; i += WARP) {
            if (left[i] > best) best = left[i], id = i;
        }
        for (int o = WARP / 2; o > 0; o /= 2) {
            const float other = __shfl_xor_sync(ALL, best, o);
            const int other_id = __shfl_xor_sync(ALL, id, o);
            if (other > best || (other == best && other_id < id)) best = other, id = other_id;
        }
        if (id >= n) id = u;  // logits that are not numbers choose nobody
        const float w = __expf(best - mx) / all;
        chosen += w;
        __syncwarp();
        if (lane == 0) {
            left[id] = -INFINITY;
            a.ids[size_t(blockIdx.x) * a.n_used + u] = id;
            a.weights[size_t(blockIdx.x) * a.n_used + u] = w;
        }
        __syncwarp();
    }
    if (a.norm && lane == 0) {
        for (int u = 0; u < int(a.n_used); u++) a.weights[size_t(blockIdx.x) * a.n_used + u] /= chosen;
    }
}

struct MoeSum {
    const float* y;        // (n, n_used, width)
    const float* weights;  // (n, n_used)
    float* acc;            // (n, width)
    uint32_t n_used;
    uint32_t width;
};

// acc += sum over the chosen experts of weight * y. Grid: (ceil(width / threads), n).
KERNEL moe_sum(const MoeSum a) {
    begin();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= int(a.width)) return;
    float sum = 0.0f;
    for (int u = 0; u < int(a.n_used); u++) {
        const size_t c = size_t(blockIdx.y) * a.n_used + u;
        sum += a.weights[c] * a.y[c * a.width + i];
    }
    a.acc[size_t(blockIdx.y) * a.width + i] += sum;
}
