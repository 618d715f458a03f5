// The weight formats: how a row lies in device memory, how 16 elements are dequantized, how a piece of a row is multiplied with
// quantized activations.
//
// A row is stored as chunks of 2,048 or 4,096 elements, a chunk as *planes*: the parts of ggml's blocks (nibbles, high bits, scales, deltas),
// each part of all blocks of the chunk together, each plane padded to 16 bytes. No bytes are added but that padding (in the last chunk), and
// every part can be read with the widest load that its size allows; in the file a Q6_K block has 210 bytes and nothing in it is aligned.
// `planes()` in src/types.rs lists the parts; the `repack` kernel does it at upload. Q4_K and Q5_K have blocks that are multiples of 16 bytes
// and stay as they are.
//
// Each format gives:
//   PIECE    elements that a lane multiplies in one go
//   Frag     what a lane holds of the weights of a piece
//   PLANES   bytes that a block has in each plane; a format without planes has one
//   load     (chunk, n_blocks, piece)  -> Frag: nothing but loads, from global or shared memory; blocks and piece are those of the chunk
//   dot      (Frag, piece, x)          -> sum over the piece of w * x
// Pieces of a row are dealt out so that a thread meets only those of its own number modulo 4 (`thread_piece`).
//   raw      (chunk, n_blocks, k)  -> Raw<N>: what is to be loaded for the 16 N elements from k on, a multiple of that
//   units    (Raw<N>, k)           -> them as bytes with scales, which are BIAS too large; formats of plain numbers have `load16` and `halves`
#pragma once
#include "common.cuh"

// Same numbers as ggml_type.
enum Type : uint32_t {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39,
};


// Where rows are loaded from.
struct Global {
    static __device__ __forceinline__ uint4 ld16(const void* p) { return ::ld16(p); }
    static __device__ __forceinline__ uint2 ld8(const void* p) { return ::ld8(p); }
    static __device__ __forceinline__ uint32_t ld4(const void* p) { return ::ld4(p); }
    static __device__ __forceinline__ uint16_t ld2(const void* p) { return ::ld2(p); }
    static __device__ __forceinline__ uint8_t ld1(const uint8_t* p) { return *p; }
};
struct Shared {
    static __device__ __forceinline__ uint4 ld16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
    static __device__ __forceinline__ uint2 ld8(const void* p) { return *reinterpret_cast<const uint2*>(p); }
    static __device__ __forceinline__ uint32_t ld4(const void* p) { return *reinterpret_cast<const uint32_t*>(p); }
    static __device__ __forceinline__ uint16_t ld2(const void* p) { return *reinterpret_cast<const uint16_t*>(p); }
    static __device__ __forceinline__ uint8_t ld1(const uint8_t* p) { return *p; }
};

// Of a thread's pieces, their number modulo 4: it does not change, and so neither do shifts and masks that depend on it.
__device__ __forceinline__ uint32_t thread_piece() { return threadIdx.x % 4; }

__device__ __forceinline__ constexpr int pad16(int n) { return (n + 15) & ~15; }

// How a row of T lies in chunks. Formats without planes have no need of them; what reads a row in parts takes as much at once.
template <class T> struct Chunk {
    static constexpr int BITS = 8 * (T::PLANES[0] + T::PLANES[1] + T::PLANES[2] + T::PLANES[3]) / T::BLOCK;
    static constexpr int ELEMENTS = T::BLOCK > 8 ? (BITS <= 4 ? 4096 : 2048) : 8 * 2048 / T::PLANES[0];
    static constexpr int BLOCKS = ELEMENTS / T::BLOCK, PIECES = ELEMENTS / T::PIECE;
    static constexpr int BYTES = (T::PLANES[0] + T::PLANES[1] + T::PLANES[2] + T::PLANES[3]) * BLOCKS;
    static constexpr bool PLAIN = T::PLANES[1] == 0;
    static_assert(PLAIN || (T::PLANES[1] * BLOCKS % 16 == 0 && T::PLANES[2] * BLOCKS % 16 == 0 && T::PLANES[3] * BLOCKS % 16 == 0), "planes are padded in the last chunk alone");

    // Turns a row, its blocks and a place of which `each` are in a chunk into the chunk, its blocks and the place there.
    template <class I> static __device__ __forceinline__ void enter(const uint8_t*& row, int& nb, I& at, int each) {
        if (PLAIN) return;
        const int c = at / each;
        row += c * BYTES, nb = min(BLOCKS, nb - c * BLOCKS), at -= c * each;
    }
};
template <class T> __device__ __forceinline__ typename T::Frag load_piece(const uint8_t* row, int nb, uint32_t p) {
    Chunk<T>::enter(row, nb, p, Chunk<T>::PIECES);
    return T::template load<Global>(row, nb, p);
}

