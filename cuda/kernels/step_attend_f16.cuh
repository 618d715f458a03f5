// Attention of a step to pages that are all f16.
//
// A block takes its pages from the last one on, in rounds of up to eight. Half of its warps find scores, each those of a page, with tensor cores:
// q k^T with the queries split into the sum of two f16 (rows 0..8 and 8..16 of the tile). They show them to the other half, of which a warp
// has 16 elements of the values of all pages, v^T p, so that what it adds up is a piece of the output that need not be joined with those of
// others. Each of these makes the exponentials for itself: that is less than to wait for them once more. Keys and values of the first round are
// in registers when queries come: all but the row of the current token were written by earlier steps.
#pragma once
#include "step_attend_common.cuh"

constexpr int ROUND = STEP_WARPS / 2;

// Shared memory of the phase behind `AttendShared`: scores, as the lanes of a warp have them, of one round and of the next.
using Shown = float4[2][ROUND][WARP];

// Scores of a page as a lane has them: head g with keys 2t, 2t + 1, 2t + 8, 2t + 9. NC chunks of 32 dimensions of keys g and g + 8.
template <int NC> __device__ __forceinline__ float4 scores_of(const Queries& q, const uint4 (&key)[ROUND], int g, int t) {
    // Sums of half the products each, since they come one after the other.
    float c[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < NC; k++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[4];
            q.part(g, t, k, i, a);
#pragma unroll
            for (int r = 0; r < 2; r++) mma_16816(c[r][i], a, {word(key[2 * k + r], 2 * i), word(key[2 * k + r], 2 * i + 1)});
        }
    }
    auto sum = [&](int r, int i) { return (c[r][0][i] + c[r][1][i]) + (c[r][0][i + 2] + c[r][1][i + 2]); };
    return make_float4(sum(0, 0), sum(0, 1), sum(1, 0), sum(1, 1));
}
__device__ __forceinline__ float largest(const float4& x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }
__device__ __forceinline__ float4 powers(const float4& x, float less) {
    return make_float4(power_of_two(x.x - less), power_of_two(x.y - less), power_of_two(x.z - less), power_of_two(x.w - less));
}
// Over the lanes of a head.
__device__ __forceinline__ float head_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ float head_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

