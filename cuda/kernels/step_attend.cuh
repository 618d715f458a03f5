// The attention phase of a step, and what comes of the pages' masses.
//
// A unit is a key/value head with up to eight of the query heads that share it; the pages of a unit are split over blocks, a block's over
// its warps. A warp does a page with tensor cores: scores are q k^T with the queries split into the sum of two f16 (rows 0..8 and 8..16
// of the tile), values v^T p. Keys and values of its first page are loaded while queries are not there yet: all but the row of the current
// token were written by earlier steps. That row is computed here (norm, rotation), used from shared memory, and put in its place by the
// block of a unit that attends to the last page. The blocks of a unit join their parts together, each some of the elements.
#pragma once
#include "attend.cuh"
#include "step.cuh"

// Shared memory of the phase: queries as the sum of two f16, maximum and sum of each warp, factors of warps or splits; then sums of
// each warp (STEP_WARPS, heads of the unit, head_dim + 1).
constexpr int MAX_SPLITS = 64;
struct AttendShared {
    Queries q;  // their last row is the current key, and in [1] the current value
    float2 ml[STEP_WARPS][UNIT];
    float factor[UNIT][MAX_SPLITS];
};

// Queries of the unit, the current key and the current value behind norm and rotation into shared memory, a warp each.
__device__ __forceinline__ void current_token(const Here& h, AttendShared& s, int kv, int head0, int nq) {
    const Step& a = h.a;
    const int d = a.head_dim, half = d / 2, n_warp = blockDim.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < UNIT + 2; i += n_warp) {
        const bool is_q = i < UNIT, is_v = i > UNIT;
        uint16_t *hi = s.q[is_v ? 1 : 0][is_q ? i : UNIT], *lo = s.q[1][i];
        if (is_q && i >= nq) {
            // A unit may have fewer heads than there is room for.
            for (int e = lane; e < LDQ; e += WARP) hi[e] = 0, lo[e] = 0;
            continue;
        }
        const float* x = is_q ? h.p.q + size_t(head0 + i) * d : (is_v ? h.p.v : h.p.k) + size_t(kv) * d;
        const float* w = is_q ? h.p.q_norm : is_v ? nullptr : h.p.k_norm;
        const bool turn = h.p.rope && !is_v, neox = a.neox;
        float x0[2] = {}, x1[2] = {}, w0[2] = {1.0f, 1.0f}, w1[2] = {1.0f, 1.0f}, sum = 0.0f;
        float2 cs[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int e = lane + WARP * j, i0 = neox ? e : 2 * e, i1 = neox ? e + half : 2 * e + 1;
            cs[j] = make_float2(1.0f, 0.0f);
            if (e >= half) continue;
            if (turn) cs[j] = a.rope[e];
            if (w) w0[j] = w[i0], w1[j] = w[i1];
        }
        bool wait = true;
        while (wait) {
            wait = false;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int e = lane + WARP * j;
                if (e < half) x0[j] = look(x + (neox ? e : 2 * e)), x1[j] = look(x + (neox ? e + half : 2 * e + 1));
            }
#pragma unroll
            for (int j = 0; j < 2; j++) wait |= missing(x0[j]) || missing(x1[j]);
            if (wait) spin();
        }
#pragma unroll
        for (int j = 0; j < 2; j++) sum += x0[j] * x0[j] + x1[j] * x1[j];
        float scale = is_q ? a.scale : 1.0f;
        if (w) scale *= rsqrtf(quotient(warp_sum(sum), float(d)) + (is_q ? h.p.eps_q : h.p.eps_k));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int e = lane + WARP * j, i0 = neox ? e : 2 * e, i1 = neox ? e + half : 2 * e + 1;
            if (e >= half) continue;
            const float z0 = x0[j] * w0[j], z1 = x1[j] * w1[j];
            const float y0 = scale * (z0 * cs[j].x - z1 * cs[j].y), y1 = scale * (z0 * cs[j].y + z1 * cs[j].x);
            uint16_t r0, r1;
            split_half(y0, hi[i0], r0), split_half(y1, hi[i1], r1);
            if (is_q) lo[i0] = r0, lo[i1] = r1;
        }
        for (int e = d + lane; is_q && e < LDQ; e += WARP) hi[e] = 0, lo[e] = 0;
    }
}

// A number and the tag of the phase that it belongs to, seen together.
__device__ __forceinline__ uint64_t tagged(float v, uint32_t tag) { return uint64_t(tag) << 32 | __float_as_uint(v); }
__device__ __forceinline__ float untagged(const uint64_t* from, uint32_t tag) {
    uint64_t v = look(from);
    while (uint32_t(v >> 32) != tag) {
        spin();
        v = look(from);
    }
    return __uint_as_float(uint32_t(v));
}

