// The same of pages of any tier: attention on tensor cores to keys and values that are stored as pages.cuh says.
//
// Whole numbers of few bits are exact in f16, so keys of q8_0 and q4_0 are multiplied as they are, and their scores with the scales of their
// blocks, which are the chunks of 32 dimensions that a lane's products go by. Of k4 and v2 every number but the very largest is
// exact in f16 itself. Values of q8_0 and q4_0 are rounded to f16, as the weights are that they are multiplied with.
#pragma once
#include "attend.cuh"
#include "pages.cuh"

// Halves of 1024: what `low_wide` and `high_wide` add to a byte.
constexpr uint32_t WIDE = 0x64006400;

// Four bytes as halves, less what `less` has beyond 1024.
__device__ __forceinline__ uint2 bytes_to_halves(uint32_t w, uint32_t less) { return make_uint2(sub_halves(low_wide(w), less), sub_halves(high_wide(w), less)); }
__device__ __forceinline__ uint4 eight_to_halves(uint32_t w0, uint32_t w1, uint32_t less) {
    const uint2 a = bytes_to_halves(w0, less), b = bytes_to_halves(w1, less);
    return make_uint4(a.x, a.y, b.x, b.y);
}

// Eight values as they were loaded: bytes, then the scale of their block.
template <class T> __device__ __forceinline__ uint4 scaled_values(const uint4& raw) {
    const uint32_t s = raw.z | raw.z << 16;
    return each(T::eight(make_uint2(raw.x, raw.y), threadIdx.x % WARP / 4 % 4), [&](uint32_t w) { return mul_halves(w, s); });
}
// Keys of a type of rows, as `keys` below.
template <class T> __device__ __forceinline__ void row_keys(const uint8_t* page, int d, int c, uint4 (&k)[2]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) k[i] = T::eight(*reinterpret_cast<const uint2*>(page + T::at(d, g + 8 * i, 32 * c + 8 * t)), t);
}
struct RowsF16 {
    static __device__ __forceinline__ uint4 values(const uint4& raw) { return raw; }
};

// Keys g and g + 8 of a page, dimensions 32 c + 8 t .. of them; lane = 4 g + t. Where they are SCALED, `scales` are those of the scores that
// a lane has.
struct RowsQ8 {
    static constexpr bool SCALED = true;
    static __device__ __forceinline__ uint4 eight(const uint2& q, int) { return eight_to_halves(q.x ^ 0x80808080u, q.y ^ 0x80808080u, 0x64806480u); }
    static __device__ __forceinline__ uint4 values(const uint4& raw) { return scaled_values<RowsQ8>(raw); }
    static __device__ __forceinline__ int at(int d, int row, int e) { return row * d + e; }
    static __device__ __forceinline__ int scales_at(int d) { return PAGE * d; }
    static __device__ __forceinline__ void prepare(const uint8_t*, int, uint32_t*) {}
    static __device__ __forceinline__ void keys(const uint8_t* page, int d, int c, const uint32_t*, uint4 (&k)[2]) {
        row_keys<RowsQ8>(page, d, c, k);
    }
};
struct RowsQ4 {
    static constexpr bool SCALED = true;
    // Unit u of a block of 32: eight low or high halves of eight bytes.
    static __device__ __forceinline__ uint4 eight(const uint2& q, int u) {
        const int by = u / 2 * 4;
        return eight_to_halves(q.x >> by & 0x0f0f0f0fu, q.y >> by & 0x0f0f0f0fu, 0x64086408u);
    }
    static __device__ __forceinline__ uint4 values(const uint4& raw) { return scaled_values<RowsQ4>(raw); }
    static __device__ __forceinline__ int at(int d, int row, int e) { return (row * d + e / TILE_ROW * TILE_ROW) / 2 + e % 16; }
    static __device__ __forceinline__ int scales_at(int d) { return PAGE * d / 2; }
    static __device__ __forceinline__ void prepare(const uint8_t*, int, uint32_t*) {}
    static __device__ __forceinline__ void keys(const uint8_t* page, int d, int c, const uint32_t*, uint4 (&k)[2]) {
        row_keys<RowsQ4>(page, d, c, k);
    }
};
struct TilesK4 {
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ int scales_at(int) { return 0; }
    // Scales of pairs of channels, then what is added, as halves: the lanes decode them once for all.
    static __device__ __forceinline__ void prepare(const uint8_t* page, int d, uint32_t* pairs) {
        for (int i = threadIdx.x % WARP; i < d / 2; i += WARP) {
            const uint16_t* tile = reinterpret_cast<const uint16_t*>(page + tile_bytes(K4) * (i / 16)) + i % 16;
            const uint32_t scales = tile[128], zeros = tile[144];
            const float s0 = byte_scale(scales & 0xff), s1 = byte_scale(scales >> 8);
            pairs[i] = halves(s0, s1), pairs[d / 2 + i] = halves(byte_zero(zeros, s0, 1.0f), byte_zero(zeros >> 8, s1, 1.0f));
        }
        __syncwarp();
    }
    static __device__ __forceinline__ void keys(const uint8_t* page, int d, int c, const uint32_t* pairs, uint4 (&k)[2]) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const uint8_t* tile = page + tile_bytes(K4) * c;
        const uint4* words = reinterpret_cast<const uint4*>(tile) + 2 * t;
        const uint4 lo[2] = {words[0], words[8]}, hi[2] = {words[1], words[9]};
        const uint4 scales = reinterpret_cast<const uint4*>(pairs)[4 * c + t], zeros = reinterpret_cast<const uint4*>(pairs + d / 2)[4 * c + t];
        // Of key g, then of key g + 8, which lies where g does in the second half.
        const int by = 4 * g, turn = (4 * g + 16) % 32;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4& both = i < 2 ? lo[h] : hi[h];
                const uint32_t x0 = word(both, 2 * i % 4), x1 = word(both, 2 * i % 4 + 1);
                // The code of one channel in the lowest bits, that of the next 16 bits above.
                const uint32_t codes = (x0 >> by & 15) | (shift_right(x1, x1, turn) & 0xf0000);
                w[i] = fma_halves(sub_halves(codes | WIDE, WIDE), word(scales, i), word(zeros, i));
            }
            k[h] = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
};

