// The attention phase of a step, and what comes of the pages' masses.
//
// A unit is a key/value head with up to eight of the query heads that share it; the pages of a unit are split over blocks, a block's over
// its warps. A warp does a page with tensor cores: scores are q k^T with the queries split into the sum of two f16 (rows 0..8 and 8..16
// of the tile), values v^T p. Keys and values of its first page are loaded while queries are not there yet: all but the row of the current
// token were written by earlier steps. That row is computed here (norm, rotation), used from shared memory, and put in its place by the
// block of a unit that attends to the last page. The blocks of a unit join their parts together, each some of the elements.
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
};

// a / b of numbers below a million: the reciprocal errs by less than the half that is added.
__device__ __forceinline__ int divided(int a, int b) { return int((float(a) + 0.5f) * reciprocal(float(b))); }

// The queries of the unit and, if they are `wanted`, the current key and value behind norm and rotation into shared memory, a warp each. What
// stands in the rows of heads that the unit does not have comes to nothing but sums of heads that it does not have.
template <bool EXACT> __device__ __forceinline__ void current_token(const Here& h, AttendShared& s, int d, int kv, int head0, int nq, bool wanted, int warp, int lane) {
    const Step& a = h.a;
    const int n_warp = blockDim.x / WARP, half = d / 2, neox = a.neox, first = 2 * lane;
    // A lane has two pairs, whose elements are two neighbours at e0 and two at e1.
    const bool mine = first < half;
    const Pair p(first, half, neox);
    const int e0 = p.i0, e1 = neox ? p.i1 : e0 + 2;
    for (int i = warp; i < nq + (wanted ? 2 : 0); i += n_warp) {
        const bool is_q = i < nq, is_v = i > nq;
        const float* x = is_q ? h.p.q + unsigned(head0 + i) * d : (is_v ? h.p.v : h.p.k) + unsigned(kv) * d;
        const float* w = is_q ? h.p.q_norm : is_v ? nullptr : h.p.k_norm;
        float2 x0 = {0.0f, 0.0f}, x1 = x0, c0 = {1.0f, 0.0f}, c1 = c0;
        uint2 w0 = {0, 0}, w1 = w0;
        if (mine) {
            if (h.p.rope && !is_v) c0 = a.rope(first), c1 = a.rope(first + 1);
            if (w) w0 = ld8(w + e0), w1 = ld8(w + e1);
        }
        for (int e = d + 2 * lane; !EXACT && is_q && e < MAX_D; e += 2 * WARP) s.q.put(i, e, make_float2(0.0f, 0.0f));
        while (mine) {
            x0 = look(reinterpret_cast<const float2*>(x + e0)), x1 = look(reinterpret_cast<const float2*>(x + e1));
            if (!missing(x0.x) && !missing(x0.y) && !missing(x1.x) && !missing(x1.y)) break;
            spin();
        }
        // Scores are exponents of two.
        float scale = is_q ? a.scale * 1.4426950408889634f : 1.0f;
        if (w) {
            const float sum = warp_sum(x0.x * x0.x + x0.y * x0.y + (x1.x * x1.x + x1.y * x1.y));
            x0.x *= __uint_as_float(w0.x), x0.y *= __uint_as_float(w0.y), x1.x *= __uint_as_float(w1.x), x1.y *= __uint_as_float(w1.y);
            scale *= rsqrtf((EXACT ? sum * (1.0f / d) : quotient(sum, float(d))) + (is_q ? h.p.eps_q : h.p.eps_k));
        }
        // First elements of both pairs, second elements of both pairs.
        const float2 z0 = {x0.x, neox ? x0.y : x1.x}, z1 = {neox ? x1.x : x0.y, x1.y};
        const float2 y0 = {scale * (z0.x * c0.x - z1.x * c0.y), scale * (z0.y * c1.x - z1.y * c1.y)};
        const float2 y1 = {scale * (z0.x * c0.y + z1.x * c0.x), scale * (z0.y * c1.y + z1.y * c1.x)};
        const float2 r0 = {y0.x, neox ? y0.y : y1.x}, r1 = {neox ? y1.x : y0.y, y1.y};
        if (!mine) continue;
        if (is_q) {
            s.q.put(i, e0, r0), s.q.put(i, e1, r1);
        } else {
            uint16_t* to = is_v ? s.v : s.k;
            *reinterpret_cast<uint32_t*>(to + e0) = halves(r0.x, r0.y), *reinterpret_cast<uint32_t*>(to + e1) = halves(r1.x, r1.y);
        }
    }
}