// One token's activations in global memory, in the forms that a mat-vec may want. Ordinary loads, since the kernel before may still
// be writing them when this one is already resident (see begin()).
struct Act {
    const float* f;    // (n_in)
    const int8_t* q;   // (n_in)
    const float2* ds;  // (n_in / 32): d, d * sum(q)

    // 16 quantized elements from 16 (u + i) on; u a multiple of a power of two above i.
    __device__ __forceinline__ uint4 q16(int u, int i) const { return *reinterpret_cast<const uint4*>(q + 16 * (u + i)); }
    // The sum of those, which are `x`.
    __device__ __forceinline__ int sum_q16(int, int, const uint4& x) const;
    // d and d * sum(q) of block b.
    __device__ __forceinline__ float2 scale(int b) const { return ds[b]; }
    // Elements 8p .. 8p + 8.
    __device__ __forceinline__ void f8(int p, float (&out)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = f[8 * p + i];
    }
};
__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ uint32_t byte_of(uint32_t w, int i) { return (w >> (8 * i)) & 0xff; }
__device__ __forceinline__ int signed_byte(uint32_t w, int i) { return int8_t(byte_of(w, i)); }

// Subtracts each byte of n from the one of v; all are below 128.
__device__ __forceinline__ uint32_t sub_each(uint32_t v, uint32_t n) { return ((v | 0x80808080u) - n) ^ 0x80808080u; }
// Subtracts the byte `n` from each byte of v.
__device__ __forceinline__ uint32_t sub_bytes(uint32_t v, uint32_t n) { return sub_each(v, n * 0x01010101u); }

// Dot product of 16 bytes with 16 quantized activations.
__device__ __forceinline__ int dot16(const uint4& w, const uint4& x) {
    return dot4(w.x, x.x, dot4(w.y, x.y, dot4(w.z, x.z, dot4(w.w, x.w, 0))));
}
// The same with bytes of w that have no sign, and a number to begin with.
__device__ __forceinline__ int dot16_unsigned(const uint4& w, const uint4& x, int c) {
    return dot4_unsigned(w.x, x.x, dot4_unsigned(w.y, x.y, dot4_unsigned(w.z, x.z, dot4_unsigned(w.w, x.w, c))));
}
__device__ __forceinline__ int sum16(const uint4& x) { return dot16(make_uint4(0x01010101, 0x01010101, 0x01010101, 0x01010101), x); }
__device__ __forceinline__ int Act::sum_q16(int, int, const uint4& x) const { return sum16(x); }
template <class F> __device__ __forceinline__ uint4 each(const uint4& a, F f) { return make_uint4(f(a.x), f(a.y), f(a.z), f(a.w)); }
template <class F> __device__ __forceinline__ uint4 each(const uint4& a, const uint4& b, F f) {
    return make_uint4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}
__device__ __forceinline__ uint4 low(const uint4& v) { return each(v, [](uint32_t w) { return w & 0x0f0f0f0fu; }); }
__device__ __forceinline__ uint4 high(const uint4& v) { return each(v, [](uint32_t w) { return (w >> 4) & 0x0f0f0f0fu; }); }
// 16 elements N times: each is s * (byte - BIAS) + m; bytes have no sign.
template <int N> struct Units {
    uint4 v[N];
    float s[N], m[N];
};
// The number of 16 elements among 32, of those that begin at k.
template <int N> __device__ __forceinline__ int nth16(int k, int i) { return N == 1 ? k / 16 % 2 : i; }
__device__ __forceinline__ uint4 biased(const uint4& v) { return each(v, [](uint32_t w) { return w ^ 0x80808080u; }); }

