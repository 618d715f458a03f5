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
//   load16   (chunk, n_blocks, k, out) -> elements k .. k + 16 as float, k a multiple of 16
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
// 16 signed bytes, scaled and shifted, as floats.
__device__ __forceinline__ void spread(const uint4& v, float scale, float shift, float (&out)[16]) {
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = scale * float(signed_byte(word(v, i / 4), i % 4)) + shift;
}

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
    static __device__ __forceinline__ void load16(const uint8_t* row, int nb, int k, float (&out)[16]) {
        spread(ld16(row + k), half_to_float(ld2(row + 32 * nb + 2 * (k / 32))), 0.0f, out);
    }
};

// Formats whose block holds 16 bytes of nibbles: low nibbles are elements 0..16, high ones 16..32. F says what the rest of the
// block means: F::Rest is what is loaded of it, F::value(bytes, rest, half) gives signed bytes, F::affine(rest) the affine map.
template <class F> struct Nibbles32 {
    static constexpr int PIECE = 32, BLOCK = 32, PLANES[4] = {16, F::PLANE1, F::PLANE2, 0};
    struct Frag { uint4 qs; typename F::Rest rest; };
    template <class L> static __device__ __forceinline__ Frag load(const uint8_t* row, int nb, uint32_t p) { return {L::ld16(row + 16 * p), F::template rest<L>(row, nb, p)}; }
    // Elements 0..16, or 16..32.
    static __device__ __forceinline__ uint4 value(const Frag& f, int half) { return F::value(f.qs, f.rest, half); }
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
    static __device__ __forceinline__ void load16(const uint8_t* row, int nb, int k, float (&out)[16]) {
        const int b = k / 32, half = (k / 16) % 2;
        const Frag f = load<Global>(row, nb, b);
        const float2 dm = F::affine(f.rest, b);
        spread(value(f, half), dm.x, dm.y, out);
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
    static __device__ __forceinline__ uint4 value(const uint4& v, Rest, int half) {
        return each(nibbles(v, half), [](uint32_t w) { return sub_bytes(w, 8); });
    }
    static __device__ __forceinline__ float2 affine(Rest d, uint32_t) { return make_float2(half_to_float(d), 0.0f); }
};

// Planes: qs, (d, m).
struct FQ4_1 {
    static constexpr bool IN_ORDER = false;
    static constexpr int PLANE1 = 4, PLANE2 = 0;
    using Rest = uint32_t;
    template <class L> static __device__ __forceinline__ Rest rest(const uint8_t* row, int nb, uint32_t b) { return L::ld4(row + 16 * nb + 4 * b); }
    static __device__ __forceinline__ uint4 value(const uint4& v, Rest, int half) { return nibbles(v, half); }
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
    static __device__ __forceinline__ uint4 value(const uint4& v, const Rest& r, int half) {
        return each(with_fifth(nibbles(v, half), r.qh >> (16 * half)), [](uint32_t w) { return sub_bytes(w, 16); });
    }
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
    static __device__ __forceinline__ uint4 value(const uint4& v, const Rest& r, int half) { return with_fifth(nibbles(v, half), r.qh >> (16 * half)); }
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

    template <class R> static __device__ __forceinline__ uint4 value(const uint4& v, const R&, int half) {
        const Table table;
        return each(v, [half, &table](uint32_t w) { return table.look_up(w).half(half); });
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

// --- formats with blocks of 256 -----------------------------------------------------------------------------------------

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
    static __device__ __forceinline__ void load16(const uint8_t* row, int, int k, float (&out)[16]) {
        const uint8_t* blk = row + size_t(BYTES) * (k / 256);
        const int sub = (k % 256) / 32, half = (k / 16) % 2, j = sub / 2;
        const uint4 h = ld16(blk), q = ld16(blk + QS + 32 * j + 16 * half);
        uint4 v = sub % 2 ? high(q) : low(q);
        if (FIVE) v = add_high(v, ld16(blk + 16 + 16 * half), sub);
        int sc, m;
        scale_min(h, sub, sc, m);
        spread(v, half_to_float(h.x & 0xffff) * float(sc), -half_to_float(h.x >> 16) * float(m), out);
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
    static __device__ __forceinline__ void load16(const uint8_t* row, int nb, int k, float (&out)[16]) {
        const int b = k / 256, n = (k / 128) % 2, j = (k / 32) % 4, is = (k / 16) % 2;
        const uint8_t* ql = row + 128 * b + 64 * n + 16 * is + 32 * (j % 2);
        const uint4 l = ld16(ql), h = ld16(row + 128 * nb + 64 * b + 32 * n + 16 * is);
        const int c = int8_t(row[192 * nb + 16 * b + 8 * n + 2 * j + is]);
        const float d = half_to_float(ld2(row + 208 * nb + 2 * b)) * float(c);
        spread(value(l, l, h, j), d, -32.0f * d, out);
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
    static __device__ __forceinline__ void load16(const uint8_t* row, int nb, int k, float (&out)[16]) {
        const int b = k / 256, n = (k / 128) % 2, j = (k / 32) % 4, is = (k / 16) % 2;
        const uint4 q = ld16(row + 64 * b + 32 * n + 16 * is);
        const uint32_t c = row[64 * nb + 16 * b + 8 * n + 2 * j + is], dm = ld4(row + 80 * nb + 4 * b);
        spread(value(q, j), half_to_float(dm & 0xffff) * float(c & 0xf), -half_to_float(dm >> 16) * float(c >> 4), out);
    }
};

// Planes: qs (64), hmask (32), scales (12), d.
// As Q2_K, with a third bit in bit 4n + j of hmask[l]; value: three bits - 4. Scale k has its low four bits in byte k % 8 (high nibble
// for k >= 8) and its high two in bits 2 (k / 4) of byte 8 + k % 4; it is the six bits - 32.
struct TQ3_K {
    static constexpr int PIECE = 64, BLOCK = 256, PLANES[4] = {64, 32, 12, 2};
    static __device__ __forceinline__ uint4 value(const uint4& q, const uint4& hm, int n, int j) {
        return each(q, hm, [n, j](uint32_t w, uint32_t h) {
            return sub_bytes(((w >> (2 * j)) & 0x03030303u) | (((h >> (4 * n + j)) & 0x01010101u) << 2), 4);
        });
    }
    static __device__ __forceinline__ int scale(uint32_t lo4, uint32_t hi4, int k) {
        const uint32_t lo = byte_of(lo4, k & 3), hi = byte_of(hi4, k & 3);
        return int((k < 8 ? lo & 0xf : lo >> 4) | (((hi >> (2 * (k / 4))) & 3) << 4)) - 32;
    }
    static __device__ __forceinline__ int scale(const uint8_t* sc, int k) { return scale(ld4(sc + (k & 4)), ld4(sc + 8), k); }
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
    static __device__ __forceinline__ void load16(const uint8_t* row, int nb, int k, float (&out)[16]) {
        const int b = k / 256, n = (k / 128) % 2, j = (k / 32) % 4, is = (k / 16) % 2;
        const uint4 q = ld16(row + 64 * b + 32 * n + 16 * is), hm = ld16(row + 64 * nb + 32 * b + 16 * is);
        spread(value(q, hm, n, j), half_to_float(ld2(d(row, nb, b))) * float(scale(scales(row, nb, b), 8 * n + 2 * j + is)), 0.0f, out);
    }
};

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
};
using TF32 = Plain<32, false>;
using TF16 = Plain<16, false>;
using TBF16 = Plain<16, true>;
