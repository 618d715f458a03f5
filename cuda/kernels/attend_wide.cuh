// Attention on tensor cores for keys that are wide, or that hold the values too: what a block does with 16 queries for the same keys.
#pragma once
#include "pages.cuh"

constexpr int WIDE_WARPS = 8;   // 64 elements of values each
constexpr int WIDE_ROWS = 16;   // queries of a block
constexpr int WIDE_PAGES = 4;   // pages that a block takes at once, half a page a warp
constexpr int WIDE_KEYS = WIDE_PAGES * PAGE;
constexpr int SHARE_LD = WIDE_KEYS + 8;

// What a block reads and writes; fields as in `LatentAttention` and `AttentionBatch`.
struct WideAttention {
    const float* q;
    const uint2* pages;
    const uint32_t* n_pages;
    const uint32_t* pos;
    float* out;
    float* part;
    float2* part_ml;
    float2* page_ml;
    const float* sinks;
    const Tier* tiers;
    int n, n_head, n_kv, d, dv, max_pages;
    int kv;                // the block's key/value head
    int tile;              // its queries, by 16
    int split, n_split;    // its share of the pages
    float scale;
    uint32_t window;
    float cap;
};

// Eight elements of a stored row as halves, from a multiple of eight on; zeros beyond its end. Rows of f16 are `stride` elements apart.
__device__ __forceinline__ uint4 eight_halves(const uint8_t* page, uint32_t type, int stride, int d, int row, int e) {
    if (type == F16 && d % 8 == 0) return *reinterpret_cast<const uint4*>(reinterpret_cast<const uint16_t*>(page) + row * stride + e);
    float v[8];
    if (type == F16) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = e + i < d ? stored(page, F16, stride, d, row, e + i) : 0.0f;
    } else {
        stored8(page, type, stride, d, row, e, v);
    }
    return make_uint4(halves(v[0], v[1]), halves(v[2], v[3]), halves(v[4], v[5]), halves(v[6], v[7]));
}