// --- formats with blocks of 32 ------------------------------------------------------------------------------------------

// Planes: qs (32 int8), d.
struct TQ8_0 {
    static constexpr int PIECE = 32, BLOCK = 32, PLANES[4] = {32, 2, 0, 0};
    struct Frag { uint4 w0, w1; uint16_t d; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) {
        return {L::ld16(row + 32 * p), L::ld16(row + 32 * p + 16), L::ld2(row + 32 * nb + 2 * p)};
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        return half_to_float(f.d) * x.scale(p).x * float(dot16(f.w0, x.q16(2 * p, 0)) + dot16(f.w1, x.q16(2 * p, 1)));
    }
    static constexpr int BIAS = 128;
    template <int N> struct Raw { uint4 q[N]; uint16_t d; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int nb, int k) {
        Raw<N> r;
#pragma unroll
        for (int i = 0; i < N; i++) r.q[i] = ld16(row + k + 16 * i);
        r.d = ld2(row + 32 * nb + 2 * (k / 32));
        return r;
    }
    template <int N> static __device__ __forceinline__ Units<N> units(const Raw<N>& r, int) {
        Units<N> u = {};
#pragma unroll
        for (int i = 0; i < N; i++) u.v[i] = biased(r.q[i]), u.s[i] = half_to_float(r.d);
        return u;
    }
};

// Formats whose block holds 16 bytes of nibbles: low nibbles are elements 0..16, high ones 16..32. F says what the rest of the
// block means: F::Rest is what is loaded of it, F::raw(bytes, rest, half) gives bytes that are F::BIAS too large, F::affine(rest) the affine map.
template <class F> struct Nibbles32 {
    static constexpr int PIECE = 32, BLOCK = 32, PLANES[4] = {16, F::PLANE1, F::PLANE2, 0};
    struct Frag { uint4 qs; typename F::Rest rest; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) { return {L::ld16(row + 16 * p), F::template rest<L>(row, nb, p)}; }
    // Elements 0..16, or 16..32, as signed bytes.
    static __device__ __forceinline__ uint4 value(const Frag& f, int half) {
        return each(F::raw(f.qs, f.rest, half), [](uint32_t w) { return F::BIAS == 0 ? w : F::BIAS == 128 ? w ^ 0x80808080u : sub_bytes(w, F::BIAS); });
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        const uint4 x0 = x.q16(2 * p, 0), x1 = x.q16(2 * p, 1);
        int s;
        if constexpr (F::IN_ORDER) {
            s = F::dot(f.qs, x0, x1);
        } else {
            s = dot16(value(f, 0), x0) + dot16(value(f, 1), x1);
        }
        const float2 ds = x.scale(p), dm = F::affine(f.rest, p);
        return dm.x * ds.x * float(s) + dm.y * ds.y;
    }
    static constexpr int BIAS = F::BIAS;
    template <int N> using Raw = Frag;
    template <int N> static __device__ __forceinline__ Frag raw(const uint8_t* row, int nb, int k) { return load<Global>(row, nb, k / 32); }
    template <int N> static __device__ __forceinline__ Units<N> units(const Frag& f, int k) {
        const float2 dm = F::affine(f.rest, k / 32);
        Units<N> u;
#pragma unroll
        for (int i = 0; i < N; i++) u.v[i] = F::raw(f.qs, f.rest, nth16<N>(k, i)), u.s[i] = dm.x, u.m[i] = dm.y;
        return u;
    }
};

__device__ __forceinline__ uint4 nibbles(const uint4& v, int half) { return half ? high(v) : low(v); }
__device__ __forceinline__ float2 halves(uint32_t w) { return make_float2(half_to_float(w & 0xffff), half_to_float(w >> 16)); }

// Planes: qs, d. Value: nibble - 8.
struct FQ4_0 {
    static constexpr bool IN_ORDER = false;
    static constexpr int PLANE1 = 2, PLANE2 = 0;
    using Rest = uint16_t;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return L::ld2(row + 16 * nb + 2 * b); }
    static constexpr int BIAS = 8;
    static __device__ __forceinline__ uint4 raw(const uint4& v, Rest, int half) { return nibbles(v, half); }
    static __device__ __forceinline__ float2 affine(Rest d, uint32_t) { return make_float2(half_to_float(d), 0.0f); }
};