// Joins this block's share of the elements of a unit's heads.
__device__ __forceinline__ void join_splits(const Here& h, AttendShared& s, int head0, int nq, int split, int n_split) {
    constexpr int TEAM = 4;  // threads of an element
    const Step& a = h.a;
    const int d = a.head_dim, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warp = blockDim.x / WARP;
    const uint32_t tag = a.turn + h.phase;
    // A warp finds the factors of a head's splits.
#pragma unroll 1
    for (int g = warp; g < nq; g += n_warp) {
        const uint64_t* ml = a.part_ml + size_t(head0 + g) * a.max_splits * 2;
        float m = -INFINITY, l = 0.0f;
        float2 x[MAX_SPLITS / WARP];
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) {
            const int p = lane + WARP * i;
            x[i] = make_float2(-INFINITY, 0.0f);
            if (p < n_split) x[i] = make_float2(untagged(ml + 2 * p, tag), untagged(ml + 2 * p + 1, tag));
            m = fmaxf(m, x[i].x);
        }
        m = warp_max(m);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) x[i].x = __expf(x[i].x - m), l += x[i].x * x[i].y;
        l = warp_sum(l);
#pragma unroll
        for (int i = 0; i < MAX_SPLITS / WARP; i++) s.factor[g][lane + WARP * i] = quotient(x[i].x, l);
        if (lane == 0 && split == 0) h.p.head_ml[head0 + g] = make_float2(m, l);
    }
    block_barrier();
    const int n = nq * d, from = share(n, split, n_split), to = share(n, split + 1, n_split), team = threadIdx.x % TEAM;
#pragma unroll 1
    for (int i0 = from; i0 < to; i0 += blockDim.x / TEAM) {
        const int i = min(i0 + int(threadIdx.x) / TEAM, to - 1), g = i / d, e = i % d;
        const uint64_t* part = a.part + size_t(head0 + g) * a.max_splits * d + e;
        float acc = 0.0f;
#pragma unroll 4
        for (int p = team; p < n_split; p += TEAM) acc += s.factor[g][p] * untagged(part + size_t(p) * d, tag);
        acc += __shfl_xor_sync(ALL, acc, 1);
        acc += __shfl_xor_sync(ALL, acc, 2);
        if (team == 0 && i0 + int(threadIdx.x) / TEAM < to) hand_over(h.p.out + size_t(head0 + g) * d + e, acc);
    }
}

// A page for each warp, and as many blocks as that takes; joining blocks costs more than a second page.
__device__ __forceinline__ int splits_of(const Step& a, int n_pages) {
    const int n_warp = 1 << a.warp_bits;
    return n_pages <= 2 * n_warp ? 1 : min(int(a.max_splits), (n_pages + n_warp - 1) >> a.warp_bits);
}
// Whether this block takes part.
__device__ __forceinline__ bool is_attending(const uint32_t phase) {
    const Here h = here(phase);
    return blockIdx.x < h.a.units * splits_of(h.a, *h.p.n_pages);
}

template <int NC, int NJ, bool EXACT> __device__ __noinline__ uint32_t attend(const uint32_t at) {
    const uint32_t phase = at / 2;
    const Here h = here(phase);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    float* shared_o = reinterpret_cast<float*>(h.shared + sizeof(AttendShared));
    const int d = EXACT ? 32 * NC : int(a.head_dim), group = a.group, tiles = a.tiles, units = a.units;
    const int n_warp = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = *h.p.n_pages, pos = *a.pos;
    const int n_split = splits_of(a, n_pages);
    const uint32_t place = *h.p.place;
    const Pool pool = {h.p.pool_k, h.p.pool_v, int(a.n_head_kv), d};
    const int ldo = d + 1;  // of the sums, so that rows begin in different banks
#pragma unroll 1
    for (int task = blockIdx.x; task < units * n_split; task += gridDim.x) {
        const int split = task / units, unit = task - split * units, kv = unit / tiles, tile = unit - kv * tiles;
        const int head0 = kv * group + tile * UNIT, nq = min(UNIT, group - tile * UNIT);
        const int from = share(n_pages, split, n_split), to = share(n_pages, split + 1, n_split);
        const int used = min(n_warp, to - from);  // warps that have pages
        int p = from + warp;
        for (; p < to; p += n_warp) bring_page(pool, h.p.pages[p].x, kv);
        p = from + warp;
        current_token(h, s, kv, head0, nq);
        block_barrier();
        if (task == int(blockIdx.x)) trace(h, 0);
        if (to == n_pages) {
            // The block that attends to the last page puts the current key and value there.
            const size_t row = (size_t(place) * a.n_head_kv + kv) * d;
            for (int e = threadIdx.x; e < d; e += blockDim.x) h.p.pool_k[row + e] = s.q[0][UNIT][e], h.p.pool_v[row + e] = s.q[1][UNIT][e];
        }
        Sums<NJ> sum;
#pragma unroll 1
        while (p < to) {
            const uint2 entry = h.p.pages[p];
            const int rows = min(PAGE, pos - int(entry.y) + 1);
            // Keys and values at once would not fit in registers beside the sums.
            PageOf<NC, NJ, EXACT> page;
            page.load_keys(pool, entry.x, kv);
            if (p == n_pages - 1) page.replace_key(rows - 1, s.q[0][UNIT], d);
            float2 ml;
            const Shares shares = attend_keys(page, s.q, rows, sum, ml);
            // Of the last page, the rows that earlier steps have written.
            page.load_values(pool, entry.x, kv, p == n_pages - 1 ? rows - 1 : PAGE);
            if (p == n_pages - 1) page.replace_value(rows - 1, s.q[1][UNIT], d);
            attend_values(page, shares, sum);
            if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + p] = ml;
            p += n_warp;
        }
        if (warp < used) {
            if (t == 0) s.ml[warp][g] = make_float2(sum.m, sum.l);
#pragma unroll
            for (int i = 0; i < 4 * NJ; i++) {
                const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float* o = shared_o + (warp * nq + 2 * t + j) * ldo + e;
                    if (2 * t + j < nq && (EXACT || e < d)) o[0] = sum.o[i][j], o[1] = sum.o[i][j + 2];
                }
            }
        }
        block_barrier();
        const uint32_t tag = a.turn + phase;