template <int NC, int NJ, bool EXACT, bool ANY> __device__ __forceinline__ void attend_f16(const uint32_t phase) {
    static_assert(2 * NC <= ROUND && 4 * NJ <= STEP_WARPS - ROUND, "a warp for each page of a round and for each piece of the output");
    const Here h = here(phase);
    const Step& a = h.a;
    AttendShared& s = *reinterpret_cast<AttendShared*>(h.shared);
    Shown& shown = *reinterpret_cast<Shown*>(h.shared + sizeof(AttendShared));
    const int d = EXACT ? 32 * NC : int(a.head_dim), lane = threadIdx.x % WARP, warp = __shfl_sync(ALL, threadIdx.x / WARP, 0), g = lane / 4, t = lane % 4;
    // Of values a lane has elements e and e + 1 of rows 2t, 2t + 1, 2t + 8, 2t + 9, of the output the same elements of heads 2t and 2t + 1.
    const bool scores = warp < ROUND;
    const int e = 16 * (warp - ROUND) + 2 * g;
    const bool inside = (4 * NJ == STEP_WARPS - ROUND || warp < ROUND + 4 * NJ) && (EXACT || e < d);
    const int n_pages = pages_in_reach<ANY>(h), n_split = splits_of(a, n_pages);
    const int beyond = ANY ? int(a.n_pages(h.p.layer)) - n_pages : 0;  // pages that are not
    const unsigned row = a.n_head_kv * d;
#pragma unroll 1
    for (int task = blockIdx.x; task < int(a.units) * n_split; task += gridDim.x) {
        const Task mine(a, task, n_split, n_pages);
        const int kv = mine.kv, head0 = kv * int(a.group) + mine.tile * UNIT, nq = min(UNIT, int(a.group) - mine.tile * UNIT), n = mine.to - mine.from;
        // Page i of the block is pages[-i].
        const uint2* pages = h.p.pages + beyond + mine.to - 1;
        const bool newest = mine.to == n_pages;
        // What a lane reads of slot 0.
        const uint16_t* pool = scores ? h.p.pool_k + (unsigned(kv) * d + g * row + 8 * t) : h.p.pool_v + (unsigned(kv) * d + 2 * t * row + e);
        const bool tells = a.trace && threadIdx.x == 0 && task == int(blockIdx.x);
        int current = PAGE;  // row of the current token in page 0
        // Keys as `scores_of` has them, or the rows of values of each page.
        uint4 held[ROUND] = {};
        // Asks for what the warp needs of a round, given a slot a lane.
        auto ask = [&](const uint2& page, int round) {
            const int here = min(ROUND, n - round);
            if (scores) {
                const uint16_t* at = pool + uint64_t(__shfl_sync(ALL, page.x, warp)) * (PAGE * row);
#pragma unroll
                for (int i = 0; i < 2 * NC; i++) {
                    const int c = i / 2, r = i % 2;
                    if (warp < here && (EXACT || 32 * c + 8 * t < d)) held[i] = fresh16(at + r * 8 * row + 32 * c);
                }
            } else {
#pragma unroll
                for (int k = 0; k < ROUND; k++) {
                    if (k >= here) break;
                    const uint16_t* at = pool + uint64_t(__shfl_sync(ALL, page.x, k)) * (PAGE * row);
                    // Rows behind the current one have not been written by this sequence; their values may be anything, so they are not read.
                    const int written = k == 0 && round == 0 ? current - 2 * t : PAGE;
                    held[k] = make_uint4(0, 0, 0, 0);
                    if (inside && written > 0) held[k].x = fresh4(at);
                    if (inside && written > 1) held[k].y = fresh4(at + row);
                    if (inside && written > 8) held[k].z = fresh4(at + 8 * row);
                    if (inside && written > 9) held[k].w = fresh4(at + 9 * row);
                }
            }
        };
        float m = ANY ? LEAST : -INFINITY, l = 0.0f, o[2][4] = {};  // of head g; of heads 2t and 2t + 1
        if (ANY && h.p.sinks && newest && g < nq) m = sink_of(h, head0 + g), l = t == 0 ? 1.0f : 0.0f;
#pragma unroll 1
        for (int round = 0; round < n; round += ROUND) {
            // All slots of a round at once, a lane for each.
            const uint2 page = ld8(pages - min(round + lane % ROUND, n - 1));
            if (newest && round == 0) current = int(a.pos()) - int(__shfl_sync(ALL, page.y, 0));
            ask(page, round);
            if (round == 0) {
#pragma unroll 1
                for (int i = ROUND + warp; i < n; i += STEP_WARPS) bring_page({h.p.pool_k, h.p.pool_v, int(a.n_head_kv), d}, ld8(pages - i).x, kv);
                current_token<EXACT, ANY>(h, s, d, kv, head0, nq, newest, warp, lane);
                block_barrier();
                if (tells) trace(h, 0);
            }
            const int here = min(ROUND, n - round);
            const bool last = newest && round == 0;
            if (warp < here) {
                if (last && warp == 0) {
#pragma unroll
                    for (int i = 0; i < 2 * NC; i++) {
                        const int c = i / 2, r = i % 2;
                        if (g + 8 * r == current && (EXACT || 32 * c + 8 * t < d)) held[i] = *reinterpret_cast<const uint4*>(s.k + 32 * c + 8 * t);
                    }
                }
                float4 score = scores_of<NC>(s.q, held, g, t);
                if (last && warp == 0) {
                    const int seen = current - 2 * t;
                    if (seen < 0) score.x = -INFINITY;
                    if (seen < 1) score.y = -INFINITY;
                    if (seen < 8) score.z = -INFINITY;
                    if (seen < 9) score.w = -INFINITY;
                }
                if (ANY && h.p.window != NO_WINDOW) {
                    const int gone = rows_before(h, __shfl_sync(ALL, page.y, warp)) - 2 * t;
                    if (gone > 0) score.x = -INFINITY;
                    if (gone > 1) score.y = -INFINITY;
                    if (gone > 8) score.z = -INFINITY;
                    if (gone > 9) score.w = -INFINITY;
                }
                shown[round / ROUND % 2][warp][lane] = score;
            } else if (scores) {
                // Pages are looked at in twos.
                shown[round / ROUND % 2][warp][lane] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            } else if (last && inside) {
                const uint32_t v = *reinterpret_cast<const uint32_t*>(s.v + e);
                const int i = current - 2 * t;
                if (i == 0) held[0].x = v;
                if (i == 1) held[0].y = v;
                if (i == 8) held[0].z = v;
                if (i == 9) held[0].w = v;
            }
            block_barrier();
            const auto& seen = shown[round / ROUND % 2];
            if (scores) {
                if (warp >= here || !h.p.page_ml) continue;
                // Maximum and sum of powers of the page. What is smaller than any normal number beside the maximum is nothing.
                const float found = head_max(largest(seen[warp][lane])), top = ANY ? fmaxf(found, LEAST) : found;
                const float4 x = powers(seen[warp][lane], top);
                const float sum = head_sum((x.x + x.y) + (x.z + x.w));
                if (t == 0 && g < nq) h.p.page_ml[size_t(head0 + g) * a.max_pages + (beyond + mine.to - 1 - round - warp)] = make_float2(top, sum);
                continue;
            }
            // Scores are read twice, since registers are few.
            float top = m;
#pragma unroll
            for (int k = 0; k < ROUND; k += 2) {
                if (k >= here) break;
                top = fmaxf(top, fmaxf(largest(seen[k][lane]), largest(seen[k + 1][lane])));
            }
            top = head_max(top);
            if (ANY || round > 0) {
                const float old = power_of_two(m - top), old0 = __shfl_sync(ALL, old, 8 * t), old1 = __shfl_sync(ALL, old, 8 * t + 4);
                l *= old;
#pragma unroll
                for (int i = 0; i < 4; i++) o[0][i] *= i % 2 ? old1 : old0, o[1][i] *= i % 2 ? old1 : old0;
            }
            m = top;
#pragma unroll
            for (int k = 0; k < ROUND; k++) {
                // Of a page that is not there all powers are zero, and the values those of another.
                if (k % 2 == 0 && k >= here) break;
                const float4 y = powers(seen[k][lane], top);
                l += (y.x + y.y) + (y.z + y.w);
                const uint4 v = held[k];
                mma_16816(o[k % 2], {low_halves(v.x, v.y), high_halves(v.x, v.y), low_halves(v.z, v.w), high_halves(v.z, v.w)}, {halves(y.x, y.y), halves(y.z, y.w)});
            }
        }
        if (!scores) {
            l = head_sum(l);
            const float4 sum = make_float4(o[0][0] + o[1][0], o[0][1] + o[1][1], o[0][2] + o[1][2], o[0][3] + o[1][3]);
            const float2 ml0 = make_float2(__shfl_sync(ALL, m, 8 * t), __shfl_sync(ALL, l, 8 * t));
            const float2 ml1 = make_float2(__shfl_sync(ALL, m, 8 * t + 4), __shfl_sync(ALL, l, 8 * t + 4));
            const bool has0 = inside && 2 * t < nq, has1 = inside && 2 * t + 1 < nq;
            const int head = head0 + 2 * t;
            if (n_split == 1) {
                // No product is a SENTINEL.
                float* out = h.p.out + unsigned(head) * d + e;
                const float f0 = reciprocal(ml0.y), f1 = reciprocal(ml1.y);
                if (has0) show(reinterpret_cast<float2*>(out), make_float2(f0 * sum.x, f0 * sum.z));
                if (has1) show(reinterpret_cast<float2*>(out + d), make_float2(f1 * sum.y, f1 * sum.w));
                if (has0 && e == 0) h.p.head_ml[head] = ml0;
                if (has1 && e == 0) h.p.head_ml[head + 1] = ml1;
            } else {
                const uint32_t tag = a.turn + phase;
                uint4* part = part_at(a, d, head, mine.split, e / 2);
                if (has0) show(part, part_of(sum.x, sum.z, g % 2 ? ml0.y : ml0.x, tag));
                if (has1) show(part + a.max_splits * (d / 2), part_of(sum.y, sum.w, g % 2 ? ml1.y : ml1.x, tag));
            }
        }
        if (newest) store_token(h, s, d, kv, warp, lane);
        if (n_split > 1) join_splits(h, d, head0, nq, mine.split, n_split);
        block_barrier();
    }
    trace(h, 1);
}