// Planes: qs, (d, m).
struct FQ4_1 {
    static constexpr bool IN_ORDER = false;
    static constexpr int PLANE1 = 4, PLANE2 = 0;
    using Rest = uint32_t;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return L::ld4(row + 16 * nb + 4 * b); }
    static constexpr int BIAS = 0;
    static __device__ __forceinline__ uint4 raw(const uint4& v, Rest, int half) { return nibbles(v, half); }
    static __device__ __forceinline__ float2 affine(Rest dm, uint32_t) { return halves(dm); }
};

// The fifth bits of 16 elements, `bits` their 16 bits: bit i becomes bit 4 of byte i.
__device__ __forceinline__ uint32_t fifth(uint32_t bits) {
    return ((bits & 1) << 4) | ((bits & 2) << 11) | ((bits & 4) << 18) | ((bits & 8) << 25);
}
__device__ __forceinline__ uint4 with_fifth(const uint4& v, uint32_t bits) {
    return make_uint4(v.x | fifth(bits), v.y | fifth(bits >> 4), v.z | fifth(bits >> 8), v.w | fifth(bits >> 12));
}

// Planes: qs, qh (4 bytes), d. Value: five bits - 16.
struct FQ5_0 {
    static constexpr bool IN_ORDER = false;
    static constexpr int PLANE1 = 4, PLANE2 = 2;
    struct Rest { uint32_t qh; uint16_t d; };
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) {
        return {L::ld4(row + 16 * nb + 4 * b), L::ld2(row + 16 * nb + pad16(4 * nb) + 2 * b)};
    }
    static constexpr int BIAS = 16;
    static __device__ __forceinline__ uint4 raw(const uint4& v, const Rest& r, int half) { return with_fifth(nibbles(v, half), r.qh >> (16 * half)); }
    static __device__ __forceinline__ float2 affine(const Rest& r, uint32_t) { return make_float2(half_to_float(r.d), 0.0f); }
};

// Planes: qs, qh, (d, m).
struct FQ5_1 {
    static constexpr bool IN_ORDER = false;
    static constexpr int PLANE1 = 4, PLANE2 = 4;
    struct Rest { uint32_t qh, dm; };
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) {
        return {L::ld4(row + 16 * nb + 4 * b), L::ld4(row + 16 * nb + pad16(4 * nb) + 4 * b)};
    }
    static constexpr int BIAS = 0;
    static __device__ __forceinline__ uint4 raw(const uint4& v, const Rest& r, int half) { return with_fifth(nibbles(v, half), r.qh >> (16 * half)); }
    static __device__ __forceinline__ float2 affine(const Rest& r, uint32_t) { return halves(r.dm); }
};

// Numbers of bits 0..3 of four bytes and of bits 4..7, in the order in which they lie in a word: low, high, low, high.
struct InOrder {
    uint32_t w[2];

    // Those of the low nibbles, or of the high ones.
    __device__ __forceinline__ uint32_t half(int half) const { return pick_bytes(w[0], w[1], half ? 0x7531 : 0x6420); }
};
// The same order for bytes of two words.
__device__ __forceinline__ InOrder in_order(uint32_t low, uint32_t high) { return {{pick_bytes(low, high, 0x5140), pick_bytes(low, high, 0x7362)}}; }

// Products of a word's numbers with as many activations: sums of what is added, and of what is taken away.
struct Balance {
    int plus = 0, minus = 0;

    __device__ __forceinline__ void add(const InOrder& a, const InOrder& x) { plus = dot4(a.w[1], x.w[1], dot4(a.w[0], x.w[0], plus)); }
    __device__ __forceinline__ void take(const InOrder& a, const InOrder& x) { minus = dot4(a.w[1], x.w[1], dot4(a.w[0], x.w[0], minus)); }
};

// Tables of 16 signed bytes, as words. An instruction takes one number that is no register: so half of them are registers, and stay there.

// ggml's kvalues_iq4nl: -127 -104 -83 -65 -49 -35 -22 -10 | 1 13 25 38 53 69 89 113
struct TableIQ4 {
    uint32_t t0 = opaque(0xbfad9881u), t2 = opaque(0x26190d01u);

