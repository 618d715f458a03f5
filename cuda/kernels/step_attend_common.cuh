// The attention phase of a step: queries, shares of blocks, and how the parts of a head come together.
//
// A unit is a key/value head with up to eight of the query heads that share it; the pages of a unit are split over blocks. The row of the
// current token is not in the pool yet: it is computed here (norm, rotation), used from shared memory, and put in its place by the block of
// a unit that attends to the last page. The blocks of a unit join their parts together, each some of the elements.
//
// What goes from the queries to the output is the longest chain of a step, and every instruction of it is waited for by all other blocks: what
// does not depend on the queries comes before they are there, and what nobody waits for behind the output.
#pragma once
#include "attend_tiers.cuh"
#include "step.cuh"

// Shared memory of the phase: queries as the sum of two f16, the current key and value, maximum and sum of each warp; then sums of each warp
// (STEP_WARPS, heads of the unit, head_dim + 1).
struct AttendShared {
    Queries q;
    __align__(16) uint16_t k[MAX_D];
    __align__(16) uint16_t v[MAX_D];
    float2 ml[STEP_WARPS][UNIT];
    float squares[2][STEP_WARPS];  // of all queries and of all keys of the token
};

// a / b of numbers below a million: the reciprocal errs by less than the half that is added.
__device__ __forceinline__ int divided(int a, int b) { return int((float(a) + 0.5f) * reciprocal(float(b))); }

// Sums of squares of all queries and keys of the token, where they are normed together.
__device__ __forceinline__ void square_all(const Here& h, AttendShared& s, int d, int warp, int lane) {
    const int n_q = h.a.n_head * d / 4, n = n_q + h.a.n_head_kv * d / 4;
    float sum[2] = {};
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float4 v = receive(i < n_q ? reinterpret_cast<const float4*>(h.p.q) + i : reinterpret_cast<const float4*>(h.p.k) + (i - n_q));
        const float x = v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        sum[0] += i < n_q ? x : 0.0f, sum[1] += i < n_q ? 0.0f : x;
    }
    __syncwarp();
    for (int k = 0; k < 2; k++) {
        const float x = warp_sum(sum[k]);
        if (lane == 0) s.squares[k][warp] = x;
    }
    block_barrier();
}