// What a split has of two elements: their sums, the maximum of its scores (or, with every second pair, their sum of powers), and a tag that says of
// which phase of which launch. Word `pair` of a head and a split.
__device__ __forceinline__ uint4* part_at(const Step& a, int d, int head, int split, int pair) {
    return a.part + ((unsigned(head) * a.max_splits + split) * unsigned(d) / 2 + pair);
}
__device__ __forceinline__ uint4 part_of(float x0, float x1, float ml, uint32_t tag) { return make_uint4(__float_as_uint(x0), __float_as_uint(x1), __float_as_uint(ml), tag); }

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
// Whether this block takes part.
__device__ __forceinline__ bool is_attending(const uint32_t phase) {
    const Here h = here(phase);
    return blockIdx.x < h.a.units * splits_of(h.a, h.a.n_pages(h.p.layer));
}

// What part of the work a block has.
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

// The keys of a page and a head in shared memory of a warp, rows of NJ * 64 halves. Units of 16 bytes are mixed within eight so that the
// lanes that read them together meet different banks.
template <int NJ> struct KeysOf {
    unsigned char* to;

    __device__ __forceinline__ uint4* unit(int row, int u) const { return reinterpret_cast<uint4*>(to) + row * 8 * NJ + (u ^ row % 2 * 4); }
    __device__ __forceinline__ uint4 key(int c, int i) const { return *unit(threadIdx.x % WARP / 4 + 8 * i, 4 * c + threadIdx.x % 4); }
    // Asks for them; zeros are behind head_dim.
    __device__ __forceinline__ void ask(const Pool& pool, uint32_t slot, int kv) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 4 * NJ; i++) {
            const int row = (lane + WARP * i) / (8 * NJ), u = (lane + WARP * i) % (8 * NJ);
            if (8 * u < pool.d) {
                copy16(unit(row, u), pool.k + ((size_t(slot) * PAGE + row) * pool.n_kv + kv) * pool.d + 8 * u);
            } else {
                *unit(row, u) = make_uint4(0, 0, 0, 0);
            }
        }
    }
    // Asks for a page of a type that has it in one piece, which is not mixed.
    __device__ __forceinline__ void ask_stored(const uint8_t* page, int bytes) const {
        for (int i = threadIdx.x % WARP; i < bytes / 16; i += WARP) copy16(to + 16 * i, page + 16 * i);
    }
    // Room behind a page of k4.
    __device__ __forceinline__ uint32_t* pairs() const { return reinterpret_cast<uint32_t*>(to + PAGE * 64 * NJ); }
    // Waits for them, and puts a key of d elements in the place of row `row` if that is one of a page.
    __device__ __forceinline__ void wait(int row, const uint16_t* key, int d) const {
        const int u = threadIdx.x % WARP;
        copies_wait();
        __syncwarp();
        if (row < PAGE && 8 * u < d) *unit(row, u) = reinterpret_cast<const uint4*>(key)[u];
        __syncwarp();
    }
    // Bytes of a warp, which has the sums of n heads there afterwards.
    static __device__ __forceinline__ int bytes(int n, int d) { return (max(4 * n * (d + 1), PAGE * 128 * NJ) + 15) / 16 * 16; }
};

// The tiers of a pool, and a page of a head in one of them.
struct Tiers {
    const Phase& p;
    int n_kv, kv, d;

