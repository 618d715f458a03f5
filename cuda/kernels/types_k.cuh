// The weight formats with blocks of 256 elements; types.cuh says what a format gives.
#pragma once
#include "types.cuh"

// Scale and minimum (6 bits each) of sub-block i of Q4_K and Q5_K; `h` is the block's header: d, dmin, 12 bytes.
__device__ __forceinline__ void scale_min(const uint4& h, int i, int& sc, int& m) {
    if (i < 4) {
        sc = byte_of(h.y, i) & 63;
        m = byte_of(h.z, i) & 63;
    } else {
        const uint32_t y = byte_of(h.y, i - 4), z = byte_of(h.z, i - 4), w = byte_of(h.w, i - 4);
        sc = (w & 0xf) | ((y >> 6) << 4);
        m = (w >> 4) | ((z >> 6) << 4);
    }
}

// Q4_K (144 bytes) and Q5_K (176 bytes, FIVE), as in the file: header (16), qh (32, Q5_K only), qs (128).
// Piece j of a block: bytes 32j .. 32j + 32 of qs, whose low nibbles are sub-block 2j and whose high ones 2j + 1.
template <bool FIVE> struct K45 {
    static constexpr int PIECE = 64, BLOCK = 256, BYTES = FIVE ? 176 : 144, QS = FIVE ? 48 : 16, PLANES[4] = {BYTES, 0, 0, 0};
    static __device__ __forceinline__ uint4 add_high(const uint4& v, const uint4& qh, int bit) {
        return each(v, qh, [bit](uint32_t w, uint32_t h) { return w | (((h >> bit) & 0x01010101u) << 4); });
    }
    struct Frag { uint4 h, q0, q1, h0, h1; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int, uint32_t p) {
        const uint8_t* blk = row + size_t(BYTES) * (p / 4);
        const uint32_t j = thread_piece();
        Frag f;
        f.h = L::ld16(blk), f.q0 = L::ld16(blk + QS + 32 * j), f.q1 = L::ld16(blk + QS + 32 * j + 16);
        if (FIVE) f.h0 = L::ld16(blk + 16), f.h1 = L::ld16(blk + 32);
        return f;
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        const uint32_t j = thread_piece();
        uint4 a0 = low(f.q0), a1 = low(f.q1), b0, b1;
        if (FIVE) {
            a0 = add_high(a0, f.h0, 2 * j), a1 = add_high(a1, f.h1, 2 * j);
            b0 = add_high(high(f.q0), f.h0, 2 * j + 1), b1 = add_high(high(f.q1), f.h1, 2 * j + 1);
        } else {
            // High nibbles where they are: 16 times what they mean.
            b0 = each(f.q0, [](uint32_t w) { return w & 0xf0f0f0f0u; }), b1 = each(f.q1, [](uint32_t w) { return w & 0xf0f0f0f0u; });
        }
        const int sa = dot16_unsigned(a1, x.q16(4 * p, 1), dot16_unsigned(a0, x.q16(4 * p, 0), 0));
        const int sb = dot16_unsigned(b1, x.q16(4 * p, 3), dot16_unsigned(b0, x.q16(4 * p, 2), 0)) >> (FIVE ? 0 : 4);
        const float2 xa = x.scale(2 * p), xb = x.scale(2 * p + 1);
        // Scales of sub-blocks 2j and 2j + 1, and their minimums: two bytes each.
        const bool first = j < 2;
        const uint32_t up = 16 * (j % 2);
        const uint32_t low_mask = first ? 0x3f3f : 0x0f0f, top_mask = first ? 0 : 0x3030;
        const uint32_t sc = ((first ? f.h.y : f.h.w) >> up & low_mask) | (f.h.y >> (up + 2) & top_mask);
        const uint32_t mn = ((first ? f.h.z : f.h.w) >> (first ? up : up + 4) & low_mask) | (f.h.z >> (up + 2) & top_mask);
        const float2 d = halves(f.h.x);
        return d.x * (float(int(sc & 0xff) * sa) * xa.x + float(int(sc >> 8) * sb) * xb.x) -
               d.y * (float(mn & 0xff) * xa.y + float(mn >> 8) * xb.y);
    }
    static constexpr int BIAS = 0;
    template <int N> struct Raw { uint4 h, q[N], qh[FIVE ? N : 1]; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int, int k) {
        const uint8_t* blk = row + size_t(BYTES) * (k / 256);
        const int is = nth16<N>(k, 0);
        Raw<N> r;
        r.h = ld16(blk);
#pragma unroll
        for (int i = 0; i < N; i++) {
            r.q[i] = ld16(blk + QS + 32 * (k % 256 / 64) + 16 * (is + i));
            if (FIVE) r.qh[FIVE ? i : 0] = ld16(blk + 16 + 16 * (is + i));
        }
        return r;
    }
    template <int N> static __device__ __forceinline__ Units<N> units(const Raw<N>& r, int k) {
        const int sub = k % 256 / 32;
        int sc, m;
        scale_min(r.h, sub, sc, m);
        Units<N> u;
#pragma unroll
        for (int i = 0; i < N; i++) {
            u.v[i] = each(r.q[i], [sub](uint32_t w) { return (w >> (4 * (sub % 2))) & 0x0f0f0f0fu; });
            if (FIVE) u.v[i] = add_high(u.v[i], r.qh[FIVE ? i : 0], sub);
            u.s[i] = half_to_float(r.h.x & 0xffff) * float(sc), u.m[i] = -half_to_float(r.h.x >> 16) * float(m);
        }
        return u;
    }
};
using TQ4_K = K45<false>;
using TQ5_K = K45<true>;

