// Attention over the live pages of a layer, for one token (decode) or a batch of a prompt (prefill).
//
// A block serves one key/value head and a tile of up to TILE query rows that share it: the query heads of the group, of one or
// several tokens. Its warps walk over the pages, one page at a time: scores of 16 keys, their maximum and sum (which are also the
// page's mass), then the values, with a running maximum. In decode the pages are split over blocks (SPLITS of the grid) and
// `attention_combine` joins the parts; page tables, their length and the position are read from device memory, so that one recorded
// launch serves every step. Heads of up to MAX_D elements go through tensor cores there, with keys and values of a page in registers.
//
// What may be seen is said by positions: a key is not behind the query, nor as far before it as its window is wide. Pages are in position
// order and all but the last are full. A sink is a score of a head that takes part in the softmax and has no value.
//
// A pool of f16 alone has kernels of its own: here, and for batches in attention_batch.cu.
#include "attend_tiers.cuh"

constexpr int TILE = 8;
constexpr int ATT_WARPS = 4;

struct Attention {
    const float* q;           // (n, n_head, head_dim)
    const uint2* pages;       // (n_pages) slot, first position
    const uint32_t* n_pages;  // (1)
    const uint32_t* pos;      // (1) position of the first token
    float* out;               // (n, n_head, head_dim); written if part is null
    float* part;              // (n_head, splits, head_dim) sums not yet normalised, or null; with them n is 1
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

// Blocks that share the pages of a head, of as many as there are at most: a warp has no less than a page.
__device__ __forceinline__ int splits_of(int n_pages, int most) { return max(1, min(most, (n_pages + ATT_WARPS - 1) / ATT_WARPS)); }

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
    const int n_pages = *a.n_pages, pos0 = *a.pos, from = first_in_window(n_pages, a.n, a.window);
    const int n_used = a.part ? splits_of(n_pages - from, n_split) : n_split;
    if (split >= n_used) return;
    DYNAMIC_SHARED(float, shared_q);
    float* shared_o = shared_q + TILE * dp;
    __shared__ float2 shared_ml[ATT_WARPS][TILE];

    for (int i = threadIdx.x; i < TILE * dp; i += blockDim.x) {
        const int g = i / dp, e = i % dp, qi = q0 + g;
        const bool in = g < nq && e < d;
        shared_q[i] = in ? a.scale * a.q[(size_t(qi / group) * a.n_head + kv * group + qi % group) * d + e] : 0.0f;
    }
    __syncthreads();