// Scores of a page's keys of type T; `pairs` is shared memory of the warp, a word for each dimension.
template <class T, int NC> __device__ __forceinline__ Scores scores_of(const uint8_t* page, int d, const Queries& q, uint32_t* pairs) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    float c0[4] = {}, c1[4] = {};
    T::prepare(page, d, pairs);
#pragma unroll
    for (int c = 0; c < NC; c++) {
        if (32 * c >= d) break;
        uint4 k[2];
        T::keys(page, d, c, pairs, k);
        float p0[4] = {}, p1[4] = {};
        float(&s0)[4] = T::SCALED ? p0 : c0;
        float(&s1)[4] = T::SCALED ? p1 : c1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[4];
            q.part(g, t, c, i, a);
            mma_16816(s0, a, {word(k[0], 2 * i), word(k[0], 2 * i + 1)});
            mma_16816(s1, a, {word(k[1], 2 * i), word(k[1], 2 * i + 1)});
        }
        if (!T::SCALED) continue;
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(page + T::scales_at(d)) + c * PAGE / 2 + t;
        const uint32_t f0 = scales[0], f1 = scales[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            c0[i] += half_to_float(f0 >> 16 * (i % 2)) * p0[i];
            c1[i] += half_to_float(f1 >> 16 * (i % 2)) * p1[i];
        }
    }
    return Scores(c0, c1);
}

// The keys of a page that is not f16.
template <int NC> __device__ __forceinline__ Scores scores_of(uint32_t type, const uint8_t* page, int d, const Queries& q, uint32_t* pairs) {
    if (type == K4) return scores_of<TilesK4, NC>(page, d, q, pairs);
    return type == Q8_0 ? scores_of<RowsQ8, NC>(page, d, q, pairs) : scores_of<RowsQ4, NC>(page, d, q, pairs);
}

