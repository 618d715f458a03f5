// Attention over the live pages of a layer, for one token (decode) or a batch of a prompt (prefill).
//
// A block serves one key/value head and a tile of up to TILE query rows that share it: the query heads of the group, of one or
// several tokens. Its warps walk over the pages, one page at a time: scores of 16 keys, their maximum and sum (which are also the
// page's mass), then the values, with a running maximum. In decode the pages are split over blocks (SPLITS of the grid) and
// `attention_combine` joins the parts; page tables, their length and the position are read from device memory, so that one recorded
// launch serves every step.
//
// What may be seen is said by positions: a key is not behind the query, nor as far before it as its window is wide. Pages are in position
// order and all but the last are full. A sink is a score of a head that takes part in the softmax and has no value.
//
// A pool of f16 alone has kernels of its own: here, and for batches in attention_batch.cu.
#include "pages.cuh"

constexpr int TILE = 8;
constexpr int ATT_WARPS = 4;

struct Attention {
    const float* q;           // (n, n_head, head_dim)
    const uint2* pages;       // (n_pages) slot, first position
    const uint32_t* n_pages;  // (1)
    const uint32_t* pos;      // (1) position of the first token
    float* out;               // (n, n_head, head_dim); written if part is null
    float* part;              // (n_head, splits, head_dim) sums not yet normalised, or null; then n is 1
    float2* part_ml;          // (n_head, splits) maximum and sum of exponentials
    float2* page_ml;          // (n_head, max_pages) the same of each page that is seen, or null
    const float* sinks;       // (n_head) or null; looked at if part is null
    Tier tiers[MAX_TIERS];
    uint32_t n;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_dim;        // even, at most 256
    uint32_t max_pages;
    float scale;
    uint32_t window;          // tokens that a query sees, itself included, or NO_WINDOW
    float cap;                // bound of the scores, or 0
};

// Eight elements of a row of f16 whose length is d; zeros beyond.
__device__ __forceinline__ void load8(const uint16_t* x, int c, int d, float (&out)[8]) {
    if (d % 8 == 0) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * c);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = half_to_float(word(v, i / 2) >> (16 * (i % 2)));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = 8 * c + i < d ? half_to_float(x[8 * c + i]) : 0.0f;
    }
}

