// Latent attention (DeepSeek-V2, arXiv 2405.04434): all heads share one key of a token, which begins with what values are made of. Products of
// heads with matrices of their own, rotation of what keys and queries end with, and attention.
#include "attend_wide.cuh"
#include "matvec.cuh"

struct CopyHeads {
    const float* x;  // (units, x_next)
    float* out;      // (units, out_next)
    uint32_t units;
    uint32_t x_next;
    uint32_t out_next;
    uint32_t x_at;   // first element of x that is copied
    uint32_t out_at;
    uint32_t n;      // elements of a unit that are
};

// Parts of heads to where other heads have them. Grid: (ceil(units * n / threads)).
KERNEL copy_heads(const CopyHeads a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, unit = i / a.n, e = i % a.n;
    if (unit < a.units) a.out[unit * a.out_next + a.out_at + e] = a.x[unit * a.x_next + a.x_at + e];
}

struct HeadsVec {
    MatVec m;           // one segment, a column for each head, whose matrix is that of the expert of its number
    uint32_t x_next;    // elements from one head's input to the next
    uint32_t out_next;  // and of outputs
};

// A matrix for each head with the head's part of one token. Grid: (ceil(n_out / ROWS), n_head). Block: 32 * (1 .. MAX_WARPS).
KERNEL __launch_bounds__(WARP* MAX_WARPS, 4) mul_mat_vec_heads(const HeadsVec a) {
    begin();
    const Segment& g = a.m.seg[0];
    const int head = blockIdx.y, row = blockIdx.x * ROWS, n_in = a.m.n_in, n_out = g.n_out;
    const Act x = {a.m.xf + size_t(head) * a.x_next, a.m.xq + size_t(head) * n_in, a.m.xds + size_t(head) * (n_in / 32)};
    const uint8_t* r0 = g.w + head * g.expert_bytes + row * g.row_bytes;
    float acc[ROWS] = {}, y[ROWS];
    // An odd last row is computed twice and stored once.
    add_products(g.type, r0, row + 1 < n_out ? r0 + g.row_bytes : r0, n_in, x, acc);
    block_rows(acc, y);
    const int r = row + threadIdx.x;
    if (threadIdx.x < ROWS && r < n_out) g.out[size_t(head) * a.out_next + r] = threadIdx.x == 0 ? y[0] : y[1];
}

struct RotateEnds {
    float* q;                // (n, n_head, head_dim), rotated in place
    float* k;                // (n, head_dim), likewise if pool is null
    const float2* rope_q;    // (n, head_dim / 2) cosine and sine for queries, of which the first n_rot / 2 count, or null
    const float2* rope_k;    // likewise for keys
    uint16_t* pool;          // (slots, PAGE, head_dim) f16, or null
    const uint32_t* places;  // (n) slot * PAGE + row
    uint32_t n_head;
    uint32_t head_dim;
    uint32_t n_rot;          // elements that rotate, the last ones; even
    uint32_t neox;           // 0: neighbours are pairs; else elements that are half of n_rot apart
};

// Rotation of the ends of queries and keys, and keys into their slots. Grid: (ceil((n_head + 1) / warps of a block), n). A warp does a head.
KERNEL rotate_ends(const RotateEnds a) {
    begin();
    const int head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int t = blockIdx.y, d = a.head_dim, half = a.n_rot / 2, still = d - 2 * half, n_head = a.n_head;
    if (head > n_head) return;
    const bool is_q = head < n_head;
    float* x = is_q ? a.q + (size_t(t) * n_head + head) * d : a.k + size_t(t) * d;
    const float2* rope = is_q ? a.rope_q : a.rope_k;
    uint16_t* pool = is_q || !a.pool ? nullptr : a.pool + size_t(a.places[t]) * d;
    for (int i = lane; pool && i < still; i += WARP) pool[i] = float_to_half(x[i]);
    for (int i = lane; i < half; i += WARP) {
        const int i0 = still + (a.neox ? i : 2 * i), i1 = a.neox ? i0 + half : i0 + 1;
        float x0 = x[i0], x1 = x[i1];
        if (rope) {
            const float2 cs = rope[size_t(t) * (d / 2) + i];
            const float y0 = x0 * cs.x - x1 * cs.y, y1 = x0 * cs.y + x1 * cs.x;
            x0 = y0, x1 = y1;
        }
        if (pool) {
            pool[i0] = float_to_half(x0), pool[i1] = float_to_half(x1);
        } else {
            x[i0] = x0, x[i1] = x1;
        }
    }
}

struct LatentAttention {
    const float* q;           // (n, n_head, head_dim)
    const uint2* pages;       // (n_pages) slot, first position, in position order
    const uint32_t* n_pages;  // (1)
    const uint32_t* pos;      // (1) position of the first token
    float* out;               // (n, n_head, head_dim_v); written if part is null
    float* part;              // (n_head, splits, head_dim_v) sums not yet normalised, or null; then n is 1
    float2* part_ml;          // (n_head, splits) maximum and sum of exponentials
    float2* page_ml;          // (n_head, max_pages) the same of each page, or null
    Tier tiers[MAX_TIERS];    // keys; there are no values
    uint32_t n;
    uint32_t n_head;
    uint32_t head_dim;        // even, at most MAX_LATENT
    uint32_t head_dim_v;      // at most head_dim and MAX_LATENT_V
    uint32_t max_pages;
    float scale;
};

constexpr int MAX_LATENT = 576, MAX_LATENT_V = 512;

// Attention over latent keys. Grid: (ceil(n * n_head / WIDE_ROWS), splits); splits is 1 where part is null. Block: 32 * WIDE_WARPS.
KERNEL __launch_bounds__(WARP* WIDE_WARPS, 2) attention_latent(const IN_PLACE LatentAttention a) {
    begin();
    WideAttention w = {};
    w.q = a.q, w.pages = a.pages, w.n_pages = a.n_pages, w.pos = a.pos, w.tiers = a.tiers;
    w.out = a.out, w.part = a.part, w.part_ml = a.part_ml, w.page_ml = a.page_ml;
    w.n = a.n, w.n_head = a.n_head, w.n_kv = 1, w.d = a.head_dim, w.dv = a.head_dim_v, w.max_pages = a.max_pages;
    w.tile = blockIdx.x, w.split = blockIdx.y, w.n_split = gridDim.y, w.scale = a.scale, w.window = NO_WINDOW;
    attend_wide<true>(w);
}