    const int per = (n_pages - from + n_used - 1) / n_used;
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
#pragma unroll 4
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
#pragma unroll 4
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

// Dynamic shared memory of `attend_token`; then sums of the warps (ATT_WARPS, TILE, d).
struct TokenShared {
    __align__(16) Queries q;
    __align__(16) uint32_t pairs[ATT_WARPS][MAX_D];  // as `attend_page` wants them
};

// One token, on tensor cores: a tile is what `attend_keys` takes.
template <int NC, int NJ, bool EXACT, bool TIERS> __device__ __forceinline__ void attend_token(const Attention& a) {
    static_assert(TILE == UNIT, "a tile is a unit of queries");
    const int d = EXACT ? 32 * NC : int(a.head_dim), n_kv = a.n_head_kv, group = a.n_head / n_kv, kv = blockIdx.x, q0 = blockIdx.y * TILE, split = blockIdx.z;
    const int nq = min(TILE, group - q0), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = *a.n_pages, pos = *a.pos, from = first_in_window(n_pages, 1, a.window), n_split = splits_of(n_pages - from, gridDim.z);
    if (split >= n_split) return;
    __shared__ float2 shared_ml[ATT_WARPS][TILE];
    DYNAMIC_SHARED(TokenShared, shared);
    Queries& q = shared->q;
    float* shared_o = reinterpret_cast<float*>(shared + 1);
    const float* queries = a.q + size_t(kv * group + q0) * d;
    for (int i = warp; i < UNIT; i += ATT_WARPS) {
        for (int e = 2 * lane; e < 32 * NC; e += 2 * WARP) {
            float2 x = make_float2(0.0f, 0.0f);
            if (i < nq && (EXACT || e < d)) x = *reinterpret_cast<const float2*>(queries + i * d + e);
            q.put(i, e, make_float2(a.scale * x.x, a.scale * x.y));
        }
    }
    const int per = (n_pages - from + n_split - 1) / n_split, end = min(n_pages, from + (split + 1) * per);
    const Pool pool = {reinterpret_cast<const uint16_t*>(a.tiers[0].k), reinterpret_cast<const uint16_t*>(a.tiers[0].v), n_kv, d};
    Sums<NJ> sum;
    __syncthreads();
    for (int p = from + split * per + warp; p < end; p += ATT_WARPS) {
        const uint2 entry = a.pages[p];
        // Rows that have been written, and those of them that lie before the window.
        const int rows = min(PAGE, pos - int(entry.y) + 1), gone = max(0, pos - int(a.window - 1) - int(entry.y));
        if (gone >= rows) continue;
        const Seen seen = {gone, rows - gone, a.cap};
        float2 ml;
        if (TIERS) {
            attend_page<NC, NJ, EXACT>(a.tiers, n_kv, kv, d, q, shared->pairs[warp], entry, rows, seen, sum, ml);
        } else {
            PageOf<NC, NJ, EXACT> page;
            page.load(pool, entry.x, kv, rows);
            attend_values(page, attend_keys<NC>(page, q, seen, sum, ml), sum);
        }
        if (a.page_ml && t == 0 && g < nq) a.page_ml[size_t(kv * group + q0 + g) * a.max_pages + p] = ml;
    }
    if (t == 0) shared_ml[warp][g] = make_float2(sum.m, sum.l);
    float* mine = shared_o + warp * TILE * d;
#pragma unroll
    for (int i = 0; i < 4 * NJ; i++) {
        const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (EXACT || e < d) *reinterpret_cast<float2*>(mine + (2 * t + j) * d + e) = make_float2(sum.o[i][j], sum.o[i][j + 2]);
        }
    }
    __syncthreads();
    for (int i = 2 * threadIdx.x; i < nq * d; i += 2 * blockDim.x) {
        const int h = i / d, e = i % d;
        const size_t at = size_t(kv * group + q0 + h) * gridDim.z + split;
        float top = -INFINITY, l = 0.0f;
        float2 acc = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < ATT_WARPS; w++) top = fmaxf(top, shared_ml[w][h].x);
#pragma unroll
        for (int w = 0; w < ATT_WARPS; w++) {
            const float2 ml = shared_ml[w][h], o = *reinterpret_cast<const float2*>(shared_o + (w * TILE + h) * d + e);
            const float f = ml.x == -INFINITY ? 0.0f : __expf(ml.x - top);
            l += f * ml.y, acc.x += f * o.x, acc.y += f * o.y;
        }
        *reinterpret_cast<float2*>(a.part + at * d + e) = acc;
        if (e == 0) a.part_ml[at] = make_float2(top, l);
    }
}

