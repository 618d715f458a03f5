// Attention of up to eight queries of a warp to the pages of one key/value head, on tensor cores.
//
// Scores are q k^T with the queries split into the sum of two f16, which take rows 0..8 and 8..16 of the tile; values are v^T p. The
// order of dimensions within a product does not matter, so keys and values are loaded in units of 16 bytes and used as they come.
#pragma once
#include "types.cuh"

constexpr int UNIT = 8;  // queries of a warp
constexpr int MAX_D = 128;

__device__ __forceinline__ void split_half(float x, uint16_t& hi, uint16_t& lo) {
    hi = float_to_half(x);
    lo = float_to_half(x - half_to_float(hi));
}

// Queries as the sum of two f16, zero beyond head_dim. A word of the one is followed by that of the other, as products want them; rows
// are 16 bytes longer than they must be, so that lanes which read them together meet different banks.
struct Queries {
    uint32_t w[UNIT][MAX_D + 4];

    __device__ __forceinline__ void put(int i, int e, float x) {
        uint16_t* at = reinterpret_cast<uint16_t*>(w[i] + e / 2 * 2) + e % 2;
        split_half(x, at[0], at[2]);
    }
    // Elements e and e + 1, e even.
    __device__ __forceinline__ void put(int i, int e, const float2& x) {
        uint16_t hi[2], lo[2];
        split_half(x.x, hi[0], lo[0]), split_half(x.y, hi[1], lo[1]);
        *reinterpret_cast<uint2*>(w[i] + e) = make_uint2(hi[0] | uint32_t(hi[1]) << 16, lo[0] | uint32_t(lo[1]) << 16);
    }
    // What a lane has of dimensions 32 c + 8 t .. of query g: the first four, or the others.
    __device__ __forceinline__ void part(int g, int t, int c, int i, uint32_t (&a)[4]) const {
        const uint4 v = *reinterpret_cast<const uint4*>(w[g] + 32 * c + 8 * t + 4 * i);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    }
};

// The pool of a layer.
struct Pool {
    const uint16_t* k;  // (slots, PAGE, n_kv, d) f16
    const uint16_t* v;
    int n_kv;
    int d;              // a multiple of 8, at most MAX_D
};

// Brings keys and values of a page and a head to the L2 cache; a lane asks for a row of each.
__device__ __forceinline__ void bring_page(const Pool& pool, uint32_t slot, int kv) {
    const size_t row = size_t(slot) * PAGE + threadIdx.x % PAGE, at = (row * pool.n_kv + kv) * pool.d + threadIdx.x % WARP / PAGE * 64;
    if (threadIdx.x % WARP / PAGE * 64 < unsigned(pool.d)) bring(pool.k + at), bring(pool.v + at);
}

// Row of a lane's value i of four.
__device__ __forceinline__ int value_row(int i) { return 2 * int(threadIdx.x % 4) + (i % 2) + 8 * (i / 2); }

// Keys and values of a page and a head, as a warp's lanes hold them; lane = 4 g + t.
// NC chunks of 32 dimensions of a key, NJ chunks of 64 dimensions of a value; EXACT: head_dim is 32 NC, not less.
template <int NC, int NJ, bool EXACT> struct PageOf {
    static_assert(!EXACT || 32 * NC == 64 * NJ, "one width");
    uint4 k[NC][2];  // keys g and g + 8, dimensions 32 c + 8 t ..
    uint4 v[4][NJ];  // values 2t, 2t + 1, 2t + 8, 2t + 9, dimensions 64 j + 8 g ..

    // Rows behind the first `rows` have not been written by this sequence; their values may be anything, so they are not read.
    __device__ __forceinline__ void load(const Pool& pool, uint32_t slot, int kv, int rows) {
        load_keys(pool, slot, kv);
        load_values(pool, slot, kv, rows);
    }
    __device__ __forceinline__ void load_keys(const Pool& pool, uint32_t slot, int kv) {
        const int d = EXACT ? 32 * NC : pool.d, g = (threadIdx.x % WARP) / 4, t = threadIdx.x % 4, row = pool.n_kv * d;
        const uint16_t* kp = pool.k + size_t(slot) * PAGE * row + kv * d + g * row + 8 * t;
#pragma unroll
        for (int i = 0; i < 2; i++, kp += 8 * row) {
#pragma unroll
            for (int c = 0; c < NC; c++) {
                if (!EXACT) k[c][i] = make_uint4(0, 0, 0, 0);
                if (EXACT || 32 * c + 8 * t < d) k[c][i] = fresh16(kp + 32 * c);
            }
        }
    }
    __device__ __forceinline__ void load_values(const Pool& pool, uint32_t slot, int kv, int rows) {
        const int d = EXACT ? 32 * NC : pool.d, g = (threadIdx.x % WARP) / 4, t = threadIdx.x % 4, row = pool.n_kv * d;
        const uint16_t* vp = pool.v + size_t(slot) * PAGE * row + kv * d + 2 * t * row + 8 * g;
#pragma unroll
        for (int i = 0; i < 4; i++, vp += i == 2 ? 7 * row : row) {
            const bool written = value_row(i) < rows;
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                v[i][j] = make_uint4(0, 0, 0, 0);
                if (written && (EXACT || 64 * j + 8 * g < d)) v[i][j] = fresh16(vp + 64 * j);
            }
        }
    }
    __device__ __forceinline__ const uint4& key(int c, int i) const { return k[c][i]; }
    // Puts a key of d elements, in shared memory, in the place of row `row`; a value likewise.
    __device__ __forceinline__ void replace_key(int row, const uint16_t* key, int d) {
        const int g = (threadIdx.x % WARP) / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int c = 0; c < NC; c++) {
                if (g + 8 * i == row && (EXACT || 32 * c + 8 * t < d)) k[c][i] = *reinterpret_cast<const uint4*>(key + 32 * c + 8 * t);
            }
        }
    }
    __device__ __forceinline__ void replace_value(int row, const uint16_t* value, int d) {
        const int g = (threadIdx.x % WARP) / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                if (value_row(i) == row && (EXACT || 64 * j + 8 * g < d)) v[i][j] = *reinterpret_cast<const uint4*>(value + 64 * j + 8 * g);
            }
        }
    }
};