// A block has 16 queries, of one or several tokens and heads and all for the same keys, and goes through the pages four at a time: their keys come
// to shared memory. A warp has the scores of half a page, then, when all have agreed on the largest, 64 elements of the values of all four.
//
// Dynamic shared memory in halves: queries (WIDE_ROWS, ld), twice if not LATENT, keys (WIDE_KEYS, ld), values likewise if not LATENT, shares
// (WIDE_ROWS, SHARE_LD), where ld is head_dim rounded up to a multiple of 64, and 8: rows then lie four words apart from each other, counted in banks.
// LATENT: there is one key/value head, whose keys begin with the values. Otherwise values come to shared memory beside the keys, and queries are the
// sum of two halves.
template <bool LATENT> __device__ __forceinline__ void attend_wide(const WideAttention& a) {
    const int d = a.d, dv = a.dv, dp = (d + 63) / 64 * 64, ld = dp + 8, group = a.n_head / a.n_kv, split = a.split, n_split = a.n_split;
    const int q0 = a.tile * WIDE_ROWS, rows = min(WIDE_ROWS, a.n * group - q0);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    DYNAMIC_SHARED(uint16_t, shared_q);
    uint16_t* keys = shared_q + (LATENT ? 1 : 2) * WIDE_ROWS * ld;
    uint16_t* values = LATENT ? keys : keys + WIDE_KEYS * ld;
    uint16_t* shares = values + WIDE_KEYS * ld;
    __shared__ float2 shared_ml[WIDE_WARPS][WIDE_ROWS];

    // A query's place among those of all tokens and heads.
    const auto row_of = [&](int r) {
        const int i = q0 + min(r, rows - 1);
        return LATENT ? size_t(i) : size_t(i / group) * a.n_head + a.kv * group + i % group;
    };
    for (int i = threadIdx.x; i < WIDE_ROWS * (dp / 2); i += blockDim.x) {
        const int r = i / (dp / 2), e = 2 * (i % (dp / 2));
        const bool in = r < rows && e < d;
        const float* x = a.q + row_of(r) * d + e;
        const float x0 = in ? a.scale * x[0] : 0.0f, x1 = in ? a.scale * x[1] : 0.0f;
        const uint32_t high = halves(x0, x1);
        *reinterpret_cast<uint32_t*>(shared_q + r * ld + e) = high;
        if (LATENT) continue;
        const float y0 = x0 - half_to_float(high & 0xffff), y1 = x1 - half_to_float(high >> 16);
        *reinterpret_cast<uint32_t*>(shared_q + (WIDE_ROWS + r) * ld + e) = halves(y0, y1);
    }

    const int n_pages = *a.n_pages, pos0 = *a.pos, last_pos = pos0 + (q0 + rows - 1) / group;
    const int from = first_in_window(n_pages, a.n, a.window), n_seen = n_pages - from;
    const int per = ((n_seen + n_split - 1) / n_split + WIDE_PAGES - 1) / WIDE_PAGES * WIDE_PAGES;
    const int end = min(n_pages, from + (split + 1) * per);
    // Positions of this thread's two queries; those that are none see nothing.
    int pos[2];
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) pos[h] = g + 8 * h < rows ? pos0 + (q0 + g + 8 * h) / group : -1;
    // Sums: of fragment j this thread has elements 64 warp + 16 t + j and those 8 behind, of queries g and g + 8.
    float o[8][4] = {};

    for (int p0 = from + split * per; p0 < end; p0 += WIDE_PAGES) {
        if (int(a.pages[p0].y) > last_pos) break;
        __syncthreads();  // the keys of before have been used, the queries are there
        for (int i = threadIdx.x; i < WIDE_KEYS * (dp / 8); i += blockDim.x) {
            const int key = i / (dp / 8), e = 8 * (i % (dp / 8)), p = p0 + key / PAGE, r = key % PAGE;
            uint4 k = make_uint4(0, 0, 0, 0), v = k;
            if (p < end && e < d) {
                const uint2 page = a.pages[p];
                const Tier& tier = a.tiers[tier_of(page)];
                const int n_kv = a.n_kv, slot = slot_of(page);
                // Rows that nobody has written are not read.
                if (int(page.y) + r <= last_pos) {
                    k = eight_halves(page_at(tier.k, tier.type_k, slot, n_kv, a.kv, d), tier.type_k, n_kv * d, d, r, e);
                    if (!LATENT) v = eight_halves(page_at(tier.v, tier.type_v, slot, n_kv, a.kv, d), tier.type_v, n_kv * d, d, r, e);
                }
            }
            *reinterpret_cast<uint4*>(keys + key * ld + e) = k;
            if (!LATENT) *reinterpret_cast<uint4*>(values + key * ld + e) = v;
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
                if (LATENT) continue;
                load_fragments(x, shared_q + (WIDE_ROWS + lane % 16) * ld + e + 16 * s + 8 * (lane / 16));
                mma_16816(c, x, {b[2 * s], b[2 * s + 1]});
            }
        }
        const int p = p0 + warp / 2, key_pos = p < end ? int(a.pages[p].y) + 8 * (warp % 2) + 2 * t : 0x7ffffff0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float &s0 = c[2 * h], &s1 = c[2 * h + 1];
            if (a.cap != 0.0f) s0 = soft_cap(s0, a.cap), s1 = soft_cap(s1, a.cap);
            // How far back a key is; behind the query that is more than any window.
            if (uint32_t(pos[h] - key_pos) >= a.window) s0 = -INFINITY;
            if (uint32_t(pos[h] - key_pos - 1) >= a.window) s1 = -INFINITY;
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
            for (int w = 0; w < WIDE_WARPS; w++) top = fmaxf(top, shared_ml[w][r].x);
            const float base = top == -INFINITY ? 0.0f : top, old = __expf(m[h] - base);
            float sum = l[h] * old;
#pragma unroll
            for (int w = 0; w < WIDE_WARPS; w++) sum += shared_ml[w][r].y * __expf(shared_ml[w][r].x - base);
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
        for (int i = 0; i < WIDE_PAGES; i++) {
            if (p0 + i >= end) break;
            uint32_t x[4];
            load_fragments(x, shares + lane % 16 * SHARE_LD + PAGE * i + 8 * (lane / 16));
            const uint16_t* v = values + (PAGE * i + 2 * t) * ld + 64 * warp + 8 * g;
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
        if (g + 8 * h >= rows) continue;
        const size_t r = row_of(g + 8 * h);
        float by = 1.0f;
        if (a.part) {
            if (warp == 0 && t == 0) a.part_ml[r * n_split + split] = make_float2(m[h], l[h]);
        } else if (a.sinks) {
            // What has been summed up is relative to its own maximum.
            const float sink = a.sinks[r % a.n_head], top = fmaxf(m[h], sink), mine = __expf(m[h] - top);
            by = mine / (l[h] * mine + __expf(sink - top));
        } else {
            by = 1.0f / l[h];
        }
        float* to = a.part ? a.part + (r * n_split + split) * dv : a.out + r * dv;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int e = 64 * warp + 16 * t + i;
            if (e < dv) to[e] = by * o[i % 8][2 * h + i / 8];
        }
    }
}