template <bool TIERS> __device__ __forceinline__ void attend_any(const Attention& a) {
    begin();
    if (a.part && a.head_dim == 64) {
        attend_token<2, 1, true, TIERS>(a);
    } else if (a.part && a.head_dim == 128) {
        attend_token<4, 2, true, TIERS>(a);
    } else if (a.part && a.head_dim < MAX_D && a.head_dim % 8 == 0) {
        attend_token<4, 2, false, TIERS>(a);
    } else if (a.head_dim <= 64) {
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
    uint32_t few;             // as many of the splits are used as `splits_of` says; if not, all
    uint32_t pad;
};

// Maximum and sum over the splits of a head, and its sink. By `team` neighbouring lanes of a warp, a power of two, all of which know it then; all
// lanes call it.
__device__ __forceinline__ float2 join(const float2* ml, int n, const float* sink, int team) {
    const int lane = threadIdx.x % team;
    float m = sink ? *sink : -INFINITY, l = 0.0f;
    for (int s = lane; s < n; s += team) m = fmaxf(m, ml[s].x);
    for (int o = team / 2; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(ALL, m, o));
    for (int s = lane; s < n; s += team) l += ml[s].x == -INFINITY ? 0.0f : __expf(ml[s].x - m) * ml[s].y;
    for (int o = team / 2; o > 0; o /= 2) l += __shfl_xor_sync(ALL, l, o);
    return make_float2(m, sink ? l + __expf(*sink - m) : l);
}

constexpr int COMBINE_WARPS = 4;

// Grid: (n_head + ceil(max_pages / 32), or n_head without w). Block: 32 * COMBINE_WARPS.
// Dynamic shared memory: n_head float2. The first n_head blocks join the parts of a head, the others weigh a page in each lane, of which every
// warp looks at some of the heads.
KERNEL __launch_bounds__(WARP* COMBINE_WARPS) attention_combine(const Combine a) {
    begin();
    const int d = a.head_dim, n_pages = *a.n_pages, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int n_split = a.few ? splits_of(n_pages - first_in_window(n_pages, 1, a.window), a.splits) : int(a.splits);
    // As many lanes as there are splits, or all.
    const int team = n_split < WARP ? 1 << (32 - __clz(n_split - 1)) : WARP;
    auto all_of = [&](int h, int team) { return join(a.part_ml + size_t(h) * a.splits, n_split, a.sinks ? a.sinks + h : nullptr, team); };
    if (blockIdx.x < a.n_head) {
        const int h = blockIdx.x;
        const float2* ml = a.part_ml + size_t(h) * a.splits;
        const float* part = a.part + size_t(h) * a.splits * d;
        const float2 all = all_of(h, WARP);
        for (int e0 = threadIdx.x - lane; e0 < d; e0 += blockDim.x) {
            const int e = e0 + lane;
            float sum = 0.0f;
#pragma unroll 8
            for (int s = 0; s < n_split; s++) {
                const float m = ml[s].x, f = m == -INFINITY ? 0.0f : __expf(m - all.x);
                sum += e < d ? f * part[size_t(s) * d + e] : 0.0f;
            }
            sum /= all.y;
            if (e < d) a.out[size_t(h) * d + e] = sum;
            if (a.q) quantize_block(sum, a.q + size_t(h) * d + e0, a.ds + (size_t(h) * d + e0) / WARP);
        }
        return;
    }
    const int p0 = (blockIdx.x - a.n_head) * WARP, p = p0 + lane, n_head = a.n_head;
    if (p0 >= n_pages) return;
    DYNAMIC_SHARED(float2, heads);
    for (int h0 = warp * WARP / team; h0 < n_head; h0 += blockDim.x / team) {
        const int h = h0 + lane / team;
        const float2 all = all_of(min(h, n_head - 1), team);
        if (lane % team == 0 && h < n_head) heads[h] = make_float2(all.x, 1.0f / all.y);
    }
    // Nobody has looked at a page whose last row lies before the window.
    const bool seen = p < n_pages && (a.window == NO_WINDOW || int(*a.pos) - int(a.pages[p].y + PAGE - 1) < int(a.window));
    __syncthreads();
    constexpr int AT_ONCE = 8;  // heads whose sums are on their way
    float w = 0.0f;
    for (int h0 = warp; h0 < n_head; h0 += AT_ONCE * COMBINE_WARPS) {
        float2 ml[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int h = h0 + i * COMBINE_WARPS;
            ml[i] = make_float2(0.0f, 0.0f);
            if (seen && h < n_head) ml[i] = a.page_ml[size_t(h) * a.max_pages + p];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int h = min(h0 + i * COMBINE_WARPS, n_head - 1);
            const float mass = ml[i].y == 0.0f ? 0.0f : ml[i].y * __expf(ml[i].x - heads[h].x) * heads[h].y;
            w = a.mean ? w + mass : fmaxf(w, mass);
        }
    }
    __shared__ float of_warps[COMBINE_WARPS][WARP];
    of_warps[warp][lane] = w;
    __syncthreads();
    if (warp > 0 || p >= n_pages) return;
#pragma unroll
    for (int i = 1; i < COMBINE_WARPS; i++) w = a.mean ? w + of_warps[i][lane] : fmaxf(w, of_warps[i][lane]);
    a.w[p] = a.mean ? w / float(n_head) : w;
}