    __device__ __forceinline__ Tier of(const uint2& page) const {
        const uint32_t tier = tier_of(page);
        if (tier == 0) return {reinterpret_cast<const uint8_t*>(p.pool_k), reinterpret_cast<const uint8_t*>(p.pool_v), F16, F16};
        const Matrix& m = p.m[tier - 1];
        return {m.w, reinterpret_cast<const uint8_t*>(m.bias), m.type, m.n_out};
    }
    __device__ __forceinline__ const uint8_t* page(const uint8_t* pool, uint32_t type, const uint2& page) const {
        return page_at(pool, type, slot_of(page), n_kv, kv, d);
    }
    __device__ __forceinline__ int bytes(uint32_t type) const { return d / TILE_ROW * tile_bytes(type); }
    template <int NJ> __device__ __forceinline__ void ask(const KeysOf<NJ>& keys, const uint2& entry) const {
        const Tier tier = of(entry);
        if (tier.type_k == F16) {
            keys.ask({reinterpret_cast<const uint16_t*>(tier.k), nullptr, n_kv, d}, slot_of(entry), kv);
        } else {
            keys.ask_stored(page(tier.k, tier.type_k, entry), bytes(tier.type_k));
        }
    }
    // Brings a page to the L2 cache.
    __device__ __forceinline__ void bring_stored(const uint2& entry) const {
        const Tier tier = of(entry);
        if (tier.type_k == F16) return bring_page({reinterpret_cast<const uint16_t*>(tier.k), reinterpret_cast<const uint16_t*>(tier.v), n_kv, d}, slot_of(entry), kv);
        for (int i = 128 * (threadIdx.x % WARP); i < bytes(tier.type_k); i += 128 * WARP) bring(page(tier.k, tier.type_k, entry) + i);
        for (int i = 128 * (threadIdx.x % WARP); i < bytes(tier.type_v); i += 128 * WARP) bring(page(tier.v, tier.type_v, entry) + i);
    }
};

// TIERS: pages may be of any tier; the first is of f16. If not, all are of the first.
template <int NC, int NJ, bool EXACT, bool TIERS> __device__ __noinline__ uint32_t attend(const uint32_t at) {
    const uint32_t phase = at / 2;
    const Here h = here(phase);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    const int d = EXACT ? 32 * NC : int(a.head_dim), group = a.group, units = a.units;
    const int n_warp = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = a.n_pages(h.p.layer), pos = a.pos();
    const int n_split = splits_of(a, n_pages);
    const Pool pool = {h.p.pool_k, h.p.pool_v, int(a.n_head_kv), d};
    const int ldo = d + 1;  // of the sums, so that rows begin in different banks
#pragma unroll 1
    for (int task = blockIdx.x; task < units * n_split; task += gridDim.x) {
        const Task mine(a, task, n_split, n_pages);
        const int split = mine.split, kv = mine.kv, from = mine.from, to = mine.to;
        const int head0 = kv * group + mine.tile * UNIT, nq = min(UNIT, group - mine.tile * UNIT);
        const int used = min(n_warp, to - from);  // warps that have pages
        const int bytes = KeysOf<NJ>::bytes(nq, d);
        auto sums_of = [&](int w) { return reinterpret_cast<float*>(h.shared + sizeof(AttendShared) + w * bytes); };
        const KeysOf<NJ> keys = {reinterpret_cast<unsigned char*>(sums_of(warp))};
        const Tiers tiers = {h.p, int(a.n_head_kv), kv, d};
        int p = from + warp;
        // Keys of the first page, as earlier steps have written them, while queries are not there yet.
        uint2 entry = make_uint2(0, 0);
        if (p < to) {
            entry = h.p.pages[p];
            if (TIERS) tiers.ask(keys, entry);
            else keys.ask(pool, entry.x, kv);
        }
        for (int later = p; later < to; later += n_warp) {
            if (TIERS) tiers.bring_stored(h.p.pages[later]);
            else bring_page(pool, h.p.pages[later].x, kv);
        }
        current_token<EXACT>(h, s, d, kv, head0, nq, to == n_pages, warp, lane);
        block_barrier();
        if (task == int(blockIdx.x)) trace(h, 0);
        Sums<NJ> sum;
#pragma unroll 1
        while (p < to) {
            const int rows = min(PAGE, pos - int(entry.y) + 1), current = p == n_pages - 1 ? rows - 1 : PAGE;
            float2 ml;
            if (TIERS && tier_of(entry) > 0) {
                // Values are loaded behind the scores: registers are few.
                const Tier tier = tiers.of(entry);
                const uint8_t* at = tiers.page(tier.v, tier.type_v, entry);
                keys.wait(PAGE, s.k, d);
                const Scores scores = scores_of<NC>(tier.type_k, keys.to, d, s.q, keys.pairs());
                __syncwarp();
                StoredValues<NJ, false> values;
                values.load(tier.type_v, at, 0, d, PAGE);
                const int seen = p;
                p += n_warp;
                if (p < to) {
                    entry = h.p.pages[p];
                    tiers.ask(keys, entry);
                }
                const Shares shares = share_out<true>(scores, PAGE, sum, ml);
                if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + seen] = ml;
                values.add(tier.type_v, shares, sum);
                continue;
            }
            PageOf<NC, NJ, EXACT> page;
            page.load_values(pool, entry.x, kv, current);
            keys.wait(current, s.k, d);
            const Shares shares = attend_keys<NC, true>(keys, s.q, rows, sum, ml);
            __syncwarp();
            if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + p] = ml;
            p += n_warp;
            if (p < to) {
                entry = h.p.pages[p];
                if (TIERS) tiers.ask(keys, entry);
                else keys.ask(pool, entry.x, kv);
            }
            if (current < PAGE) page.replace_value(current, s.v, d);
            attend_values(page, shares, sum);
        }
        if (warp < used) {
            if (t == 0) s.ml[warp][g] = make_float2(sum.m, sum.l);
#pragma unroll
            for (int i = 0; i < 4 * NJ; i++) {
                const int e = 64 * (i / 4) + 8 * g + 2 * (i % 4);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float* o = sums_of(warp) + (2 * t + j) * ldo + e;
                    if (2 * t + j < nq && (EXACT || e < d)) o[0] = sum.o[i][j], o[1] = sum.o[i][j + 2];
                }
            }
        }
        block_barrier();
        // A warp joins 64 elements of a head, two a lane; a lane has the factor of the warp of its number.