// Planes: ql (128), qh (64), scales (16 int8), d.
// A block is two halves of 128 elements; in half n, element 32j + l has its low four bits in ql[64n + l + 32 (j % 2)] (high nibble
// for j >= 2) and its high two in bits 2j of qh[32n + l]. A piece is 16 values of l with all four j.
struct TQ6_K {
    static constexpr int PIECE = 64, BLOCK = 256, PLANES[4] = {128, 64, 16, 2};
    // Six bits; the value is 32 less.
    static __device__ __forceinline__ uint4 value(const uint4& l0, const uint4& l1, const uint4& h, int j) {
        const uint4 l = j % 2 ? l1 : l0;
        return each(l, h, [j](uint32_t w, uint32_t hi) {
            const uint32_t two = j < 2 ? hi << (4 - 2 * j) : hi >> (2 * j - 4);
            return ((j < 2 ? w : w >> 4) & 0x0f0f0f0fu) | (two & 0x30303030u);
        });
    }
    struct Frag { uint4 l0, l1, h; uint2 sc; uint16_t d; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) {
        const uint32_t b = p / 4, n = thread_piece() / 2, is = thread_piece() % 2;
        const uint8_t *ql = row + 128 * b + 64 * n + 16 * is, *qh = row + 128 * nb + 64 * b + 32 * n + 16 * is;
        return {L::ld16(ql), L::ld16(ql + 32), L::ld16(qh), L::ld8(row + 192 * nb + 16 * b + 8 * n), L::ld2(row + 208 * nb + 2 * b)};
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        const uint32_t is = thread_piece() % 2, half = p / 2;  // of 128 elements
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 q = x.q16(8 * half, 2 * j + is);
            const int s = dot16_unsigned(value(f.l0, f.l1, f.h, j), q, -32 * x.sum_q16(8 * half, 2 * j + is, q));
            const int c = int8_t((j < 2 ? f.sc.x : f.sc.y) >> (16 * (j % 2) + 8 * is));
            sum += float(c * s) * x.scale(4 * half + j).x;
        }
        return half_to_float(f.d) * sum;
    }
    static constexpr int BIAS = 32;
    template <int N> struct Raw { uint4 l[N], h[N]; uint16_t c, d; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int nb, int k) {
        const int b = k / 256, n = k / 128 % 2, j = k / 32 % 4, is = nth16<N>(k, 0);
        Raw<N> r;
#pragma unroll
        for (int i = 0; i < N; i++) {
            r.l[i] = ld16(row + 128 * b + 64 * n + 32 * (j % 2) + 16 * (is + i));
            r.h[i] = ld16(row + 128 * nb + 64 * b + 32 * n + 16 * (is + i));
        }
        r.c = ld2(row + 192 * nb + 16 * b + 8 * n + 2 * j), r.d = ld2(row + 208 * nb + 2 * b);
        return r;
    }
    template <int N> static __device__ __forceinline__ Units<N> units(const Raw<N>& r, int k) {
        const int j = k / 32 % 4;
        Units<N> u = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            u.v[i] = each(r.l[i], r.h[i], [j](uint32_t w, uint32_t hi) {
                return ((w >> (4 * (j / 2))) & 0x0f0f0f0fu) | (((hi >> (2 * j)) & 0x03030303u) << 4);
            });
            u.s[i] = half_to_float(r.d) * float(signed_byte(r.c, nth16<N>(k, i)));
        }
        return u;
    }
};

