// Mixture of experts: choosing experts and adding up what they say. The experts' matrices are mat-vecs with a column for each
// pair of token and chosen expert, if they are not multiplied with many columns at once (experts.cu).
#include "matvec.cuh"

struct MoeRouter {
    MatVec m;             // of the router: one segment, (n_expert) rows, whose outputs are logits (n, n_expert); a column is a token
    uint32_t* ids;        // (n, n_used) chosen experts, best first
    float* weights;       // (n, n_used)
    uint32_t* arrived;    // (n) zeros, and zeros again behind it
    const float* bias;    // (n_expert), added where experts are chosen, or null
    uint32_t n_used;
    uint32_t norm;        // the weights of a token are made to sum to one
    uint32_t sigmoid;     // the weights are sigmoids, each of its logit
    uint32_t n_group;     // groups of experts that lie side by side, at most 64
    uint32_t n_group_used;
    float scale;          // of the weights
};

// A group's worth, and the group of the largest for all lanes; of equals the first. `open`: those that are taken already.
__device__ __forceinline__ int best_group(const float* worth, int n_group, uint64_t open) {
    const int lane = threadIdx.x % WARP;
    float best = -INFINITY;
    int id = n_group;
    for (int i = 0; i < 2; i++) {
        const int g = lane + i * WARP;
        if (g < n_group && !(open >> g & 1) && worth[i] > best) best = worth[i], id = g;
    }
    for (int o = WARP / 2; o > 0; o /= 2) {
        const float other = __shfl_xor_sync(ALL, best, o);
        const int other_id = __shfl_xor_sync(ALL, id, o);
        if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
    // Where none is a number any will do that is not taken.
    for (int g = 0; id >= n_group; g++) {
        if (!(open >> g & 1)) id = g;
    }
    return id;
}

// Leaves the experts of the groups whose two best have the largest sum, by one warp.
__device__ __forceinline__ void close_groups(const MoeRouter& a, float* left, int n) {
    const int lane = threadIdx.x % WARP, n_group = a.n_group, size = n / n_group;
    float worth[2];
    for (int i = 0; i < 2; i++) {
        const int g = lane + i * WARP;
        float first = -INFINITY, second = -INFINITY;
        for (int e = 0; g < n_group && e < size; e++) {
            const float x = left[g * size + e];
            if (x > first) second = first, first = x;
            else if (x > second) second = x;
        }
        worth[i] = first + second;
    }
    uint64_t open = 0;
    for (int u = 0; u < int(a.n_group_used); u++) open |= uint64_t(1) << best_group(worth, n_group, open);
    __syncwarp();
    for (int i = lane; i < n; i += WARP) {
        if (!(open >> (i / size) & 1)) left[i] = -INFINITY;
    }
    __syncwarp();
}

// Softmax over all experts or a sigmoid of each, then the best n_used; equal ones by index. By one warp; `left`: n_expert floats of shared
// memory. Where nothing else decides, logits are compared and not what is made of them.
__device__ __forceinline__ void choose(const MoeRouter& a, const float* x, int token, float* left) {
    const int lane = threadIdx.x % WARP, n = a.m.seg[0].n_out;
    float mx = -INFINITY;
    for (int i = lane; i < n; i += WARP) left[i] = look(x + i), mx = fmaxf(mx, left[i]);
    mx = warp_max(mx);
    float all = 0.0f;
    for (int i = lane; i < n; i += WARP) all += __expf(left[i] - mx);
    all = warp_sum(all);
    const bool plain = !a.sigmoid && !a.bias && a.n_group_used >= a.n_group;
    const auto weight = [&](float x) { return a.sigmoid ? 1.0f / (1.0f + __expf(-x)) : __expf(x - mx) / all; };
    for (int i = lane; !plain && i < n; i += WARP) left[i] = weight(left[i]) + (a.bias ? a.bias[i] : 0.0f);
    __syncwarp();
    if (a.n_group_used < a.n_group) close_groups(a, left, n);
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
        if (id >= n) id = u;  // logits that are not numbers: any expert will do, but it has to be one
        const float w = weight(plain ? best : look(x + id));
        chosen += w;
        __syncwarp();
        if (lane == 0) {
            left[id] = -INFINITY;
            a.ids[size_t(token) * a.n_used + u] = id;
            a.weights[size_t(token) * a.n_used + u] = w;
        }
        __syncwarp();
    }
    if ((a.norm || a.scale != 1.0f) && lane == 0) {
        // What a half-precision number can just hold, as in ggml: all sigmoids may be as good as zero.
        const float by = a.norm ? fmaxf(chosen, 6.1035156e-5f) : 1.0f;
        for (int u = 0; u < int(a.n_used); u++) {
            float& w = a.weights[size_t(token) * a.n_used + u];
            w = w / by * a.scale;
        }
    }
}

