// The attention phase of a step, and what comes of the pages' masses.
//
// A unit is a key/value head with up to eight of the query heads that share it; the pages of a unit are split over blocks, a block's over
// its warps. A warp does a page with tensor cores: scores are q k^T with the queries split into the sum of two f16 (rows 0..8 and 8..16
// of the tile), values v^T p. Keys and values of its first page are loaded before the barrier, as weights are: all but the row of the
// current token were written by earlier steps. That row is computed here (norm, rotation) and put in its place by the one block of a
// unit that holds the last page. Parts are joined by the block that leaves its part last.
#pragma once
#include "step.cuh"

constexpr int UNIT = 8;  // query heads of a unit

// Shared memory of the phase, in bytes from `shared`: queries as two f16 (2, UNIT, LDQ), the current key and value (2, 128) f16,
// maximum and sum of each warp (STEP_WARPS, UNIT), a flag; then sums of each warp
// (STEP_WARPS, heads of the unit, head_dim).
constexpr int MAX_D = 128, LDQ = MAX_D + 32;
struct AttendShared {
    uint16_t q[2][UNIT][LDQ];
    uint16_t kv[2][MAX_D];
    float2 ml[STEP_WARPS][UNIT];
    uint32_t last;
    uint32_t pad[3];
};

// A warp's query or key behind norm and rotation: a lane holds pairs lane and lane + 32.
struct Rotated { float x0[2], x1[2]; };
__device__ __forceinline__ Rotated rotate(const Here& h, const float* x, const float* w, float eps) {
    const int lane = threadIdx.x % WARP, half = h.a.head_dim / 2;
    Rotated y = {};
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int i = lane + WARP * j;
        if (i < half) {
            y.x0[j] = fresh(x + (h.a.neox ? i : 2 * i)), y.x1[j] = fresh(x + (h.a.neox ? i + half : 2 * i + 1));
            sum += y.x0[j] * y.x0[j] + y.x1[j] * y.x1[j];
        }
    }
    const float scale = w ? rsqrtf(warp_sum(sum) / float(h.a.head_dim) + eps) : 1.0f;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int i = lane + WARP * j;
        if (i >= half) continue;
        if (w) y.x0[j] *= scale * w[h.a.neox ? i : 2 * i], y.x1[j] *= scale * w[h.a.neox ? i + half : 2 * i + 1];
        if (h.p.rope) {
            const float2 cs = h.a.rope[i];
            const float r0 = y.x0[j] * cs.x - y.x1[j] * cs.y, r1 = y.x0[j] * cs.y + y.x1[j] * cs.x;
            y.x0[j] = r0, y.x1[j] = r1;
        }
    }
    return y;
}

__device__ __forceinline__ float split_half(float x, uint16_t& hi) {
    hi = float_to_half(x);
    return x - half_to_float(hi);
}

// Keys and values of a page and a head, as a warp's lanes hold them; lane = 4 g + t.
// NC chunks of 32 dimensions of a key, NJ chunks of 64 dimensions of a value.
template <int NC, int NJ> struct PageOf {
    uint4 k[NC][2];  // keys g and g + 8, dimensions 32 c + 8 t ..
    uint4 v[4][NJ];  // values 2t, 2t + 1, 2t + 8, 2t + 9, dimensions 64 j + 8 g ..

    static __device__ __forceinline__ int value_row(int i) { return 2 * int(threadIdx.x % 4) + (i % 2) + 8 * (i / 2); }
    __device__ __forceinline__ void load(const Here& h, uint32_t slot, int kv) {
        const int d = h.a.head_dim, g = (threadIdx.x % WARP) / 4, t = threadIdx.x % 4;
        const size_t row = size_t(h.a.n_head_kv) * d, at = size_t(slot) * PAGE * row + size_t(kv) * d;
#pragma unroll
        for (int c = 0; c < NC; c++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                k[c][i] = make_uint4(0, 0, 0, 0);
                if (32 * c + 8 * t < d) k[c][i] = fresh16(h.p.pool_k + at + (g + 8 * i) * row + 32 * c + 8 * t);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                v[i][j] = make_uint4(0, 0, 0, 0);
                if (64 * j + 8 * g < d) v[i][j] = fresh16(h.p.pool_v + at + value_row(i) * row + 64 * j + 8 * g);
            }
        }
    }
    // Row `cur` becomes that of the current token; nobody has written the rows behind it.
    __device__ __forceinline__ void set_current(const Here& h, const AttendShared& s, int cur) {
        const int d = h.a.head_dim, g = (threadIdx.x % WARP) / 4, t = threadIdx.x % 4;
        const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int c = 0; c < NC; c++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (g + 8 * i == cur && 32 * c + 8 * t < d) k[c][i] = *reinterpret_cast<const uint4*>(&s.kv[0][32 * c + 8 * t]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                if (value_row(i) > cur) v[i][j] = zero;
                if (value_row(i) == cur && 64 * j + 8 * g < d) v[i][j] = *reinterpret_cast<const uint4*>(&s.kv[1][64 * j + 8 * g]);
            }
        }
    }
};

