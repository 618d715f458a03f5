// How the pool stores keys and values.
//
// f16 lies token after token, (slots, PAGE, n_head_kv, head_dim). Of any other type a page of a head is one piece, (slots, n_head_kv, bytes),
// whose parts stand in an order that wide loads like:
//
//   q8_0   quants (PAGE, head_dim), scales (head_dim / 32, PAGE) f16
//   q4_0   the same, quants (PAGE, head_dim / 2), 16 bytes of a block as ggml has them
//   k4     keys, tiles of 32 channels as lemma-quant has them: 32 bits of each channel (four of tokens 0 to 7 each), as many (8 to 15),
//          scales, zeros
//   v2     values, likewise: 32 bits of each channel, two of each token; scales and zeros of the tokens
//
// Those are the bytes that the CPU stores of the same numbers, in another order, rounded in the same way. head_dim is a multiple of 32.
#pragma once
#include "types.cuh"

// Beside the numbers of ggml_type.
constexpr uint32_t K4 = 256, V2 = 257;
constexpr int TILE_ROW = 32;  // channels of a tile, elements of a block
constexpr int MAX_TIERS = 4;

// Keys and values of a layer in a tier.
struct Tier {
    const uint8_t* k;
    const uint8_t* v;
    uint32_t type_k;
    uint32_t type_v;
};

// An entry of a page table, slot and first position: the tier is in the upper two bits of the slot.
__device__ __forceinline__ uint32_t tier_of(const uint2& page) { return page.x >> 30; }
__device__ __forceinline__ uint32_t slot_of(const uint2& page) { return page.x & 0x3fffffff; }

// Tokens that a query sees, itself included; this many are all.
constexpr uint32_t NO_WINDOW = 0x7fffffff;

// A page that is not behind the first that any of the last `n` tokens sees: no more pages reach into their windows, since all but the last
// are full.
__device__ __forceinline__ int first_in_window(int n_pages, int n, uint32_t window) {
    return window == NO_WINDOW ? 0 : max(0, n_pages - 2 - int((window + n) / PAGE));
}

// Bytes of a page of a head, by tiles of it; f16 is not in one piece.
__device__ __forceinline__ int tile_bytes(uint32_t type) {
    return type == K4 ? 320 : type == V2 ? 160 : type == Q4_0 ? PAGE * 18 : type == Q8_0 ? PAGE * 34 : PAGE * 64;
}

// Where a page of a head begins.
__device__ __forceinline__ const uint8_t* page_at(const uint8_t* pool, uint32_t type, uint32_t slot, int n_kv, int kv, int d) {
    const size_t slots = size_t(slot) * n_kv;
    return type == F16 ? pool + 2 * (slots * PAGE + kv) * d : pool + (slots + kv) * (d / TILE_ROW * tile_bytes(type));
}

// The scale that a byte of k4 or v2 stands for.
__device__ __forceinline__ float byte_scale(uint32_t byte) { return byte ? __uint_as_float((byte + ((127 - 16) << 3)) << 20) : 0.0f; }
// The number that is added to quants of that scale; it is counted in a `part` of a step.
__device__ __forceinline__ float byte_zero(uint32_t byte, float d, float part) { return float(int8_t(byte)) * (d * part); }

__device__ __forceinline__ float block_scale(const uint8_t* scales, int b, int row) {
    return half_to_float(reinterpret_cast<const uint16_t*>(scales)[b * PAGE + row]);
}

// An element of a page; rows of f16 are `stride` elements apart.
__device__ __forceinline__ float stored(const uint8_t* page, uint32_t type, int stride, int d, int row, int e) {
    const int b = e / TILE_ROW, i = e % TILE_ROW;
    if (type == F16) return half_to_float(reinterpret_cast<const uint16_t*>(page)[row * stride + e]);
    if (type == Q8_0) return float(int8_t(page[row * d + e])) * block_scale(page + PAGE * d, b, row);
    if (type == Q4_0) {
        const uint32_t q = page[(row * d + b * TILE_ROW) / 2 + i % 16] >> i / 16 * 4 & 15;
        return float(int(q) - 8) * block_scale(page + PAGE * d / 2, b, row);
    }
    const uint8_t* tile = page + b * tile_bytes(type);
    const bool keys = type == K4;
    const uint32_t bits = reinterpret_cast<const uint32_t*>(tile)[keys ? row / 8 * TILE_ROW + i : i];
    const int at = keys ? 256 + i : 128 + row;
    const float s = byte_scale(tile[at]), zero = byte_zero(tile[at + (keys ? 32 : 16)], s, keys ? 1.0f : 0.125f);
    const uint32_t q = keys ? bits >> 4 * (row % 8) & 15 : bits >> 2 * row & 3;
    // Every product and sum is exact.
    return float(q) * s + zero;
}

