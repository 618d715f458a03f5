// Attention of a batch of a prompt on tensor cores: a warp takes eight queries that share a key/value head (the heads of its group, of one or
// several tokens) over all pages that the last of them sees. Heads that are wider
// than MAX_D go through shared memory (attend_wide.cuh); attention.cu has the same for heads of any width.
#include "attend_tiers.cuh"
#include "attend_wide.cuh"

constexpr int BATCH_WARPS = 4;

struct AttentionBatch {
    const float* q;           // (n, n_head, head_dim)
    const uint2* pages;       // (n_pages) slot, first position, in position order
    const uint32_t* n_pages;  // (1)
    const uint32_t* pos;      // (1) position of the first token
    float* out;               // (n, n_head, head_dim)
    const float* sinks;       // (n_head) or null
    Tier tiers[MAX_TIERS];
    uint32_t n;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_dim;        // a multiple of 8, at most MAX_D, or MAX_WIDE
    float scale;
    uint32_t window;          // tokens that a query sees, itself included, or NO_WINDOW
    float cap;                // bound of the scores, or 0
    uint32_t pad;
};

// Rows of a page at `first` that a query at `pos` sees, as `share_out` has them.
template <bool BOUNDED> __device__ __forceinline__ auto rows_seen(const AttentionBatch& a, int pos, int first) {
    const int end = min(PAGE, pos - first + 1), from = max(0, pos - int(a.window - 1) - first);
    if constexpr (BOUNDED) return Seen{from, max(0, end - from), a.cap};
    else return end;
}

// BOUNDED: there are windows or bounds of scores.
template <int NC, int NJ, bool EXACT, bool TIERS, bool BOUNDED> __device__ __forceinline__ void attend_batch(const AttentionBatch& a, Queries& q) {
    const int d = a.head_dim, group = a.n_head / a.n_head_kv, kv = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int all = a.n * group, q0 = (blockIdx.y * BATCH_WARPS + warp) * UNIT, nq = min(UNIT, all - q0), g = lane / 4, t = lane % 4;
    if (nq <= 0) return;
    auto row = [&](int i) { return (size_t((q0 + i) / group) * a.n_head + kv * group + (q0 + i) % group) * d; };
    for (int i = 0; i < UNIT; i++) {
        for (int e = lane; e < MAX_D; e += WARP) q.put(i, e, i < nq && e < d ? a.scale * a.q[row(i) + e] : 0.0f);
    }
    __syncwarp();
    const int n_pages = *a.n_pages, pos0 = *a.pos, last = pos0 + (q0 + nq - 1) / group, seen = pos0 + min(q0 + g, all - 1) / group;
    const Pool pool = {reinterpret_cast<const uint16_t*>(a.tiers[0].k), reinterpret_cast<const uint16_t*>(a.tiers[0].v), int(a.n_head_kv), d};
    Sums<NJ> sum;
    for (int p = BOUNDED ? first_in_window(n_pages, a.n, a.window) : 0; p < n_pages; p++) {
        const uint2 entry = a.pages[p];
        if (int(entry.y) > last) break;
        if (BOUNDED && pos0 + q0 / group - int(entry.y + PAGE - 1) >= int(a.window)) continue;
        const auto rows = rows_seen<BOUNDED>(a, seen, entry.y);
        float2 ml;
        if (TIERS) {
            __shared__ __align__(16) uint32_t pairs[BATCH_WARPS][MAX_D];
            const int n_kv = a.n_head_kv, width = EXACT ? 32 * NC : d;
            attend_page<NC, NJ, EXACT>(a.tiers, n_kv, kv, width, q, pairs[warp], entry, min(PAGE, last - int(entry.y) + 1), rows, sum, ml);
            continue;
        }
        PageOf<NC, NJ, EXACT> page;
        page.load(pool, entry.x, kv, min(PAGE, last - int(entry.y) + 1));
        attend_values(page, attend_keys<NC>(page, q, rows, sum, ml), sum);
    }
    float inv = 1.0f / sum.l;
    if (a.sinks) {
        const float sink = a.sinks[kv * group + min(q0 + g, all - 1) % group], m = fmaxf(sum.m, sink);
        // What has been summed up is relative to its own maximum.
        inv = __expf(sum.m - m) / (sum.l * __expf(sum.m - m) + __expf(sink - m));
    }
    const float f[2] = {__shfl_sync(ALL, inv, 8 * t), __shfl_sync(ALL, inv, 8 * t + 4)};
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (2 * t + j >= nq) continue;
        float* out = a.out + row(2 * t + j);
#pragma unroll
        for (int i = 0; i < 4 * NJ; i++) {
            const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
            if (e < d) out[e] = f[j] * sum.o[i][j], out[e + 1] = f[j] * sum.o[i][j + 2];
        }
    }
}

template <bool TIERS, bool BOUNDED> __device__ __forceinline__ void attend_any(const AttentionBatch& a) {
    begin();
    __shared__ __align__(16) Queries queries[BATCH_WARPS];
    Queries& q = queries[threadIdx.x / WARP];
    if (a.head_dim == 64) {
        attend_batch<2, 1, true, TIERS, BOUNDED>(a, q);
    } else if (a.head_dim == 128) {
        attend_batch<4, 2, true, TIERS, BOUNDED>(a, q);
    } else {
        attend_batch<4, 2, false, TIERS, BOUNDED>(a, q);
    }
}

// Grid: (n_head_kv, ceil(n * n_head / n_head_kv / UNIT / BATCH_WARPS)). Block: 32 * BATCH_WARPS.
KERNEL __launch_bounds__(WARP* BATCH_WARPS) attention_batch(const AttentionBatch a) { attend_any<false, false>(a); }
// The same of pages of any tier and type.
KERNEL __launch_bounds__(WARP* BATCH_WARPS) attention_batch_tiers(const IN_PLACE AttentionBatch a) { attend_any<true, false>(a); }
// The same with windows and bounds of scores, which the others ignore.
KERNEL __launch_bounds__(WARP* BATCH_WARPS) attention_batch_bounded(const AttentionBatch a) { attend_any<false, true>(a); }
KERNEL __launch_bounds__(WARP* BATCH_WARPS) attention_batch_bounded_tiers(const IN_PLACE AttentionBatch a) { attend_any<true, true>(a); }

constexpr int MAX_WIDE = 256;

// Heads of up to MAX_WIDE elements, pages of any tier and type, windows and bounds. Grid: (ceil(n * n_head / n_head_kv / WIDE_ROWS), n_head_kv).
// Block: 32 * WIDE_WARPS.
KERNEL __launch_bounds__(WARP* WIDE_WARPS, 2) attention_wide(const IN_PLACE AttentionBatch a) {
    begin();
    WideAttention w = {};
    w.q = a.q, w.pages = a.pages, w.n_pages = a.n_pages, w.pos = a.pos, w.tiers = a.tiers, w.out = a.out, w.sinks = a.sinks;
    w.n = a.n, w.n_head = a.n_head, w.n_kv = a.n_head_kv, w.d = w.dv = a.head_dim, w.n_split = 1;
    w.kv = blockIdx.y, w.tile = blockIdx.x, w.scale = a.scale, w.window = a.window, w.cap = a.cap;
    attend_wide<false>(w);
}