// Sums over pages, of eight heads: head g's maximum and sum; the values' sums of heads 2t and 2t + 1.
template <int NJ> struct Sums {
    float m = -INFINITY, l = 0.0f;
    float o[4 * NJ][4] = {};
};

// `rows`: rows of the page that may be seen.
template <int NC, int NJ>
__device__ __forceinline__ float2 attend_page(const PageOf<NC, NJ>& pg, const AttendShared& s, int rows, Sums<NJ>& sum) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float c0[4] = {}, c1[4] = {};
#pragma unroll
    for (int c = 0; c < NC; c++) {
        const uint4 hi = *reinterpret_cast<const uint4*>(&s.q[0][g][32 * c + 8 * t]);
        const uint4 lo = *reinterpret_cast<const uint4*>(&s.q[1][g][32 * c + 8 * t]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t a[4] = {word(hi, 2 * i), word(lo, 2 * i), word(hi, 2 * i + 1), word(lo, 2 * i + 1)};
            mma_16816(c0, a, {word(pg.k[c][0], 2 * i), word(pg.k[c][0], 2 * i + 1)});
            mma_16816(c1, a, {word(pg.k[c][1], 2 * i), word(pg.k[c][1], 2 * i + 1)});
        }
    }
    // Scores of head g with keys 2t, 2t + 1, 2t + 8, 2t + 9.
    float e[4] = {c0[0] + c0[2], c0[1] + c0[3], c1[0] + c1[2], c1[1] + c1[3]};
    float mp = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (PageOf<NC, NJ>::value_row(i) >= rows) e[i] = -INFINITY;
        mp = fmaxf(mp, e[i]);
    }
    mp = fmaxf(mp, __shfl_xor_sync(ALL, mp, 1));
    mp = fmaxf(mp, __shfl_xor_sync(ALL, mp, 2));
    float lp = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) e[i] = __expf(e[i] - mp), lp += e[i];
    lp += __shfl_xor_sync(ALL, lp, 1);
    lp += __shfl_xor_sync(ALL, lp, 2);
    const float m_new = fmaxf(sum.m, mp), f_old = __expf(sum.m - m_new), f_new = __expf(mp - m_new);
    sum.m = m_new, sum.l = sum.l * f_old + lp * f_new;
#pragma unroll
    for (int i = 0; i < 4; i++) e[i] *= f_new;
    auto pair = [](float x, float y) { return uint32_t(float_to_half(x)) | uint32_t(float_to_half(y)) << 16; };
    const uint32_t b[2] = {pair(e[0], e[1]), pair(e[2], e[3])};
    const float f0 = __shfl_sync(ALL, f_old, 8 * t), f1 = __shfl_sync(ALL, f_old, 8 * t + 4);
#pragma unroll
    for (int j = 0; j < NJ; j++) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float(&o)[4] = sum.o[4 * j + w];
            o[0] *= f0, o[1] *= f1, o[2] *= f0, o[3] *= f1;
            const uint32_t v0 = word(pg.v[0][j], w), v1 = word(pg.v[1][j], w), v2 = word(pg.v[2][j], w), v3 = word(pg.v[3][j], w);
            const uint32_t a[4] = {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)};
            mma_16816(o, a, b);
        }
    }
    return make_float2(mp, lp);
}

