// Latent attention (DeepSeek-V2, arXiv 2405.04434): all heads share one key of a token, which begins with what values are made of. Products of
// heads with matrices of their own, rotation of what keys and queries end with, and attention.
#include "matvec.cuh"
#include "pages.cuh"

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
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, unit = i / a.n, e = i % a.n;
    if (unit < a.units) a.out[size_t(unit) * a.out_next + a.out_at + e] = a.x[size_t(unit) * a.x_next + a.x_at + e];
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
constexpr int LATENT_WARPS = 8;   // 64 elements of values each
constexpr int LATENT_ROWS = 16;   // queries of a block
constexpr int LATENT_PAGES = 4;   // pages that a block takes at once, half a page a warp
constexpr int LATENT_KEYS = LATENT_PAGES * PAGE;
constexpr int SHARE_LD = LATENT_KEYS + 8;

// Eight elements of a stored row as halves, from a multiple of eight on; zeros beyond its end.
__device__ __forceinline__ uint4 eight_halves(const uint8_t* page, uint32_t type, int d, int row, int e) {
    if (type == F16 && d % 8 == 0) return *reinterpret_cast<const uint4*>(reinterpret_cast<const uint16_t*>(page) + row * d + e);
    float v[8];
    if (type == F16) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = e + i < d ? stored(page, F16, d, d, row, e + i) : 0.0f;
    } else {
        stored8(page, type, d, d, row, e, v);
    }
    return make_uint4(halves(v[0], v[1]), halves(v[2], v[3]), halves(v[4], v[5]), halves(v[6], v[7]));
}

// Attention over latent keys on tensor cores. A block has 16 queries, of one or several tokens and all for the same keys, and goes through the
// pages four at a time: their keys come to shared memory, where they are values too. A warp has the scores of half a page, then, when all have
// agreed on the largest, 64 elements of the values of all four.
//
// Dynamic shared memory in halves: queries (LATENT_ROWS, ld), keys (LATENT_KEYS, ld), shares (LATENT_ROWS, SHARE_LD), where ld is head_dim
// rounded up to a multiple of 64, and 8: rows then lie four words apart from each other, counted in banks.
// Grid: (ceil(n * n_head / LATENT_ROWS), splits); splits is 1 where part is null. Block: 32 * LATENT_WARPS.
KERNEL __launch_bounds__(WARP* LATENT_WARPS, 2) attention_latent(const IN_PLACE LatentAttention a) {
    begin();
    const int d = a.head_dim, dv = a.head_dim_v, dp = (d + 63) / 64 * 64, ld = dp + 8, n_head = a.n_head;
    const int q0 = blockIdx.x * LATENT_ROWS, rows = min(LATENT_ROWS, int(a.n) * n_head - q0), split = blockIdx.y, n_split = gridDim.y;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    DYNAMIC_SHARED(uint16_t, shared_q);
    uint16_t* keys = shared_q + LATENT_ROWS * ld;
    uint16_t* shares = keys + LATENT_KEYS * ld;
    __shared__ float2 shared_ml[LATENT_WARPS][LATENT_ROWS];

    for (int i = threadIdx.x; i < LATENT_ROWS * (dp / 2); i += blockDim.x) {
        const int r = i / (dp / 2), e = 2 * (i % (dp / 2));
        const bool in = r < rows && e < d;
        const float* x = a.q + size_t(q0 + r) * d + e;
        *reinterpret_cast<uint32_t*>(shared_q + r * ld + e) = in ? halves(a.scale * x[0], a.scale * x[1]) : 0;
    }

    const int n_pages = *a.n_pages, pos0 = *a.pos, last_pos = pos0 + (q0 + rows - 1) / n_head;
    const int per = ((n_pages + n_split - 1) / n_split + LATENT_PAGES - 1) / LATENT_PAGES * LATENT_PAGES;
    const int end = min(n_pages, (split + 1) * per);
    // Positions of this thread's two queries; those that are none see nothing.
    int pos[2];
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) pos[h] = g + 8 * h < rows ? pos0 + (q0 + g + 8 * h) / n_head : -1;
    // Sums: of fragment j this thread has elements 64 warp + 16 t + j and those 8 behind, of queries g and g + 8.
    float o[8][4] = {};

    for (int p0 = split * per; p0 < end; p0 += LATENT_PAGES) {
        if (int(a.pages[p0].y) > last_pos) break;
        __syncthreads();  // the keys of before have been used, the queries are there
        for (int i = threadIdx.x; i < LATENT_KEYS * (dp / 8); i += blockDim.x) {
            const int key = i / (dp / 8), e = 8 * (i % (dp / 8)), p = p0 + key / PAGE, r = key % PAGE;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (p < end && e < d) {
                const uint2 page = a.pages[p];
                const Tier& tier = a.tiers[tier_of(page)];
                // Rows that nobody has written are not read.
                if (int(page.y) + r <= last_pos) v = eight_halves(page_at(tier.k, tier.type_k, slot_of(page), 1, 0, d), tier.type_k, d, r, e);
            }
            *reinterpret_cast<uint4*>(keys + key * ld + e) = v;
        }
        __syncthreads();

        // Scores of keys 8 warp + 2t, + 1 and queries g, g + 8.
        float c[4] = {};
        for (int e = 0; e < dp; e += 32) {
            uint32_t b[4];
            load_fragments(b, keys + (8 * warp + lane % 8) * ld + e + 8 * (lane / 8));
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint32_t x[4];
                load_fragments(x, shared_q + lane % 16 * ld + e + 16 * s + 8 * (lane / 16));
                mma_16816(c, x, {b[2 * s], b[2 * s + 1]});
            }
        }
        const int p = p0 + warp / 2, key_pos = p < end ? int(a.pages[p].y) + 8 * (warp % 2) + 2 * t : 0x7ffffffe;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float &s0 = c[2 * h], &s1 = c[2 * h + 1];
            if (key_pos > pos[h]) s0 = -INFINITY;
            if (key_pos + 1 > pos[h]) s1 = -INFINITY;
            float mx = fmaxf(s0, s1);
            mx = fmaxf(mx, __shfl_xor_sync(ALL, mx, 1)), mx = fmaxf(mx, __shfl_xor_sync(ALL, mx, 2));
            const float base = mx == -INFINITY ? 0.0f : mx;
            float sum = __expf(s0 - base) + __expf(s1 - base);
            sum += __shfl_xor_sync(ALL, sum, 1), sum += __shfl_xor_sync(ALL, sum, 2);
            if (t == 0) shared_ml[warp][g + 8 * h] = make_float2(mx, sum);
        }
        __syncthreads();