    // Three bits choose from either half of the table, and the highest between the two.
    __device__ __forceinline__ InOrder look_up(uint32_t w) const {
        const uint32_t first = w & 0x77777777, upper = (w >> 1 & 0x44444444) | 0x32103210;
        InOrder found;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t n = first >> (16 * i);
            found.w[i] = pick_bytes(pick_bytes(t0, 0xf6eaddcf, n), pick_bytes(t2, 0x71594535, n), upper >> (16 * i));
        }
        return found;
    }
    __device__ __forceinline__ void dot(uint32_t w, const InOrder& x, Balance& sum) const { sum.add(look_up(w), x); }
};
// Twice the values of e2m1: 0 1 2 3 4 6 8 12 | 0 -1 -2 -3 -4 -6 -8 -12
struct TableE2M1 {
    uint32_t t0 = opaque(0x03020100u);

    // A number of 8 or more picks the sign of a byte, and no magnitude has one: so those that are negative are zero, or all the others.
    __device__ __forceinline__ InOrder positive(uint32_t w) const { return {{pick_bytes(t0, 0x0c080604, w), pick_bytes(t0, 0x0c080604, w >> 16)}}; }
    __device__ __forceinline__ void dot(uint32_t w, const InOrder& x, Balance& sum) const { sum.add(positive(w), x), sum.take(positive(w ^ 0x88888888), x); }
    __device__ __forceinline__ InOrder look_up(uint32_t w) const {
        const InOrder plus = positive(w), minus = positive(w ^ 0x88888888);
        return {{sub_each(plus.w[0], minus.w[0]), sub_each(plus.w[1], minus.w[1])}};
    }
};

// Formats with a table. What their products want of it is in the order of the nibbles, which costs less than to bring them into another.
template <class Table> struct InTable {
    static constexpr bool IN_ORDER = true;

    static constexpr int BIAS = 128;
    template <class R> static __device__ __forceinline__ uint4 raw(const uint4& v, const R&, int half) {
        const Table table;
        return biased(each(v, [half, &table](uint32_t w) { return table.look_up(w).half(half); }));
    }
    static __device__ __forceinline__ int dot(const uint4& w, const uint4& x0, const uint4& x1) {
        const Table table;
        Balance sum;
        table.dot(w.x, in_order(x0.x, x1.x), sum), table.dot(w.y, in_order(x0.y, x1.y), sum);
        table.dot(w.z, in_order(x0.z, x1.z), sum), table.dot(w.w, in_order(x0.w, x1.w), sum);
        return sum.plus - sum.minus;
    }
};

// Planes: qs, d.
struct FIQ4_NL : InTable<TableIQ4> {
    static constexpr int PLANE1 = 2, PLANE2 = 0;
    using Rest = uint16_t;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return FQ4_0::rest<L>(row, nb, b); }
    static __device__ __forceinline__ float2 affine(Rest d, uint32_t b) { return FQ4_0::affine(d, b); }
};

// Planes: qs, e (an exponent of 8 bits). The table holds doubled values, so the scale is 2^(e - 128).
struct FMXFP4 : InTable<TableE2M1> {
    static constexpr int PLANE1 = 1, PLANE2 = 0;
    using Rest = uint8_t;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return L::ld1(row + 16 * nb + b); }
    static __device__ __forceinline__ float2 affine(Rest e, uint32_t) {
        return make_float2(__uint_as_float(e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23), 0.0f);
    }
};

// Planes: qs (128 bytes for 8 sub-blocks of 32), header (d, high bits of the scales, low bits of the scales: 8 bytes).
// `b` counts sub-blocks, and so does the row length that Nibbles32 hands over.
struct FIQ4_XS : InTable<TableIQ4> {
    static constexpr int PLANE1 = 1, PLANE2 = 0;
    using Rest = uint2;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return L::ld8(row + 16 * nb + 8 * (b / 8)); }
    static __device__ __forceinline__ float2 affine(const Rest& h, uint32_t b) {
        const int ib = b % 8;
        const uint32_t ls = ((h.y >> (4 * ib)) & 0xf) | (((h.x >> 16 >> (2 * ib)) & 3) << 4);
        return make_float2(half_to_float(h.x & 0xffff) * float(int(ls) - 32), 0.0f);
    }
};