#pragma unroll 1
        for (int q = warp; q < nq; q += n_warp) {
            // A warp finds the factors of a head's warps.
            const float2 x = lane < used ? s.ml[lane][q] : make_float2(-INFINITY, 0.0f);
            const float m = warp_max(x.x), f = __expf(x.x - m), l = warp_sum(f * x.y);
            s.factor[q][lane] = n_split == 1 ? quotient(f, l) : f;
            if (lane == 0) {
                uint64_t* ml = a.part_ml + (size_t(head0 + q) * a.max_splits + split) * 2;
                if (n_split == 1) h.p.head_ml[head0 + q] = make_float2(m, l);
                if (n_split > 1) show(ml, tagged(m, tag)), show(ml + 1, tagged(l, tag));
            }
        }
        block_barrier();
#pragma unroll 1
        for (int i = threadIdx.x; i < nq * d; i += blockDim.x) {
            const int q = i / d, e = i % d;
            float acc = 0.0f;
#pragma unroll 4
            for (int w = 0; w < used; w++) acc += s.factor[q][w] * shared_o[(w * nq + q) * ldo + e];
            if (n_split == 1) hand_over(h.p.out + size_t(head0 + q) * d + e, acc);
            if (n_split > 1) show(a.part + (size_t(head0 + q) * a.max_splits + split) * d + e, tagged(acc, tag));
        }
        block_barrier();
        if (n_split > 1) {
            join_splits(h, s, head0, nq, split, n_split);
            block_barrier();
        }
    }
    trace(h, 1);
    return at;
}

// Masses of pages over the heads, from the maximum and sum that attention left for each page and for each head. Blocks take a layer each.
__device__ __noinline__ uint32_t weigh(const uint32_t at) {
    const Here h = here(at / 2);
    const Step& a = h.a;
    const int n_head = a.n_head;
    float2* all = reinterpret_cast<float2*>(h.shared);
    if (threadIdx.x == 0 && blockIdx.x < h.p.n_in) {
        while (acquire(a.arrived) < gridDim.x) spin();
    }
    block_barrier();
    trace(h, 0);
    for (uint32_t il = blockIdx.x; il < h.p.n_in; il += gridDim.x) {
        const int n_pages = h.p.n_pages[il];
        for (int i = threadIdx.x; i < n_head; i += blockDim.x) {
            const float2 ml = fresh(h.p.head_ml + il * n_head + i);
            all[i] = make_float2(ml.x, quotient(1.0f, ml.y));
        }
        block_barrier();
        for (int p = threadIdx.x; p < n_pages; p += blockDim.x) {
            float w = 0.0f;
            for (int i = 0; i < n_head; i++) {
                const float2 ml = fresh(h.p.page_ml + (size_t(il) * n_head + i) * a.max_pages + p);
                const float mass = ml.y * __expf(ml.x - all[i].x) * all[i].y;
                w = a.mean ? w + mass : fmaxf(w, mass);
            }
            h.p.mass[size_t(il) * a.max_pages + p] = a.mean ? w / float(n_head) : w;
        }
        block_barrier();
    }
    trace(h, 1);
    return at;
}