// Sums over pages, of eight heads: head g's maximum and sum; the values' sums of heads 2t and 2t + 1.
template <int NJ> struct Sums {
    float m = -INFINITY, l = 0.0f;
    float o[4 * NJ][4] = {};
};

// What the values of a page are multiplied by, and what the sums so far are: a lane's part.
struct Shares {
    uint32_t b[2];
    float old[2];
};

// Scores of head g with keys 2t, 2t + 1, 2t + 8, 2t + 9 of a page, from products with the two parts of the queries.
struct Scores {
    float e[4];
    __device__ __forceinline__ Scores(const float (&c0)[4], const float (&c1)[4]) : e{c0[0] + c0[2], c0[1] + c0[3], c1[0] + c1[2], c1[1] + c1[3]} {}
};

// Rows of a page that a query sees, and what becomes of their scores: the first so many, as they are; or `n` from `from` on, bounded by
// a `cap` that is not 0.
struct Seen {
    int from, n;
    float cap;
};
__device__ __forceinline__ bool sees(int rows, int row) { return row < rows; }
__device__ __forceinline__ bool sees(const Seen& s, int row) { return unsigned(row - s.from) < unsigned(s.n); }
__device__ __forceinline__ void bound(int, float (&)[4]) {}
__device__ __forceinline__ void bound(const Seen& s, float (&e)[4]) {
    if (s.cap == 0.0f) return;
#pragma unroll
    for (int i = 0; i < 4; i++) e[i] = soft_cap(e[i], s.cap);
}

// What the keys of a page come to. `rows`: those that query g may see; `ml` becomes maximum and sum of exponentials of the page.
// TWO: scores are exponents of two, else of e.
template <bool TWO> __device__ __forceinline__ float power(float x) { return TWO ? power_of_two(x) : __expf(x); }
template <bool TWO = false, int NJ, class Rows> __device__ __forceinline__ Shares share_out(Scores scores, Rows rows, Sums<NJ>& sum, float2& ml) {
    const int t = threadIdx.x % 4;
    float(&e)[4] = scores.e;
    bound(rows, e);
    float mp = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!sees(rows, value_row(i))) e[i] = -INFINITY;
        mp = fmaxf(mp, e[i]);
    }
    mp = fmaxf(mp, __shfl_xor_sync(ALL, mp, 1));
    mp = fmaxf(mp, __shfl_xor_sync(ALL, mp, 2));
    // A page that a query does not see at all has no maximum.
    const float top = mp == -INFINITY ? 0.0f : mp;
    float lp = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) e[i] = power<TWO>(e[i] - top), lp += e[i];
    lp += __shfl_xor_sync(ALL, lp, 1);
    lp += __shfl_xor_sync(ALL, lp, 2);
    const float m_new = fmaxf(sum.m, mp), at = m_new == -INFINITY ? 0.0f : m_new, f_old = power<TWO>(sum.m - at), f_new = power<TWO>(mp - at);
    sum.m = m_new, sum.l = sum.l * f_old + lp * f_new;
#pragma unroll
    for (int i = 0; i < 4; i++) e[i] *= f_new;
    ml = make_float2(mp, lp);
    return {{halves(e[0], e[1]), halves(e[2], e[3])}, {__shfl_sync(ALL, f_old, 8 * t), __shfl_sync(ALL, f_old, 8 * t + 4)}};
}

// The keys of a page, `key(c, i)` as `PageOf` has them.
template <int NC, bool TWO = false, int NJ, class Keys, class Rows>
__device__ __forceinline__ Shares attend_keys(const Keys& keys, const Queries& q, Rows rows, Sums<NJ>& sum, float2& ml) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float c0[4] = {}, c1[4] = {};
#pragma unroll
    for (int c = 0; c < NC; c++) {
        const uint4 k0 = keys.key(c, 0), k1 = keys.key(c, 1);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[4];
            q.part(g, t, c, i, a);
            mma_16816(c0, a, {word(k0, 2 * i), word(k0, 2 * i + 1)});
            mma_16816(c1, a, {word(k1, 2 * i), word(k1, 2 * i + 1)});
        }
    }
    return share_out<TWO>(Scores(c0, c1), rows, sum, ml);
}

// The values of a page.
template <int NC, int NJ, bool EXACT> __device__ __forceinline__ void attend_values(const PageOf<NC, NJ, EXACT>& pg, const Shares& s, Sums<NJ>& sum) {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float(&o)[4] = sum.o[4 * j + w];
            o[0] *= s.old[0], o[1] *= s.old[1], o[2] *= s.old[0], o[3] *= s.old[1];
            const uint32_t v0 = word(pg.v[0][j], w), v1 = word(pg.v[1][j], w), v2 = word(pg.v[2][j], w), v3 = word(pg.v[3][j], w);
            const uint32_t a[4] = {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)};
            mma_16816(o, a, s.b);
        }
    }
}