// The queries of the unit and, if they are `wanted`, the current key and value behind norm and rotation into shared memory, a warp each. What
// stands in the rows of heads that the unit does not have comes to nothing but sums of heads that it does not have.
template <bool EXACT, bool ANY>
__device__ __forceinline__ void current_token(const Here& h, AttendShared& s, int d, int kv, int head0, int nq, bool wanted, int i, int lane) {
    static_assert(UNIT + 2 <= STEP_WARPS, "a warp for each");
    const uint32_t normed = ANY ? h.p.normed : uint32_t(HEADS);
    if (normed == ALL_HEADS) square_all(h, s, d, i, lane);
    if (i >= nq + (wanted ? 2 : 0)) return;
    const Step& a = h.a;
    const int half = d / 2, neox = a.neox, first = 2 * lane;
    // A lane has two pairs, whose elements are two neighbours at e0 and two at e1.
    const bool mine = d == MAX_D || first < half;
    const Pair p(first, half, neox);
    const int e0 = p.i0, e1 = neox ? p.i1 : e0 + 2;
    const bool is_q = i < nq, is_v = i > nq;
    const float* x = is_q ? h.p.q + unsigned(head0 + i) * d : (is_v ? h.p.v : h.p.k) + unsigned(kv) * d;
    const float* w = is_q ? h.p.q_norm : is_v ? nullptr : h.p.k_norm;
    if (normed == ALL_HEADS && w) w += unsigned(is_q ? head0 + i : kv) * d;
    // Scores are exponents of two.
    float scale = is_q ? a.scale * 1.4426950408889634f : 1.0f;
    const float eps = is_q ? h.p.eps_q : h.p.eps_k;
    float2 x0 = {0.0f, 0.0f}, x1 = x0, c0 = {1.0f, 0.0f}, c1 = c0;
    uint2 w0 = {0, 0}, w1 = w0;
    if (mine) {
        const int turn = ANY ? first + (int(h.p.rope) - 1) * half : first;
        if (h.p.rope && !is_v) c0 = a.rope(turn), c1 = a.rope(turn + 1);
        if (w) w0 = ld8(w + e0), w1 = ld8(w + e1);
    }
    for (int e = d + 2 * lane; !EXACT && is_q && e < MAX_D; e += 2 * WARP) s.q.put(i, e, make_float2(0.0f, 0.0f));
    while (mine) {
        x0 = look(reinterpret_cast<const float2*>(x + e0)), x1 = look(reinterpret_cast<const float2*>(x + e1));
        if (!missing(x0.x) && !missing(x0.y) && !missing(x1.x) && !missing(x1.y)) break;
        spin();
    }
    // Lanes that came one after another from waiting would otherwise go on so.
    __syncwarp();
    auto weigh = [&](float2& a, float2& b) {
        a.x *= __uint_as_float(w0.x), a.y *= __uint_as_float(w0.y), b.x *= __uint_as_float(w1.x), b.y *= __uint_as_float(w1.y);
    };
    if (w && normed == ALL_HEADS) {
        scale *= norm_scale(s.squares[is_q ? 0 : 1], (is_q ? a.n_head : a.n_head_kv) * d, eps);
        weigh(x0, x1);
    } else if (w && normed == HEADS) {
        const float sum = warp_sum(x0.x * x0.x + x0.y * x0.y + (x1.x * x1.x + x1.y * x1.y));
        weigh(x0, x1);
        scale *= rsqrtf((EXACT ? sum * (1.0f / d) : quotient(sum, float(d))) + eps);
    }
    // First elements of both pairs, second elements of both pairs.
    const float2 z0 = {x0.x, neox ? x0.y : x1.x}, z1 = {neox ? x1.x : x0.y, x1.y};
    const float by = normed == ROTATED_HEADS ? 1.0f : scale;
    const float2 y0 = {by * (z0.x * c0.x - z1.x * c0.y), by * (z0.y * c1.x - z1.y * c1.y)};
    const float2 y1 = {by * (z0.x * c0.y + z1.x * c0.x), by * (z0.y * c1.y + z1.y * c1.x)};
    float2 r0 = {y0.x, neox ? y0.y : y1.x}, r1 = {neox ? y1.x : y0.y, y1.y};
    if (normed == ROTATED_HEADS) {
        // Rotations may change lengths.
        if (w) {
            scale *= rsqrtf(quotient(warp_sum(r0.x * r0.x + r0.y * r0.y + (r1.x * r1.x + r1.y * r1.y)), float(d)) + eps);
            weigh(r0, r1);
        }
        r0.x *= scale, r0.y *= scale, r1.x *= scale, r1.y *= scale;
    }
    if (!mine) return;
    if (is_q) {
        s.q.put(i, e0, r0), s.q.put(i, e1, r1);
    } else {
        uint16_t* to = is_v ? s.v : s.k;
        *reinterpret_cast<uint32_t*>(to + e0) = halves(r0.x, r0.y), *reinterpret_cast<uint32_t*>(to + e1) = halves(r1.x, r1.y);
    }
}

// What a split has of two elements: their sums, the maximum of its scores (or, with every second pair, their sum of powers), and a tag that says of
// which phase of which launch. Word `pair` of a head and a split.
__device__ __forceinline__ uint4* part_at(const Step& a, int d, int head, int split, int pair) {
    return a.part + ((unsigned(head) * a.max_splits + split) * unsigned(d) / 2 + pair);
}
__device__ __forceinline__ uint4 part_of(float x0, float x1, float ml, uint32_t tag) {
    return make_uint4(__float_as_uint(x0), __float_as_uint(x1), __float_as_uint(ml), tag);
}

// Four sums of a head, their maximum and sum of powers.
struct Four {
    float x[4] = {}, m = -INFINITY, l = 0.0f;

    __device__ __forceinline__ void scale(float f) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] *= f;
        l *= f;
    }
    // Adds what another split has, once it is there.
    __device__ __forceinline__ void add(const uint4* part, uint32_t tag) {
        uint4 a = look(part), b = look(part + 1);
        while (a.w != tag || b.w != tag) {
            spin();
            a = look(part), b = look(part + 1);
        }
        const float other = __uint_as_float(a.z), top = fmaxf(m, other), f = power_of_two(other - top);
        scale(power_of_two(m - top));
        x[0] += f * __uint_as_float(a.x), x[1] += f * __uint_as_float(a.y), x[2] += f * __uint_as_float(b.x), x[3] += f * __uint_as_float(b.y);
        l += f * __uint_as_float(b.z), m = top;
    }
};