#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = g + 8 * h;
            float top = m[h];
#pragma unroll
            for (int w = 0; w < LATENT_WARPS; w++) top = fmaxf(top, shared_ml[w][r].x);
            const float base = top == -INFINITY ? 0.0f : top, old = __expf(m[h] - base);
            float sum = l[h] * old;
#pragma unroll
            for (int w = 0; w < LATENT_WARPS; w++) sum += shared_ml[w][r].y * __expf(shared_ml[w][r].x - base);
            m[h] = top, l[h] = sum;
#pragma unroll
            for (int j = 0; j < 8; j++) o[j][2 * h] *= old, o[j][2 * h + 1] *= old;
            *reinterpret_cast<uint32_t*>(shares + r * SHARE_LD + 8 * warp + 2 * t) = halves(__expf(c[2 * h] - base), __expf(c[2 * h + 1] - base));
            if (a.page_ml && warp % 2 == 0 && t == 0 && p < end && r < rows) {
                const float2 x = shared_ml[warp][r], y = shared_ml[warp + 1][r];
                const float both = fmaxf(x.x, y.x), from = both == -INFINITY ? 0.0f : both;
                a.page_ml[size_t(q0 + r) * a.max_pages + p] = make_float2(both, x.y * __expf(x.x - from) + y.y * __expf(y.x - from));
            }
        }
        __syncthreads();

        // Values: a lane loads 8 elements of four keys, which are two of each fragment's rows.
        if (64 * warp >= dv) continue;
#pragma unroll
        for (int i = 0; i < LATENT_PAGES; i++) {
            if (p0 + i >= end) break;
            uint32_t x[4];
            load_fragments(x, shares + lane % 16 * SHARE_LD + PAGE * i + 8 * (lane / 16));
            const uint16_t* v = keys + (PAGE * i + 2 * t) * ld + 64 * warp + 8 * g;
            const uint4 v0 = *reinterpret_cast<const uint4*>(v), v1 = *reinterpret_cast<const uint4*>(v + ld);
            const uint4 v2 = *reinterpret_cast<const uint4*>(v + 8 * ld), v3 = *reinterpret_cast<const uint4*>(v + 9 * ld);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const uint32_t w0 = word(v0, w), w1 = word(v1, w), w2 = word(v2, w), w3 = word(v3, w);
                mma_16816(o[2 * w], x, {low_halves(w0, w1), low_halves(w2, w3)});
                mma_16816(o[2 * w + 1], x, {high_halves(w0, w1), high_halves(w2, w3)});
            }
        }
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = q0 + g + 8 * h;
        if (g + 8 * h >= rows) continue;
        float* to = a.part ? a.part + (size_t(r) * n_split + split) * dv : a.out + size_t(r) * dv;
        const float by = a.part ? 1.0f : 1.0f / l[h];
        if (a.part && warp == 0 && t == 0) a.part_ml[size_t(r) * n_split + split] = make_float2(m[h], l[h]);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int e = 64 * warp + 16 * t + i;
            if (e < dv) to[e] = by * o[i % 8][2 * h + i / 8];
        }
    }
}