// Dynamic shared memory in floats: queries (TILE, d rounded up to 8), then sums of the warps (ATT_WARPS, TILE, d).
// PAIRS: pairs of elements of a lane, head_dim <= 64 * PAIRS. TIERS: pages may be of any tier and type; if not, all are of the first, in f16.
template <int PAIRS, bool TIERS> __device__ __forceinline__ void attend(const Attention& a) {
    const int d = a.head_dim, n_chunk = (d + 7) / 8, dp = 8 * n_chunk, n_kv = a.n_head_kv, group = a.n_head / n_kv;
    const int kv = blockIdx.x, q0 = blockIdx.y * TILE, split = blockIdx.z, n_split = gridDim.z;
    const int nq = min(TILE, int(a.n) * group - q0);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    DYNAMIC_SHARED(float, shared_q);
    float* shared_o = shared_q + TILE * dp;
    __shared__ float2 shared_ml[ATT_WARPS][TILE];

    for (int i = threadIdx.x; i < TILE * dp; i += blockDim.x) {
        const int g = i / dp, e = i % dp, qi = q0 + g;
        const bool in = g < nq && e < d;
        shared_q[i] = in ? a.scale * a.q[(size_t(qi / group) * a.n_head + kv * group + qi % group) * d + e] : 0.0f;
    }
    __syncthreads();

    const int n_pages = *a.n_pages, pos0 = *a.pos, from = first_in_window(n_pages, a.n, a.window);
    const int per = (n_pages - from + n_split - 1) / n_split;
    const int end = min(n_pages, from + (split + 1) * per);
    const int last_pos = pos0 + (q0 + nq - 1) / group;

    float m[TILE], l[TILE];
    float2 o[TILE][PAIRS];
#pragma unroll
    for (int g = 0; g < TILE; g++) {
        m[g] = -INFINITY, l[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) o[g][j] = make_float2(0.0f, 0.0f);
    }

    for (int p = from + split * per + warp; p < end; p += ATT_WARPS) {
        const uint2 page = a.pages[p];
        const int first = page.y;
        if (first > last_pos) break;
        // The last row of a page lies before all windows.
        if (pos0 + q0 / group - (first + PAGE - 1) >= int(a.window)) continue;
        // Scores: lanes 2r and 2r + 1 share key r, each takes every second chunk of 8 elements.
        const int r = lane / 2;
        const Tier& tier = a.tiers[TIERS ? tier_of(page) : 0];
        const uint32_t slot = TIERS ? slot_of(page) : page.x, type_k = TIERS ? tier.type_k : F16, type_v = TIERS ? tier.type_v : F16;
        const uint8_t* k = page_at(tier.k, type_k, slot, n_kv, kv, d);
        float s[TILE] = {};
        for (int c = lane % 2; c < n_chunk; c += 2) {
            float kf[8];
            if (TIERS) {
                stored8(k, type_k, n_kv * d, d, r, 8 * c, kf);
            } else {
                load8(reinterpret_cast<const uint16_t*>(k) + r * n_kv * d, c, d, kf);
            }
#pragma unroll
            for (int g = 0; g < TILE; g++) {
                if (g >= nq) break;
                const float* qv = shared_q + g * dp + 8 * c;
#pragma unroll
                for (int i = 0; i < 8; i++) s[g] += qv[i] * kf[i];
            }
        }
#pragma unroll
        for (int g = 0; g < TILE; g++) {
            if (g >= nq) break;
            const float both = s[g] + __shfl_xor_sync(ALL, s[g], 1), sum = a.cap == 0.0f ? both : soft_cap(both, a.cap);
            // How far back the key is; behind the query that is more than any window.
            const bool seen = uint32_t(pos0 + (q0 + g) / group - first - r) < a.window;
            const float mp = warp_max(seen ? sum : -INFINITY);
            if (mp == -INFINITY) {  // this query sees nothing of the page
                s[g] = 0.0f;
                continue;
            }
            float e = seen ? __expf(sum - mp) : 0.0f;
            const float lp = 0.5f * warp_sum(e);  // each key counts in two lanes
            if (a.page_ml && lane == 0) a.page_ml[size_t(kv * group + q0 + g) * a.max_pages + p] = make_float2(mp, lp);
            const float m_new = fmaxf(m[g], mp), f_old = __expf(m[g] - m_new), f_new = __expf(mp - m_new);
            m[g] = m_new;
            l[g] = l[g] * f_old + lp * f_new;
            s[g] = e * f_new;
#pragma unroll
            for (int j = 0; j < PAIRS; j++) o[g][j].x *= f_old, o[g][j].y *= f_old;
        }
        // Values: a lane takes elements 2 lane + 64 j of every row; rows nobody has written are not read.
        const int rows = min(PAGE, last_pos - first + 1);
        const uint8_t* v = page_at(tier.v, type_v, slot, n_kv, kv, d);
        for (int i = 0; i < rows; i++) {
            float2 vf[PAIRS];
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                const int e = 2 * lane + 64 * j;
                vf[j] = e < d ? Columns(v, type_v, n_kv * d, d, e).row(i) : make_float2(0.0f, 0.0f);
            }
#pragma unroll
            for (int g = 0; g < TILE; g++) {
                if (g >= nq) break;
                const float w = __shfl_sync(ALL, s[g], 2 * i);
#pragma unroll
                for (int j = 0; j < PAIRS; j++) o[g][j].x += w * vf[j].x, o[g][j].y += w * vf[j].y;
            }
        }
    }

#pragma unroll
    for (int g = 0; g < TILE; g++) {
        if (lane == 0) shared_ml[warp][g] = make_float2(m[g], l[g]);
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int e = 2 * lane + 64 * j;
            if (e < d) {
                shared_o[(warp * TILE + g) * d + e] = o[g][j].x;
                shared_o[(warp * TILE + g) * d + e + 1] = o[g][j].y;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < nq * d; i += blockDim.x) {
        const int g = i / d, e = i % d, qi = q0 + g, head = kv * group + qi % group;
        float mx = -INFINITY, sum = 0.0f, acc = 0.0f;
        for (int w = 0; w < ATT_WARPS; w++) mx = fmaxf(mx, shared_ml[w][g].x);
        if (!a.part && a.sinks) mx = fmaxf(mx, a.sinks[head]), sum = __expf(a.sinks[head] - mx);
        for (int w = 0; w < ATT_WARPS; w++) {
            const float2 ml = shared_ml[w][g];
            const float f = ml.x == -INFINITY ? 0.0f : __expf(ml.x - mx);
            sum += f * ml.y;
            acc += f * shared_o[(w * TILE + g) * d + e];
        }
        if (a.part) {
            a.part[(size_t(head) * n_split + split) * d + e] = acc;
            if (e == 0) a.part_ml[size_t(head) * n_split + split] = make_float2(mx, sum);
        } else {
            a.out[(size_t(qi / group) * a.n_head + head) * d + e] = acc / sum;
        }
    }
}

