// The largest logits of a row, and a draw among them: a few hundred bytes for the host instead of a row of half a megabyte, and the next step
// can begin with the token before the host has seen it.
//
// One block, two passes over the row, which is in the L2 cache: the first finds a number that at least k logits reach, the second collects
// those that do.
#include "common.cuh"

constexpr int MAX_TOP = 128;
// Threads that share a maximum in the first pass, and logits that the second may find: if there are more (fewer than k groups of threads
// have numbers at all, say), the host is told so.
constexpr int DRAW_SHARE = 4, DRAW_FOUND = 1024;

struct Draw {
    const float* logits;  // (n_vocab)
    uint32_t* next;       // (1) the token that was drawn; left alone if none was
    uint64_t* out;        // (1 + top_k) in the host's memory: how many, or NOBODY, and the token above; then keys, best first
    uint32_t n_vocab;
    uint32_t top_k;       // 1 .. MAX_TOP
    float top_p;
    float min_p;
    float inv_temp;
    float lot;            // 0 .. 1
};

// Grid: (1). Block: 128 .. 1024, MAX_TOP * DRAW_SHARE or more.
KERNEL __launch_bounds__(1024) draw(const Draw a) {
    begin();
    __shared__ uint64_t keys[DRAW_FOUND], sorted[MAX_TOP];
    __shared__ float weight[2][MAX_TOP];  // at temperature 1, and at that of the draw
    __shared__ uint64_t least;
    __shared__ uint32_t n_found;
    const int n = a.n_vocab, t = threadIdx.x, k = a.top_k, n_group = blockDim.x / DRAW_SHARE;
    auto each = [&](auto take) {
        const float4* four = reinterpret_cast<const float4*>(a.logits);
#pragma unroll 4
        for (int i = t; i < n / 4; i += blockDim.x) {
            const float4 x = four[i];
            take(logit_key(x.x, 4 * i)), take(logit_key(x.y, 4 * i + 1)), take(logit_key(x.z, 4 * i + 2)), take(logit_key(x.w, 4 * i + 3));
        }
        if (t < n % 4) take(logit_key(a.logits[n / 4 * 4 + t], n / 4 * 4 + t));
    };
    uint64_t best = 0;
    each([&](uint64_t key) { best = key > best ? key : best; });
    for (int o = 1; o < DRAW_SHARE; o *= 2) {
        const uint64_t other = __shfl_xor_sync(ALL, best, o);
        best = other > best ? other : best;
    }
    if (t % DRAW_SHARE == 0) keys[t / DRAW_SHARE] = best;
    if (t == 0) least = 1, n_found = 0;
    __syncthreads();
    // How many of `keys` are larger than one of them. Keys differ, except those that stand for no number.
    auto rank = [&](uint64_t key, int n_key) {
        int r = 0;
        for (int i = 0; i < n_key; i++) r += keys[i] > key;
        return r;
    };
    if (t < n_group && keys[t] > 0 && rank(keys[t], n_group) == k - 1) least = keys[t];
    __syncthreads();
    const uint64_t from = least;
    each([&](uint64_t key) {
        if (key < from) return;
        const uint32_t i = count_in_block(&n_found);
        if (i < DRAW_FOUND) keys[i] = key;
    });
    __syncthreads();
    const int found = n_found, n_top = min(k, found);
    if (found == 0 || found > DRAW_FOUND) {
        if (t == 0) a.out[0] = uint64_t(NOBODY) << 32 | (found ? NOBODY : 0);
        return;
    }
    for (int i = t; i < found; i += blockDim.x) {
        const int r = rank(keys[i], found);
        if (r < n_top) sorted[r] = keys[i];
    }
    __syncthreads();
    if (t < n_top) {
        const float below = key_logit(sorted[t]) - key_logit(sorted[0]);
        weight[0][t] = __expf(below);
        weight[1][t] = __expf(below * a.inv_temp);
        a.out[1 + t] = sorted[t];
    }
    __syncthreads();
    if (t > 0) return;
    // The shortest beginning with enough probability, without what is too unlikely.
    float all = 0.0f, sum = 0.0f;
    for (int i = 0; i < n_top; i++) all += weight[0][i];
    int kept = 0;
    while (kept < n_top && (kept == 0 || a.top_p >= 1.0f || sum + 1e-6f * all < a.top_p * all)) sum += weight[0][kept++];
    while (kept > 1 && weight[0][kept - 1] < a.min_p) kept--;
    sum = 0.0f;
    for (int i = 0; i < kept; i++) sum += weight[1][i];
    int chosen = 0;
    float below = weight[1][0];
    while (chosen + 1 < kept && below <= a.lot * sum) below += weight[1][++chosen];
    const uint32_t token = key_token(sorted[chosen]);
    *a.next = token;
    a.out[0] = uint64_t(token) << 32 | uint32_t(n_top);
}