// Eight of them, from a multiple of eight on.
__device__ __forceinline__ void stored8(const uint8_t* page, uint32_t type, int stride, int d, int row, int e, float (&out)[8]) {
    const int b = e / TILE_ROW, i = e % TILE_ROW;
    if (type == F16) {
        const uint4 v = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint16_t*>(page) + row * stride + e);
#pragma unroll
        for (int k = 0; k < 8; k++) out[k] = half_to_float(word(v, k / 2) >> (16 * (k % 2)));
    } else if (type == Q8_0 || type == Q4_0) {
        const bool wide = type == Q8_0;
        const uint2 v = *reinterpret_cast<const uint2*>(page + (wide ? row * d + e : (row * d + b * TILE_ROW) / 2 + i % 16));
        const float s = block_scale(page + (wide ? PAGE * d : PAGE * d / 2), b, row);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t x = (k < 4 ? v.x : v.y) >> (8 * (k % 4));
            out[k] = s * float(wide ? int(int8_t(x)) : int(x >> i / 16 * 4 & 15) - 8);
        }
    } else {
        for (int k = 0; k < 8; k++) out[k] = stored(page, type, stride, d, row, e + k);
    }
}

// Stores a row of a block of 32 numbers, a lane each, in a page of a type of rows; all lanes of a warp together.
__device__ __forceinline__ void store_block(float x, uint8_t* page, uint32_t type, int stride, int d, int row, int b) {
    const int lane = threadIdx.x % WARP, e = b * TILE_ROW + lane;
    if (type == F16) {
        reinterpret_cast<uint16_t*>(page)[row * stride + e] = float_to_half(x);
        return;
    }
    const bool wide = type == Q8_0;
    const float top = warp_max(fabsf(x) >= 0.0f ? fabsf(x) : 0.0f);
    // The first of the largest, with its sign.
    int first = fabsf(x) == top ? lane : WARP;
    for (int o = WARP / 2; o > 0; o /= 2) first = min(first, __shfl_xor_sync(ALL, first, o));
    const float most = __shfl_sync(ALL, x, first % WARP), largest = top > 0.0f ? most : 0.0f;
    const float s = wide ? div_rn(fabsf(largest), 127.0f) : div_rn(largest, -8.0f), inv = s == 0.0f ? 0.0f : div_rn(1.0f, s);
    const float q = mul_rn(x, inv);
    if (wide) {
        page[row * d + e] = uint8_t(int8_t(whole(add_rn(q, copysignf(0.49999997f, q)), -127, 127)));
    } else {
        const uint32_t mine = whole(add_rn(q, 8.5f), 0, 15), other = __shfl_xor_sync(ALL, mine, 16);
        if (lane < 16) page[(row * d + b * TILE_ROW) / 2 + lane] = uint8_t(mine | other << 4);
    }
    if (lane == 0) reinterpret_cast<uint16_t*>(page + (wide ? PAGE * d : PAGE * d / 2))[b * PAGE + row] = float_to_half(s);
}

// Two columns of a page, for whoever goes through its rows.
struct Columns {
    const uint8_t* page;
    uint32_t type;
    int stride, d, e;      // e: the first of them, even
    uint32_t bits[2];      // v2: those of the columns
    const uint8_t* tile;

    __device__ __forceinline__ Columns(const uint8_t* page, uint32_t type, int stride, int d, int e) : page(page), type(type), stride(stride), d(d), e(e) {
        bits[0] = bits[1] = 0;
        tile = page;
        if (type != V2) return;
        tile = page + e / TILE_ROW * tile_bytes(V2);
        const uint2 two = *reinterpret_cast<const uint2*>(tile + 4 * (e % TILE_ROW));
        bits[0] = two.x, bits[1] = two.y;
    }
    __device__ __forceinline__ float2 row(int i) const {
        if (type == F16) {
            const uint32_t w = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint16_t*>(page) + i * stride + e);
            return make_float2(half_to_float(w & 0xffff), half_to_float(w >> 16));
        }
        if (type != V2) return make_float2(stored(page, type, stride, d, i, e), stored(page, type, stride, d, i, e + 1));
        const float s = byte_scale(tile[128 + i]), zero = byte_zero(tile[144 + i], s, 0.125f);
        return make_float2(float(bits[0] >> 2 * i & 3) * s + zero, float(bits[1] >> 2 * i & 3) * s + zero);
    }
};