// Planes: qs (64), scales (16: scale in the low nibble, minimum in the high one), (d, dmin).
// In half n, element 32j + l is in bits 2j of qs[32n + l].
struct TQ2_K {
    static constexpr int PIECE = 64, BLOCK = 256, PLANES[4] = {64, 16, 4, 0};
    static __device__ __forceinline__ uint4 value(const uint4& q, int j) {
        return each(q, [j](uint32_t w) { return (w >> (2 * j)) & 0x03030303u; });
    }
    struct Frag { uint4 q; uint2 sc; uint32_t dm; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) {
        const uint32_t b = p / 4, n = thread_piece() / 2, is = thread_piece() % 2;
        return {L::ld16(row + 64 * b + 32 * n + 16 * is), L::ld8(row + 64 * nb + 16 * b + 8 * n), L::ld4(row + 80 * nb + 4 * b)};
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        const uint32_t is = thread_piece() % 2, half = p / 2;
        const float2 d = halves(f.dm);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 xq = x.q16(8 * half, 2 * j + is);
            const uint32_t c = (j < 2 ? f.sc.x : f.sc.y) >> (16 * (j % 2) + 8 * is);
            const float s = d.x * float(int(c & 0xf) * dot16(value(f.q, j), xq)) - d.y * float(int((c >> 4) & 0xf) * x.sum_q16(8 * half, 2 * j + is, xq));
            sum += s * x.scale(4 * half + j).x;
        }
        return sum;
    }
    static constexpr int BIAS = 0;
    template <int N> struct Raw { uint4 q[N]; uint16_t c; uint32_t dm; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int nb, int k) {
        const int b = k / 256, n = k / 128 % 2, j = k / 32 % 4, is = nth16<N>(k, 0);
        Raw<N> r;
#pragma unroll
        for (int i = 0; i < N; i++) r.q[i] = ld16(row + 64 * b + 32 * n + 16 * (is + i));
        r.c = ld2(row + 64 * nb + 16 * b + 8 * n + 2 * j), r.dm = ld4(row + 80 * nb + 4 * b);
        return r;
    }
    template <int N> static __device__ __forceinline__ Units<N> units(const Raw<N>& r, int k) {
        const float2 d = halves(r.dm);
        Units<N> u;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t c = r.c >> (8 * nth16<N>(k, i));
            u.v[i] = value(r.q[i], k / 32 % 4), u.s[i] = d.x * float(c & 0xf), u.m[i] = -d.y * float(c >> 4 & 0xf);
        }
        return u;
    }
};