// Values of a page of a head as a warp's lanes hold them, not yet decoded. HALF: they may be f16.
template <int NJ, bool HALF> struct StoredValues {
    // f16: rows `value_row(i)`, dimensions 64 j + 8 g ..; q8_0 and q4_0: the bytes that have them, then the scale of their block;
    // v2: bits of those dimensions in the first two, then scales and zeros of rows 2t, 2t + 1 and of 2t + 8, 2t + 9.
    uint4 raw[4][NJ];

    // Rows behind the first `rows` have not been written and are not read; f16 has rows of `stride` elements.
    __device__ __forceinline__ void load(uint32_t type, const uint8_t* page, int stride, int d, int rows) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            const int e = 64 * j + 8 * g;
#pragma unroll
            for (int i = 0; i < 4; i++) raw[i][j] = make_uint4(0, 0, 0, 0);
            if (e >= d) continue;
            if (type == V2) {
                const uint8_t* tile = page + e / TILE_ROW * tile_bytes(V2);
                raw[0][j] = fresh16(tile + 4 * (e % TILE_ROW)), raw[1][j] = fresh16(tile + 4 * (e % TILE_ROW) + 16);
                const uint16_t* s = reinterpret_cast<const uint16_t*>(tile + 128) + t;
                raw[2][j] = make_uint4(s[0], s[4], s[8], s[12]);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = value_row(i);
                if (row >= rows) continue;
                if (HALF && type == F16) {
                    raw[i][j] = fresh16(reinterpret_cast<const uint16_t*>(page) + row * stride + e);
                } else {
                    const bool wide = type == Q8_0;
                    const uint2 q = *reinterpret_cast<const uint2*>(page + (wide ? RowsQ8::at(d, row, e) : RowsQ4::at(d, row, e)));
                    const uint8_t* scales = page + (wide ? RowsQ8::scales_at(d) : RowsQ4::scales_at(d));
                    raw[i][j] = make_uint4(q.x, q.y, reinterpret_cast<const uint16_t*>(scales)[e / TILE_ROW * PAGE + row], 0);
                }
            }
        }
    }
    // Their products with the shares, added up.
    __device__ __forceinline__ void add(uint32_t type, const Shares& s, Sums<NJ>& sum) {
        if (type == V2) {
            add_tiles(s, sum);
        } else if (type == Q8_0) {
            add_rows<RowsQ8>(s, sum);
        } else if (type == Q4_0) {
            add_rows<RowsQ4>(s, sum);
        } else {
            add_rows<RowsF16>(s, sum);
        }
    }

private:
    static __device__ __forceinline__ void add_product(float (&o)[4], const uint32_t (&a)[4], const Shares& s) {
        o[0] *= s.old[0], o[1] *= s.old[1], o[2] *= s.old[0], o[3] *= s.old[1];
        mma_16816(o, a, s.b);
    }
    template <class T> __device__ __forceinline__ void add_rows(const Shares& s, Sums<NJ>& sum) {
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = T::values(raw[i][j]);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const uint32_t v0 = word(v[0], w), v1 = word(v[1], w), v2 = word(v[2], w), v3 = word(v[3], w);
                const uint32_t a[4] = {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)};
                add_product(sum.o[4 * j + w], a, s);
            }
        }
    }
    __device__ __forceinline__ void add_tiles(const Shares& s, Sums<NJ>& sum) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
            uint32_t d[2], zero[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const uint32_t scales = k ? raw[2][j].y : raw[2][j].x, zeros = k ? raw[2][j].w : raw[2][j].z;
                const float s0 = byte_scale(scales & 0xff), s1 = byte_scale(scales >> 8);
                d[k] = halves(s0, s1), zero[k] = halves(byte_zero(zeros, s0, 0.125f), byte_zero(zeros >> 8, s1, 0.125f));
            }
#pragma unroll
            for (int w = 0; w < 4; w++) {
                uint32_t a[4];
                // Two tokens of a dimension are neighbours: codes 2t, 2t + 1 and 2t + 8, 2t + 9.
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const uint32_t bits = word(raw[w / 2][j], w % 2 * 2 + k % 2) >> (4 * t + k / 2 * 16);
                    a[k] = fma_halves(sub_halves((bits & 3) | (bits & 12) << 14 | WIDE, WIDE), d[k / 2], zero[k / 2]);
                }
                add_product(sum.o[4 * j + w], a, s);
            }
        }
    }
};

// A page of any tier, of head `kv` of `n_kv` that are d wide. `rows` of it have been written, of which query g sees `seen`; `pairs` is shared
// memory of the warp, a word for each dimension; `ml` as `share_out` has it.
template <int NC, int NJ, bool EXACT, class Rows>
__device__ __forceinline__ void attend_page(
    const Tier* tiers, int n_kv, int kv, int d, const Queries& q, uint32_t* pairs, const uint2& entry, int rows, Rows seen, Sums<NJ>& sum, float2& ml) {
    const Tier& tier = tiers[tier_of(entry)];
    StoredValues<NJ, true> values;
    values.load(tier.type_v, page_at(tier.v, tier.type_v, slot_of(entry), n_kv, kv, d), n_kv * d, d, rows);
    Shares shares;
    if (tier.type_k == F16) {
        PageOf<NC, NJ, EXACT> page;
        page.load_keys({reinterpret_cast<const uint16_t*>(tier.k), nullptr, n_kv, d}, slot_of(entry), kv);
        shares = attend_keys<NC>(page, q, seen, sum, ml);
    } else {
        const uint8_t* keys = page_at(tier.k, tier.type_k, slot_of(entry), n_kv, kv, d);
        const Scores scores = scores_of<NC>(tier.type_k, keys, d, q, pairs);
        __syncwarp();
        shares = share_out(scores, seen, sum, ml);
    }
    values.add(tier.type_v, shares, sum);
}