// Logits of the router, and the experts that they choose: the last block of a token to be through does that.
// Grid: (ceil(n_expert / ROWS), n). Block: 32 * (1 .. MAX_WARPS). Dynamic shared memory: n_expert floats.
KERNEL __launch_bounds__(WARP* MAX_WARPS) moe_router(const MoeRouter a) {
    begin();
    const Segment& g = a.m.seg[0];
    const int token = blockIdx.y, row = blockIdx.x * ROWS, n_in = a.m.n_in, n = g.n_out;
    const Act x = {a.m.xf + size_t(token) * n_in, a.m.xq + size_t(token) * n_in, a.m.xds + size_t(token) * (n_in / 32)};
    const uint8_t* r0 = g.w + row * g.row_bytes;
    float acc[ROWS] = {}, y[ROWS];
    add_products(g.type, r0, row + 1 < n ? r0 + g.row_bytes : r0, n_in, x, acc);
    block_rows(acc, y);
    if (threadIdx.x >= WARP) return;
    DYNAMIC_SHARED(float, left);
    float* logits = g.out + size_t(token) * n;
    uint32_t before = 0;
    if (threadIdx.x == 0) {
        for (int r = 0; r < ROWS && row + r < n; r++) logits[row + r] = y[r] + (g.bias ? g.bias[row + r] : 0.0f);
        before = count_up(a.arrived + token);
    }
    if (__shfl_sync(ALL, before, 0) + 1 < gridDim.x) return;
    __syncwarp();  // what the first lane has seen of other blocks is there for all of them
    if (threadIdx.x == 0) a.arrived[token] = 0;
    choose(a, logits, token, left);
}

// Experts by logits that are there already, those of the segment. Grid: (n). Block: 32. Dynamic shared memory: n_expert floats.
KERNEL __launch_bounds__(WARP) moe_choose(const MoeRouter a) {
    begin();
    DYNAMIC_SHARED(float, left);
    choose(a, a.m.seg[0].out + size_t(blockIdx.x) * a.m.seg[0].n_out, blockIdx.x, left);
}

struct MoeDown {
    MatVec m;              // of the experts: one segment, whose outputs are sums (n, n_out); a column is a token and a chosen expert
    const float* weights;  // (n, n_used)
    uint32_t n_used;
    uint32_t add;          // sums are added to what is there
};

// out = sum over the chosen experts of weight * (w x + bias), or added to it.
// Grid: (ceil(n_out / ROWS), n). Block: 32 * (1 .. MAX_WARPS).
KERNEL __launch_bounds__(WARP* MAX_WARPS, 4) moe_down(const MoeDown a) {
    begin();
    const Segment& g = a.m.seg[0];
    const int token = blockIdx.y, row = blockIdx.x * ROWS, n_in = a.m.n_in, n = g.n_out;
    const bool two = row + 1 < n;  // an odd last row is computed twice and stored once
    float acc[ROWS] = {}, y[ROWS];
    for (int u = 0; u < int(a.n_used); u++) {
        const size_t col = size_t(token) * a.n_used + u, expert = a.m.ids[col];
        const float weight = a.weights[col];
        const uint8_t* r0 = g.w + expert * g.expert_bytes + row * g.row_bytes;
        const Act x = {a.m.xf + col * n_in, a.m.xq + col * n_in, a.m.xds + col * (n_in / 32)};
        float part[ROWS] = {};
        add_products(g.type, r0, two ? r0 + g.row_bytes : r0, n_in, x, part);
        acc[0] += weight * part[0], acc[1] += weight * part[1];
    }
    block_rows(acc, y);
    const int r = row + threadIdx.x;
    if (threadIdx.x >= ROWS || r >= n) return;
    float sum = threadIdx.x == 0 ? y[0] : y[1];
    for (int u = 0; g.bias && u < int(a.n_used); u++) {
        const size_t col = size_t(token) * a.n_used + u;
        sum += a.weights[col] * g.bias[size_t(a.m.ids[col]) * n + r];
    }
    float* out = g.out + size_t(token) * n + r;
    *out = a.add ? *out + sum : sum;
}

struct MoeSum {
    const float* y;        // (n, n_used, width)
    const float* weights;  // (n, n_used)
    float* acc;            // (n, width)
    uint32_t n_used;
    uint32_t width;
    uint32_t add;          // sums are added to what is there
    uint32_t pad;
};

// acc = sum over the chosen experts of weight * y, or added to it. Grid: (ceil(width / threads), n).
KERNEL moe_sum(const MoeSum a) {
    begin();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= int(a.width)) return;
    float sum = 0.0f;
    for (int u = 0; u < int(a.n_used); u++) {
        const size_t c = size_t(blockIdx.y) * a.n_used + u;
        sum += a.weights[c] * a.y[c * a.width + i];
    }
    float* acc = a.acc + size_t(blockIdx.y) * a.width + i;
    *acc = a.add ? *acc + sum : sum;
}
