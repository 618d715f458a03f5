// Attention of a step to pages of any tier, the first of which is f16.
//
// A block's pages are divided among its warps. A warp does a page with tensor cores: scores are q k^T with the queries split into the sum of
// two f16 (rows 0..8 and 8..16 of the tile), values v^T p. Keys of its first page are loaded while queries are not there yet: all but the
// row of the current token were written by earlier steps.
#pragma once
#include "step_attend_common.cuh"

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
        if (tier.type_k == F16)
            return bring_page({reinterpret_cast<const uint16_t*>(tier.k), reinterpret_cast<const uint16_t*>(tier.v), n_kv, d}, slot_of(entry), kv);
        for (int i = 128 * (threadIdx.x % WARP); i < bytes(tier.type_k); i += 128 * WARP) bring(page(tier.k, tier.type_k, entry) + i);
        for (int i = 128 * (threadIdx.x % WARP); i < bytes(tier.type_v); i += 128 * WARP) bring(page(tier.v, tier.type_v, entry) + i);
    }
};

// Rows of a page but for the first `gone`, of which only ANY has some.
template <bool ANY> __device__ __forceinline__ auto rows_seen(int gone, int rows) {
    if constexpr (ANY) {
        return Seen{gone, rows - gone, 0.0f};
    } else {
        return rows;
    }
}

template <int NC, int NJ, bool EXACT, bool ANY> __device__ __forceinline__ void attend_tiers(const uint32_t phase) {
    const Here h = here(phase);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    const int d = EXACT ? 32 * NC : int(a.head_dim), group = a.group, units = a.units;
    const int n_warp = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n_pages = pages_in_reach<ANY>(h), pos = a.pos();
    const int beyond = ANY ? int(a.n_pages(h.p.layer)) - n_pages : 0;  // pages that are not
    const uint2* pages = h.p.pages + beyond;
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
            entry = pages[p];
            tiers.ask(keys, entry);
        }
        for (int later = p; later < to; later += n_warp) tiers.bring_stored(pages[later]);
        current_token<EXACT, ANY>(h, s, d, kv, head0, nq, to == n_pages, warp, lane);
        block_barrier();
        if (task == int(blockIdx.x)) trace(h, 0);
        Sums<NJ> sum;
        if (ANY && h.p.sinks && to == n_pages && warp == 0 && g < nq) sum.m = sink_of(h, head0 + g), sum.l = 1.0f;
#pragma unroll 1
        while (p < to) {
            const int rows = min(PAGE, pos - int(entry.y) + 1), current = p == n_pages - 1 ? rows - 1 : PAGE;
            float2 ml;
            const int gone = ANY && h.p.window != NO_WINDOW ? min(max(0, rows_before(h, entry.y)), rows) : 0;
            if (tier_of(entry) > 0) {
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
                    entry = pages[p];
                    tiers.ask(keys, entry);
                }
                const Shares shares = share_out<true>(scores, rows_seen<ANY>(gone, PAGE), sum, ml);
                if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + beyond + seen] = ml;
                values.add(tier.type_v, shares, sum);
                continue;
            }
            PageOf<NC, NJ, EXACT> page;
            page.load_values(pool, entry.x, kv, current);
            keys.wait(current, s.k, d);
            const Shares shares = attend_keys<NC, true>(keys, s.q, rows_seen<ANY>(gone, rows), sum, ml);
            __syncwarp();
            if (h.p.page_ml && t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + beyond + p] = ml;
            p += n_warp;
            if (p < to) {
                entry = pages[p];
                tiers.ask(keys, entry);
            }
            if (current < PAGE) page.replace_value(current, s.v, d);
            attend_values(page, shares, sum);
        }
        if (warp < used) {
            if (t == 0) s.ml[warp][g] = make_float2(ANY ? fmaxf(sum.m, LEAST) : sum.m, sum.l);
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
        if (to == n_pages) store_token(h, s, d, kv, warp, lane);
        block_barrier();
    }
    trace(h, 1);
}