using TQ4_0 = Nibbles32<FQ4_0>;
using TQ4_1 = Nibbles32<FQ4_1>;
using TQ5_0 = Nibbles32<FQ5_0>;
using TQ5_1 = Nibbles32<FQ5_1>;
using TIQ4_NL = Nibbles32<FIQ4_NL>;
using TMXFP4 = Nibbles32<FMXFP4>;
using TIQ4_XS = Nibbles32<FIQ4_XS>;  // its BLOCK is the sub-block

// --- plain numbers: rows of n_in elements padded to 16 bytes, zeros behind the last element ------------------------------

// BITS 32: f32; 16: f16 or bf16 (BF).
template <int BITS, bool BF> struct Plain {
    static constexpr int PIECE = 8, BLOCK = 8, PLANES[4] = {BITS, 0, 0, 0};
    static __device__ __forceinline__ float at(const uint8_t* row, int i) {
        if (BITS == 32) return __ldg(reinterpret_cast<const float*>(row) + i);
        const uint16_t h = __ldg(reinterpret_cast<const uint16_t*>(row) + i);
        return BF ? bf16_to_float(h) : half_to_float(h);
    }
    struct Frag { uint4 w[BITS / 16]; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int, uint32_t p) {
        Frag f;
#pragma unroll
        for (int i = 0; i < BITS / 16; i++) f.w[i] = L::ld16(row + BITS * p + 16 * i);
        return f;
    }
    template <class X> static __device__ __forceinline__ float dot(const Frag& f, uint32_t p, const X& x) {
        float xf[8], sum = 0.0f;
        x.f8(p, xf);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (BITS == 32) {
                sum += __uint_as_float(word(f.w[BITS == 32 ? i / 4 : 0], i % 4)) * xf[i];
            } else {
                const uint16_t h = word(f.w[0], i / 2) >> (16 * (i % 2));
                sum += (BF ? bf16_to_float(h) : half_to_float(h)) * xf[i];
            }
        }
        return sum;
    }
    // The last piece of a row whose length n is no multiple of 8.
    static __device__ __forceinline__ float dot_tail(const uint8_t* row, int n, int p, const Act& x) {
        float sum = 0.0f;
        for (int i = 8 * p; i < n; i++) sum += at(row, i) * x.f[i];
        return sum;
    }
    static __device__ __forceinline__ void load16(const uint8_t* row, int n, int k, float (&out)[16]) {
#pragma unroll
        for (int i = 0; i < 16; i++) out[i] = k + i < n ? at(row, k + i) : 0.0f;
    }
    template <int N> struct Raw { uint4 w[N * BITS / 8]; };
    template <int N> static __device__ __forceinline__ Raw<N> raw(const uint8_t* row, int n, int k) {
        Raw<N> r = {};
#pragma unroll
        for (int i = 0; i < N * BITS / 8; i++) {
            // Rows are padded with zeros to whole words of this size.
            if (k + 128 / BITS * i < n) r.w[i] = ld16(row + k * (BITS / 8) + 16 * i);
        }
        return r;
    }
    template <int N> static __device__ __forceinline__ void halves(const Raw<N>& r, uint4 (&h)[2 * N]) {
        if constexpr (BITS == 16 && !BF) {
#pragma unroll
            for (int i = 0; i < 2 * N; i++) h[i] = r.w[i];
        } else {
#pragma unroll
            for (int i = 0; i < 2 * N; i++) {
                uint32_t w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if constexpr (BF) {
                        const uint32_t two = word(r.w[i], j);
                        w[j] = ::halves(bf16_to_float(two), bf16_to_float(two >> 16));
                    } else {
                        const uint4& four = r.w[2 * i + j / 2];
                        w[j] = ::halves(__uint_as_float(word(four, 2 * (j % 2))), __uint_as_float(word(four, 2 * (j % 2) + 1)));
                    }
                }
                h[i] = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
};
using TF32 = Plain<32, false>;
using TF16 = Plain<16, false>;
using TBF16 = Plain<16, true>;