template <bool TIERS> __device__ __forceinline__ void attend_any(const Attention& a) {
    begin();
    if (a.head_dim <= 64) {
        attend<1, TIERS>(a);
    } else if (a.head_dim <= 128) {
        attend<2, TIERS>(a);
    } else {
        attend<4, TIERS>(a);
    }
}

// Grid: (n_head_kv, ceil(n * n_head / n_head_kv / TILE), splits); splits is 1 where part is null. Block: 32 * ATT_WARPS.
KERNEL __launch_bounds__(WARP* ATT_WARPS) attention(const Attention a) { attend_any<false>(a); }
// The same of pages of any tier and type.
KERNEL __launch_bounds__(WARP* ATT_WARPS) attention_tiers(const IN_PLACE Attention a) { attend_any<true>(a); }

struct Combine {
    const float* part;        // (n_head, splits, head_dim)
    const float2* part_ml;    // (n_head, splits)
    const float2* page_ml;    // (n_head, max_pages), if w is not null
    const float* sinks;       // (n_head) or null
    const uint2* pages;       // (n_pages) slot, first position
    const uint32_t* n_pages;  // (1)
    const uint32_t* pos;      // (1) position of the token
    float* out;               // (n_head, head_dim)
    int8_t* q;                // (n_head * head_dim) the same quantized, or null; head_dim is then a multiple of 32
    float2* ds;               // (n_head * head_dim / 32)
    float* w;                 // (max_pages) mass of each page over the heads, or null
    uint32_t n_head;
    uint32_t head_dim;
    uint32_t splits;
    uint32_t max_pages;
    uint32_t mean;            // w is the mean over the heads instead of the largest
    uint32_t window;          // as in `Attention`
};

// Maximum and sum over the splits of a head, and its sink.
__device__ __forceinline__ float2 join(const float2* ml, int n, const float* sink) {
    float m = sink ? *sink : -INFINITY, l = 0.0f;
    for (int s = 0; s < n; s++) m = fmaxf(m, ml[s].x);
    if (sink) l = __expf(*sink - m);
    for (int s = 0; s < n; s++) l += ml[s].x == -INFINITY ? 0.0f : __expf(ml[s].x - m) * ml[s].y;
    return make_float2(m, l);
}

// Grid: (n_head + ceil(max_pages / threads), or n_head without w). Block: a multiple of 32.
// Dynamic shared memory: n_head float2. The first n_head blocks join the parts of a head, the others weigh pages.
KERNEL __launch_bounds__(256) attention_combine(const Combine a) {
    begin();
    const int d = a.head_dim, n_split = a.splits, lane = threadIdx.x % WARP;
    if (blockIdx.x < a.n_head) {
        const int h = blockIdx.x;
        const float2* ml = a.part_ml + size_t(h) * n_split;
        const float2 all = join(ml, n_split, a.sinks ? a.sinks + h : nullptr);
        for (int e0 = threadIdx.x - lane; e0 < d; e0 += blockDim.x) {
            const int e = e0 + lane;
            float sum = 0.0f;
            for (int s = 0; s < n_split; s++) {
                if (ml[s].x != -INFINITY && e < d) sum += __expf(ml[s].x - all.x) * a.part[(size_t(h) * n_split + s) * d + e];
            }
            sum /= all.y;
            if (e < d) a.out[size_t(h) * d + e] = sum;
            if (a.q) quantize_block(sum, a.q + size_t(h) * d + e0, a.ds + (size_t(h) * d + e0) / WARP);
        }
        return;
    }
    DYNAMIC_SHARED(float2, heads);
    for (int h = threadIdx.x; h < int(a.n_head); h += blockDim.x) {
        heads[h] = join(a.part_ml + size_t(h) * n_split, n_split, a.sinks ? a.sinks + h : nullptr);
    }
    __syncthreads();
    const int p = (blockIdx.x - a.n_head) * blockDim.x + threadIdx.x;
    if (p >= int(*a.n_pages)) return;
    // Nobody has looked at a page whose last row lies before the window.
    if (a.window != NO_WINDOW && int(*a.pos) - int(a.pages[p].y + PAGE - 1) >= int(a.window)) {
        a.w[p] = 0.0f;
        return;
    }
    float w = 0.0f;
    for (int h = 0; h < int(a.n_head); h++) {
        const float2 ml = a.page_ml[size_t(h) * a.max_pages + p];
        const float mass = ml.y * __expf(ml.x - heads[h].x) / heads[h].y;
        w = a.mean ? w + mass : fmaxf(w, mass);
    }
    a.w[p] = a.mean ? w / float(a.n_head) : w;
}