// Joins this block's share of the elements of a unit's heads, four at a time: a lane for each split, or for several.
__device__ __forceinline__ void join_splits(const Here& h, int d, int head0, int nq, int split, int n_split) {
    const Step& a = h.a;
    const int n = nq * d / 4, bits = min(32 - __clz(n_split - 1), 5), lane = threadIdx.x % WARP, team = lane & ((1 << bits) - 1);
#pragma unroll 1
    for (int k0 = (threadIdx.x - lane) >> bits; split + n_split * k0 < n; k0 += blockDim.x >> bits) {
        const int i = split + n_split * (k0 + (lane >> bits)), c = min(i, n - 1), head = head0 + 4 * c / d, e = 4 * c % d;
        Four sum;
#pragma unroll 1
        for (int p = team; p < n_split; p += WARP) sum.add(part_at(a, d, head, p, e / 2), a.turn + h.phase);
        __syncwarp();
        float top = sum.m;
#pragma unroll 1
        for (int o = 1 << bits >> 1; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        sum.scale(power_of_two(sum.m - top));
#pragma unroll 1
        for (int o = 1 << bits >> 1; o > 0; o /= 2) {
            sum.l += __shfl_xor_sync(ALL, sum.l, o);
#pragma unroll
            for (int j = 0; j < 4; j++) sum.x[j] += __shfl_xor_sync(ALL, sum.x[j], o);
        }
        if (team == 0 && i < n) {
            // No product is a SENTINEL.
            const float f = reciprocal(sum.l);
            show(reinterpret_cast<float4*>(h.p.out + unsigned(head) * d + e), make_float4(f * sum.x[0], f * sum.x[1], f * sum.x[2], f * sum.x[3]));
            if (e == 0) h.p.head_ml[head] = make_float2(top, sum.l);
        }
    }
}

// Blocks that share the pages of a unit. What they wait for each other costs as much as several pages, more with each of them.
__device__ __forceinline__ int splits_of(const Step& a, int n_pages) {
    const int each = a.each, all = divided(n_pages + each - 1, each), half = divided(2 * n_pages + each - 1, each);
    return max(1, min(int(a.max_splits), max(min(half, 8), all)));
}
// Pages of the layer that the token may see something of, the last ones. ANY: attention may have windows and sinks.
template <bool ANY> __device__ __forceinline__ int pages_in_reach(const Here& h) {
    const uint32_t n = h.a.n_pages(h.p.layer);
    return ANY ? min(n, h.p.most_pages) : n;
}
// Whether this block takes part.
template <bool ANY> __device__ __forceinline__ bool is_attending(const uint32_t phase) {
    const Here h = here(phase);
    return blockIdx.x < h.a.units * splits_of(h.a, pages_in_reach<ANY>(h));
}
// How many rows of a page at position `first` lie before the window.
__device__ __forceinline__ int rows_before(const Here& h, uint32_t first) { return int(h.a.pos()) - int(h.p.window) + 1 - int(first); }
// The score of a head that has no key, an exponent of two.
__device__ __forceinline__ float sink_of(const Here& h, int head) { return h.p.sinks[head] * 1.4426950408889634f; }
// Below any score, so that what nobody sees anything of comes to nothing beside others.
constexpr float LEAST = -1e30f;

// What part of the work a block has: of the pages in reach, numbered from the first of them on.
struct Task {
    int split, kv, tile, from, to;

    __device__ __forceinline__ Task(const Step& a, int task, int n_split, int n_pages) {
        const int units = a.units, tiles = a.tiles;
        split = divided(task, units);
        const int unit = task - split * units;
        kv = divided(unit, tiles), tile = unit - kv * tiles;
        // As `share` has it.
        const int each = divided(n_pages, n_split), rest = n_pages - each * n_split;
        from = each * split + min(split, rest), to = from + each + (split < rest);
    }
};

// Puts the current key and value where they belong in the pool; a warp for each.
__device__ __forceinline__ void store_token(const Here& h, const AttendShared& s, int d, int kv, int warp, int lane) {
    if (warp > 1 || 8 * lane >= d) return;
    const size_t row = (size_t(h.a.place(h.p.layer)) * h.a.n_head_kv + kv) * d + 8 * lane;
    *reinterpret_cast<uint4*>((warp ? h.p.pool_v : h.p.pool_k) + row) = *reinterpret_cast<const uint4*>((warp ? s.v : s.k) + 8 * lane);
}