#pragma unroll 1
        for (int i = warp; i < nq * NJ; i += n_warp) {
            const int q = i / NJ, e = i % NJ * 64 + 2 * lane;
            const float2 ml = lane < used ? s.ml[lane][q] : make_float2(-INFINITY, 0.0f);
            const float m = warp_max(ml.x), mine = power_of_two(ml.x - m), l = warp_sum(mine * ml.y);
            float x0 = 0.0f, x1 = 0.0f;
#pragma unroll 4
            for (int w = 0; w < used; w++) {
                const float f = __shfl_sync(ALL, mine, w), *o = sums_of(w) + q * ldo + e;
                x0 += f * o[0], x1 += f * o[1];
            }
            if (!EXACT && e >= d) continue;
            if (n_split == 1) {
                const float f = reciprocal(l);
                show(reinterpret_cast<float2*>(h.p.out + unsigned(head0 + q) * d + e), make_float2(f * x0, f * x1));
                if (e == 0) h.p.head_ml[head0 + q] = make_float2(m, l);
            } else {
                show(part_at(a, d, head0 + q, split, e / 2), part_of(x0, x1, lane % 2 ? l : m, a.turn + phase));
            }
        }
        if (n_split > 1) join_splits(h, d, head0, nq, split, n_split);
        if (to == n_pages) {
            // The block that attends to the last page puts the current key and value there.
            const size_t row = (size_t(a.place(h.p.layer)) * a.n_head_kv + kv) * d;
            if (warp < 2 && 8 * lane < d) *reinterpret_cast<uint4*>((warp ? h.p.pool_v : h.p.pool_k) + row + 8 * lane) = *reinterpret_cast<const uint4*>((warp ? s.v : s.k) + 8 * lane);
        }
        block_barrier();
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
        const int n_pages = a.n_pages(il);
        for (int i = threadIdx.x; i < n_head; i += blockDim.x) {
            const float2 ml = fresh(h.p.head_ml + il * n_head + i);
            all[i] = make_float2(ml.x, quotient(1.0f, ml.y));
        }
        block_barrier();
        for (int p = threadIdx.x; p < n_pages; p += blockDim.x) {
            float w = 0.0f;
            for (int i = 0; i < n_head; i++) {
                const float2 ml = fresh(h.p.page_ml + (size_t(il) * n_head + i) * a.max_pages + p);
                const float mass = ml.y * power_of_two(ml.x - all[i].x) * all[i].y;
                w = a.mean ? w + mass : fmaxf(w, mass);
            }
            h.p.mass[size_t(il) * a.max_pages + p] = a.mean ? w / float(n_head) : w;
        }
        block_barrier();
    }
    trace(h, 1);
    return at;
}