// Queries of the unit into shared memory, and, where the block holds the last page, the current key and value into the pool.
__device__ __forceinline__ void current_token(const Here& h, AttendShared& s, int kv, int head0, int nq, bool holds_last, bool stores) {
    const Step& a = h.a;
    const int d = a.head_dim, half = d / 2, n_warp = blockDim.x / WARP, lane = threadIdx.x % WARP;
    const size_t pool = size_t(*h.p.place) * a.n_head_kv * d + size_t(kv) * d;
    for (int i = threadIdx.x / WARP; i < UNIT + 2; i += n_warp) {
        if (i < nq) {
            const Rotated y = rotate(h, h.p.q + size_t(head0 + i) * d, h.p.q_norm, h.p.eps_q);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int e = lane + WARP * j, i0 = a.neox ? e : 2 * e, i1 = a.neox ? e + half : 2 * e + 1;
                if (e >= half) continue;
                s.q[1][i][i0] = float_to_half(split_half(a.scale * y.x0[j], s.q[0][i][i0]));
                s.q[1][i][i1] = float_to_half(split_half(a.scale * y.x1[j], s.q[0][i][i1]));
            }
            for (int e = d + lane; e < LDQ; e += WARP) s.q[0][i][e] = 0, s.q[1][i][e] = 0;
        } else if (i < UNIT) {
            for (int e = lane; e < LDQ; e += WARP) s.q[0][i][e] = 0, s.q[1][i][e] = 0;
        } else if (holds_last && i == UNIT) {
            const Rotated y = rotate(h, h.p.k + size_t(kv) * d, h.p.k_norm, h.p.eps_k);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int e = lane + WARP * j, i0 = a.neox ? e : 2 * e, i1 = a.neox ? e + half : 2 * e + 1;
                if (e >= half) continue;
                s.kv[0][i0] = float_to_half(y.x0[j]), s.kv[0][i1] = float_to_half(y.x1[j]);
                if (stores) h.p.pool_k[pool + i0] = s.kv[0][i0], h.p.pool_k[pool + i1] = s.kv[0][i1];
            }
        } else if (holds_last) {
            for (int e = lane; e < d; e += WARP) {
                s.kv[1][e] = float_to_half(fresh(h.p.v + size_t(kv) * d + e));
                if (stores) h.p.pool_v[pool + e] = s.kv[1][e];
            }
        }
    }
}

// Joins what the splits left of a unit's heads.
__device__ __forceinline__ void join_splits(const Here& h, int head0, int nq, int n_split) {
    const Step& a = h.a;
    const int d = a.head_dim;
    for (int i = threadIdx.x; i < nq * d / 4; i += blockDim.x) {
        const int g = i / (d / 4), e = 4 * (i % (d / 4)), head = head0 + g;
        const float2* ml = a.part_ml + size_t(head) * a.max_splits;
        const float* part = a.part + size_t(head) * a.max_splits * d + e;
        float m = -INFINITY, l = 0.0f;
        float4 acc = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int p = 0; p < n_split; p++) {
            const float2 x = fresh(ml + p);
            const float4 v = fresh(reinterpret_cast<const float4*>(part + size_t(p) * d));
            const float m_new = fmaxf(m, x.x), f_old = __expf(m - m_new), f = __expf(x.x - m_new);
            m = m_new, l = l * f_old + f * x.y;
            acc.x = acc.x * f_old + f * v.x, acc.y = acc.y * f_old + f * v.y;
            acc.z = acc.z * f_old + f * v.z, acc.w = acc.w * f_old + f * v.w;
        }
        const float inv = 1.0f / l;
        *reinterpret_cast<float4*>(h.p.out + size_t(head) * d + e) = {acc.x * inv, acc.y * inv, acc.z * inv, acc.w * inv};
        if (e == 0) h.p.head_ml[head] = make_float2(m, l);
    }
}

