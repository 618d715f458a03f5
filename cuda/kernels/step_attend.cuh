// The attention phase of a step, and what comes of the pages' masses.
//
// A unit is a key/value head with up to eight of the query heads that share it; the pages of a unit are split over blocks, a block's over
// its warps. A warp does a page with tensor cores: scores are q k^T with the queries split into the sum of two f16 (rows 0..8 and 8..16
// of the tile), values v^T p. Keys and values of its first page are loaded before the barrier: all but the row of the current
// token were written by earlier steps. That row is computed here (norm, rotation) and put in its place by the block of a unit that
// attends to the last page. Parts are joined by the block that leaves its part last.
#pragma once
#include "attend.cuh"
#include "step.cuh"

// Shared memory of the phase: queries as the sum of two f16, maximum and sum of each warp, factors of the splits, a flag; then sums of
// each warp (STEP_WARPS, heads of the unit, head_dim + 1).
constexpr int MAX_SPLITS = 64;
struct AttendShared {
    Queries q;  // their last row is the current key, and in [1] the current value
    float2 ml[STEP_WARPS][UNIT];
    float factor[UNIT][MAX_SPLITS];
    uint32_t last;
    uint32_t pad[3];
};

// Queries of the unit, the current key and the current value behind norm and rotation into shared memory, a warp each.
__device__ __forceinline__ void current_token(const Here& h, AttendShared& s, int kv, int head0, int nq) {
    const Step& a = h.a;
    const int d = a.head_dim, half = d / 2, n_warp = blockDim.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < UNIT + 2; i += n_warp) {
        const bool is_q = i < UNIT, is_v = i > UNIT;
        uint16_t *hi = s.q[is_v ? 1 : 0][is_q ? i : UNIT], *lo = s.q[1][i];
        const float* x = is_q ? h.p.q + size_t(head0 + min(i, nq - 1)) * d : (is_v ? h.p.v : h.p.k) + size_t(kv) * d;
        const float* w = is_q ? h.p.q_norm : is_v ? nullptr : h.p.k_norm;
        const bool turn = h.p.rope && !is_v, neox = a.neox;
        float x0[2] = {}, x1[2] = {}, sum = 0.0f;
        float2 cs[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int e = lane + WARP * j;
            cs[j] = make_float2(1.0f, 0.0f);
            if (e < half) {
                x0[j] = fresh(x + (neox ? e : 2 * e)), x1[j] = fresh(x + (neox ? e + half : 2 * e + 1));
                if (turn) cs[j] = a.rope[e];
                sum += x0[j] * x0[j] + x1[j] * x1[j];
            }
        }
        // A unit may have fewer heads than there is room for.
        float scale = i < nq ? a.scale : is_q ? 0.0f : 1.0f;
        if (w) scale *= rsqrtf(quotient(warp_sum(sum), float(d)) + (is_q ? h.p.eps_q : h.p.eps_k));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int e = lane + WARP * j, i0 = neox ? e : 2 * e, i1 = neox ? e + half : 2 * e + 1;
            if (e >= half) continue;
            if (w) x0[j] *= w[i0], x1[j] *= w[i1];
            const float y0 = scale * (x0[j] * cs[j].x - x1[j] * cs[j].y), y1 = scale * (x0[j] * cs[j].y + x1[j] * cs[j].x);
            uint16_t r0, r1;
            split_half(y0, hi[i0], r0), split_half(y1, hi[i1], r1);
            if (is_q) lo[i0] = r0, lo[i1] = r1;
        }
        for (int e = d + lane; is_q && e < LDQ; e += WARP) hi[e] = 0, lo[e] = 0;
    }
}

// Joins what the splits left of a unit's heads.
__device__ __forceinline__ void join_splits(const Here& h, AttendShared& s, int head0, int nq, int n_split) {
    const Step& a = h.a;
    const int d4 = a.head_dim / 4, lane = threadIdx.x % WARP;
    // A warp finds the factors of a head's splits.
#pragma unroll 1
    for (int g = threadIdx.x / WARP; g < nq; g += blockDim.x / WARP) {
        const float2* ml = a.part_ml + size_t(head0 + g) * a.max_splits;
        const float2 none = make_float2(-INFINITY, 0.0f);
        const float2 x0 = lane < n_split ? fresh(ml + lane) : none, x1 = lane + WARP < n_split ? fresh(ml + lane + WARP) : none;
        const float m = warp_max(fmaxf(x0.x, x1.x)), f0 = __expf(x0.x - m), f1 = __expf(x1.x - m);
        const float l = warp_sum(f0 * x0.y + f1 * x1.y);
        s.factor[g][lane] = quotient(f0, l), s.factor[g][lane + WARP] = quotient(f1, l);
        if (lane == 0) h.p.head_ml[head0 + g] = make_float2(m, l);
    }
    block_barrier();
#pragma unroll 1
    for (int i = threadIdx.x; i < nq * d4; i += blockDim.x) {
        const int g = i / d4, e = i % d4, head = head0 + g;
        const float4* part = reinterpret_cast<const float4*>(a.part) + size_t(head) * a.max_splits * d4 + e;
        float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int p = 0; p < n_split; p++) {
            const float4 v = fresh(part + p * d4);
            const float f = s.factor[g][p];
            acc.x += f * v.x, acc.y += f * v.y, acc.z += f * v.z, acc.w += f * v.w;
        }
        reinterpret_cast<float4*>(h.p.out)[size_t(head) * d4 + e] = acc;
    }
}