// Planes: qs (64), hmask (32), scales (12), d.
// As Q2_K, with a third bit in bit 4n + j of hmask[l]; value: three bits - 4. Scale k has its low four bits in byte k % 8 (high nibble
// for k >= 8) and its high two in bits 2 (k / 4) of byte 8 + k % 4; it is the six bits - 32.
struct TQ3_K {
    static constexpr int PIECE = 64, BLOCK = 256, PLANES[4] = {64, 32, 12, 2};
    static __device__ __forceinline__ uint4 raw_bytes(const uint4& q, const uint4& hm, int n, int j) {
        return each(q, hm, [n, j](uint32_t w, uint32_t h) { return ((w >> (2 * j)) & 0x03030303u) | (((h >> (4 * n + j)) & 0x01010101u) << 2); });
    }
    static __device__ __forceinline__ uint4 value(const uint4& q, const uint4& hm, int n, int j) {
        return each(raw_bytes(q, hm, n, j), [](uint32_t w) { return sub_bytes(w, 4); });
    }
    static __device__ __forceinline__ int scale(uint32_t lo4, uint32_t hi4, int k) {
        const uint32_t lo = byte_of(lo4, k & 3), hi = byte_of(hi4, k & 3);
        return int((k < 8 ? lo & 0xf : lo >> 4) | (((hi >> (2 * (k / 4))) & 3) << 4)) - 32;
    }
    static __device__ __forceinline__ const uint8_t* scales(const uint8_t* row, int nb, int b) { return row + 96 * nb + 12 * b; }
    static __device__ __forceinline__ const uint8_t* d(const uint8_t* row, int nb, int b) { return row + 96 * nb + pad16(12 * nb) + 2 * b; }
    struct Frag { uint4 q, hm; uint32_t s0, s1, s2; uint16_t d; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) {
        const uint32_t b = p / 4, n = thread_piece() / 2, is = thread_piece() % 2;
        const uint8_t* sc = scales(row, nb, b);
        return {L::ld16(row + 64 * b + 32 * n + 16 * is), L::ld16(row + 64 * nb + 32 * b + 16 * is), L::ld4(sc), L::ld4(sc + 4), L::ld4(sc + 8), L::ld2(d(row, nb, b))};
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        const uint32_t is = p % 2, half = p / 2, n = thread_piece() / 2;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int s = dot16(value(f.q, f.hm, n, j), x.q16(8 * half, 2 * j + is));
            sum += float(scale(j < 2 ? f.s0 : f.s1, f.s2, 8 * n + 2 * j + is) * s) * x.scale(4 * half + j).x;
        }
        return half_to_float(f.d) * sum;
    }
    static constexpr int BIAS = 4;
    template <int N> struct Raw { uint4 q[N], hm[N]; uint32_t lo, hi; uint16_t d; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int nb, int k) {
        const int b = k / 256, n = k / 128 % 2, j = k / 32 % 4, is = nth16<N>(k, 0);
        const uint8_t* sc = scales(row, nb, b);
        Raw<N> r;
#pragma unroll
        for (int i = 0; i < N; i++) {
            r.q[i] = ld16(row + 64 * b + 32 * n + 16 * (is + i));
            r.hm[i] = ld16(row + 64 * nb + 32 * b + 16 * (is + i));
        }
        r.lo = ld4(sc + 4 * (j / 2)), r.hi = ld4(sc + 8), r.d = ld2(d(row, nb, b));
        return r;
    }
    template <int N> static __device__ __forceinline__ Units<N> units(const Raw<N>& r, int k) {
        const int n = k / 128 % 2, j = k / 32 % 4;
        Units<N> u = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            u.v[i] = raw_bytes(r.q[i], r.hm[i], n, j), u.s[i] = half_to_float(r.d) * float(scale(r.lo, r.hi, 8 * n + 2 * j + nth16<N>(k, i)));
        }
        return u;
    }
};