template <int NC, int NJ> __device__ __noinline__ void attend(const Place at) {
    const Here h = here(at);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    float* shared_o = reinterpret_cast<float*>(h.shared + sizeof(AttendShared));
    const int d = a.head_dim, group = a.n_head / a.n_head_kv, tiles = (group + UNIT - 1) / UNIT, units = a.n_head_kv * tiles;
    const int n_warp = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = *h.p.n_pages, pos = *a.pos;
    // A page for each warp, and as many blocks as that takes.
    const int n_split = max(1, min(min(int(gridDim.x) / units, int(a.max_splits)), (n_pages + n_warp - 1) / n_warp));
    bool ready = false;
    for (int task = blockIdx.x; task < units * n_split; task += gridDim.x) {
        const int unit = task % units, split = task / units, kv = unit / tiles, tile = unit % tiles;
        const int head0 = kv * group + tile * UNIT, nq = min(UNIT, group - tile * UNIT);
        const int from = share(n_pages, split, n_split), to = share(n_pages, split + 1, n_split);
        PageOf<NC, NJ> page;
        uint2 entry = {0, 0};
        int p = from + warp;
        if (p < to) entry = h.p.pages[p], page.load(h, entry.x, kv);
        if (!ready) {
            grid_wait(h);
            ready = true;
        }
        current_token(h, s, kv, head0, nq, to == n_pages, tile == 0);
        block_barrier();
        if (task == int(blockIdx.x)) prefetch_phase(a, h.next);
        Sums<NJ> sum;
        for (; p < to; p += n_warp) {
            if (p != from + warp) entry = h.p.pages[p], page.load(h, entry.x, kv);
            const int rows = min(PAGE, pos - int(entry.y) + 1);
            if (p == n_pages - 1) page.set_current(h, s, rows - 1);
            const float2 ml = attend_page(page, s, rows, sum);
            if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + p] = ml;
        }
        if (t == 0) s.ml[warp][g] = make_float2(sum.m, sum.l);
#pragma unroll
        for (int i = 0; i < 4 * NJ; i++) {
            const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float* o = shared_o + size_t(warp * nq + 2 * t + j) * d + e;
                if (2 * t + j < nq && e < d) o[0] = sum.o[i][j], o[1] = sum.o[i][j + 2];
            }
        }
        block_barrier();
        const int used = min(n_warp, to - from);
        for (int i = threadIdx.x; i < nq * d; i += blockDim.x) {
            const int q = i / d, e = i % d;
            float m = -INFINITY, l = 0.0f, acc = 0.0f;
            for (int w = 0; w < used; w++) m = fmaxf(m, s.ml[w][q].x);
            for (int w = 0; w < used; w++) {
                const float f = __expf(s.ml[w][q].x - m);
                l += f * s.ml[w][q].y, acc += f * shared_o[size_t(w * nq + q) * d + e];
            }
            if (n_split == 1) {
                h.p.out[size_t(head0 + q) * d + e] = acc / l;
                if (e == 0) h.p.head_ml[head0 + q] = make_float2(m, l);
            } else {
                a.part[(size_t(head0 + q) * a.max_splits + split) * d + e] = acc;
                if (e == 0) a.part_ml[size_t(head0 + q) * a.max_splits + split] = make_float2(m, l);
            }
        }
        block_barrier();
        if (n_split == 1) continue;
        if (threadIdx.x == 0) s.last = count_up(a.joined + unit) == uint32_t(n_split - 1);
        block_barrier();
        if (s.last) {
            join_splits(h, head0, nq, n_split);
            if (threadIdx.x == 0) a.joined[unit] = 0;
        }
        block_barrier();
    }
    if (!ready) {
        grid_wait(h);
        prefetch_phase(a, h.next);
    }
    finish(h);
}

// Masses of pages over the heads, from the maximum and sum that attention left for each page and for each head. Blocks take a layer each.
__device__ __noinline__ void weigh(const Place at) {
    const Here h = here(at);
    const Step& a = h.a;
    const int n_head = a.n_head;
    float2* all = reinterpret_cast<float2*>(h.shared);
    for (uint32_t il = blockIdx.x; il < h.p.n_in; il += gridDim.x) {
        const int n_pages = h.p.n_pages[il];
        for (int i = threadIdx.x; i < n_head; i += blockDim.x) {
            const float2 ml = fresh(h.p.head_ml + il * n_head + i);
            all[i] = make_float2(ml.x, 1.0f / ml.y);
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