template <int NC, int NJ, bool EXACT> __device__ __noinline__ void attend(const Place at) {
    const Here h = here(at);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    float* shared_o = reinterpret_cast<float*>(h.shared + sizeof(AttendShared));
    const int d = a.head_dim, group = a.n_head / a.n_head_kv, tiles = (group + UNIT - 1) / UNIT, units = a.n_head_kv * tiles;
    const int n_warp = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = *h.p.n_pages, pos = *a.pos;
    // A page for each warp, and as many blocks as that takes; joining blocks costs more than a second page.
    const int n_split = n_pages <= 2 * n_warp ? 1 : min(int(a.max_splits), (n_pages + n_warp - 1) / n_warp);
    const uint32_t place = *h.p.place;
    const Pool pool = {h.p.pool_k, h.p.pool_v, int(a.n_head_kv), d};
    const int ldo = d + 1;  // of the sums, so that rows begin in different banks
    bool ready = false;
#pragma unroll 1
    for (int task = blockIdx.x; task < units * n_split; task += gridDim.x) {
        const int unit = task % units, split = task / units, kv = unit / tiles, tile = unit % tiles;
        const int head0 = kv * group + tile * UNIT, nq = min(UNIT, group - tile * UNIT);
        const int from = share(n_pages, split, n_split), to = share(n_pages, split + 1, n_split);
        int p = from + warp;
        uint2 entry = {0, 0};
        PageOf<NC, NJ, EXACT> page;
        if (p < to) entry = h.p.pages[p];
        if (p < to && p < n_pages - 1) page.load(pool, entry.x, kv, PAGE);
        if (!ready) {
            grid_wait(h);
            ready = true;
        }
        current_token(h, s, kv, head0, nq);
        block_barrier();
        if (to == n_pages) {
            // The block that attends to the last page puts the current key and value there.
            const size_t row = (size_t(place) * a.n_head_kv + kv) * d;
            for (int e = threadIdx.x; e < d; e += blockDim.x) h.p.pool_k[row + e] = s.q[0][UNIT][e], h.p.pool_v[row + e] = s.q[1][UNIT][e];
            block_barrier();
        }
        Sums<NJ> sum;
#pragma unroll 1
        for (; p < to; p += n_warp) {
            if (p != from + warp) entry = h.p.pages[p];
            const int rows = min(PAGE, pos - int(entry.y) + 1);
            if (p != from + warp || p == n_pages - 1) page.load(pool, entry.x, kv, rows);
            const float2 ml = attend_page(page, s.q, rows, sum);
            if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + p] = ml;
        }
        if (t == 0) s.ml[warp][g] = make_float2(sum.m, sum.l);
#pragma unroll
        for (int i = 0; i < 4 * NJ; i++) {
            const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float* o = shared_o + (warp * nq + 2 * t + j) * ldo + e;
                if (2 * t + j < nq && e < d) o[0] = sum.o[i][j], o[1] = sum.o[i][j + 2];
            }
        }
        block_barrier();
        const int used = min(n_warp, to - from);
#pragma unroll 1
        for (int q = warp; q < nq; q += n_warp) {
            // A warp finds the factors of a head's warps.
            const float2 x = lane < used ? s.ml[lane][q] : make_float2(-INFINITY, 0.0f);
            const float m = warp_max(x.x), f = __expf(x.x - m), l = warp_sum(f * x.y);
            s.factor[q][lane] = n_split == 1 ? quotient(f, l) : f;
            if (lane == 0) (n_split == 1 ? h.p.head_ml[head0 + q] : a.part_ml[size_t(head0 + q) * a.max_splits + split]) = make_float2(m, l);
        }
        block_barrier();
#pragma unroll 1
        for (int i = threadIdx.x; i < nq * d; i += blockDim.x) {
            const int q = i / d, e = i % d;
            float acc = 0.0f;
#pragma unroll 4
            for (int w = 0; w < used; w++) acc += s.factor[q][w] * shared_o[(w * nq + q) * ldo + e];
            (n_split == 1 ? h.p.out[size_t(head0 + q) * d + e] : a.part[(size_t(head0 + q) * a.max_splits + split) * d + e]) = acc;
        }
        block_barrier();
        if (n_split == 1) continue;
        if (threadIdx.x == 0) s.last = count_up(a.joined + unit) == uint32_t(n_split - 1);
        block_barrier();
        if (s.last) {
            join_splits(h, s, head0, nq, n_split);
            if (threadIdx.x == 0) a.joined[unit] = 0;
        }
        block_barrier();
    }
    if (!ready) {
        grid_wait(h);
    }
    finish(h);
}

// Masses of pages over the heads, from the maximum and sum that attention left for each page and for each head. Blocks take a layer each.
__device__ __noinline__ void weigh(const Place at) {
    const Here h = here(at);
    const Step& a = h.a;
    const int n_head = a.n_head;
    float2* all = reinterpret_cast<float2*>(h.shared);
    trace(h, 1);
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
    finish(h);
}
