// CUDA's words as plain C++: enough of them to run this folder's kernels on a CPU, one fiber per thread.
//
// A block's threads are fibers on one stack each. They run in turn until they meet a barrier or a warp operation. Two orders
// can be chosen (threads ascending or descending), so that a missing barrier shows as a wrong result in one of them.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define KERNEL static void
#define IN_PLACE
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulated_shared)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern unsigned char* emulated_shared;

inline void begin() {}
void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
// Hands `n` bytes of every lane to every lane: `all` is [32][n].
void emulated_exchange(const void* mine, void* all, size_t n);

template <class T> inline T __shfl_sync(unsigned, T x, int lane) {
    T all[32];
    emulated_exchange(&x, all, sizeof(T));
    return all[lane & 31];
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return __shfl_sync(mask, x, (threadIdx.x % 32) ^ bits);
}

inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline int __float2int_rn(float x) { return x != x ? 0 : int(nearbyintf(x)); }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T> inline T __ldg(const T* p) { return *p; }

inline uint4 ld16(const void* p) { return *static_cast<const uint4*>(p); }
inline uint2 ld8(const void* p) { return *static_cast<const uint2*>(p); }
inline uint32_t ld4(const void* p) { return *static_cast<const uint32_t*>(p); }
inline uint16_t ld2(const void* p) { return *static_cast<const uint16_t*>(p); }

inline float2 fresh(const float2* p) { return *p; }
inline uint4 fresh16(const void* p) { return ld16(p); }
inline uint32_t fresh4(const void* p) { return ld4(p); }
inline float look(const float* p) { return *p; }
inline float2 look(const float2* p) { return *p; }
inline float4 look(const float4* p) { return *p; }
inline uint4 look(const uint4* p) { return *p; }
inline void show(float* p, float v) { *p = v; }
inline void show(float2* p, const float2& v) { *p = v; }
inline void show(float4* p, const float4& v) { *p = v; }
inline void show(uint4* p, const uint4& v) { *p = v; }
inline void raise(uint64_t* p, uint64_t v) { *p = *p > v ? *p : v; }
inline bool elected() { return threadIdx.x % 32 == 0; }
inline void block_barrier() { __syncthreads(); }
inline void release_add(uint32_t* p) { ++*p; }
inline uint32_t acquire(const uint32_t* p) { return *p; }
inline uint64_t acquire(const uint64_t* p) { return *p; }
inline uint32_t count_up(uint32_t* p) { return (*p)++; }
inline uint32_t count_in_block(uint32_t* p) { return (*p)++; }
void spin();
inline void rest() { spin(); }
inline uint64_t clock_now() { return 0; }
// A barrier counts its phases; what is asked for is there at once.
inline void expect_init(uint64_t* b) { *b = 0; }
inline void expect_ready() {}
inline uint32_t shared_at(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - emulated_shared); }
inline void expect(uint32_t b, uint32_t) { ++*reinterpret_cast<uint64_t*>(emulated_shared + b); }
inline void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t) { memcpy(emulated_shared + to, from, bytes); }
inline void copy_kept(uint32_t to, const void* from, uint32_t bytes, uint32_t) { memcpy(emulated_shared + to, from, bytes); }
inline void landed(uint32_t b, uint32_t parity) {
    while ((*reinterpret_cast<const uint64_t*>(emulated_shared + b) & 1) == parity) spin();
}
inline void copy16(void* to, const void* from) { memcpy(to, from, 16); }
inline void copies_commit() {}
inline void copies_wait() {}
inline void copies_wait_but_one() {}
inline void load_fragments(uint32_t (&r)[4], const void* row) {
    const unsigned char* rows[32];
    const unsigned char* mine = static_cast<const unsigned char*>(row);
    emulated_exchange(&mine, rows, sizeof mine);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) memcpy(r + i, rows[8 * i + lane / 4] + 4 * (lane % 4), 4);
    __syncwarp();
}
inline float quotient(float a, float b) { return a / b; }
inline float power_of_two(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline void bring(const void*) {}
inline int opaque(int x) { return x; }
inline uint32_t opaque(uint32_t x) { return x; }
inline uint32_t warp_max(uint32_t x) {
    for (int o = 16; o > 0; o /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, x, o);
        x = x > other ? x : other;
    }
    return x;
}
inline uint32_t warp_min(uint32_t x) { return ~warp_max(~x); }
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t all = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t n = which >> (4 * i), byte = uint32_t(all >> (8 * (n & 7)) & 0xff);
        r |= (n & 8 ? (byte & 0x80 ? 0xffu : 0) : byte) << (8 * i);
    }
    return r;
}
inline uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | d << 24;
}
inline uint32_t low_wide(uint32_t w) { return 0x64006400u | (w & 0xff) | (w & 0xff00) << 8; }
inline uint32_t high_wide(uint32_t w) { return low_wide(w >> 16); }
inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

struct HalfTable {
    float value[1 << 16];
    HalfTable() {
        for (int i = 0; i < 1 << 16; i++) {
            const uint16_t h = uint16_t(i);
            _Float16 x;
            memcpy(&x, &h, 2);
            value[i] = float(x);
        }
    }
};
extern const HalfTable half_table;
inline float half_to_float(uint16_t h) { return half_table.value[h]; }
inline uint16_t float_to_half(float f) { _Float16 x = _Float16(f); uint16_t h; memcpy(&h, &x, 2); return h; }

inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline uint32_t halves(float x, float y) { return uint32_t(float_to_half(x)) | uint32_t(float_to_half(y)) << 16; }
template <class F> inline uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, F f) {
    auto at = [](uint32_t w, int i) { return half_to_float(uint16_t(w >> 16 * i)); };
    return halves(f(at(a, 0), at(b, 0), at(c, 0)), f(at(a, 1), at(b, 1), at(c, 1)));
}
inline uint32_t sub_halves(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x - y; }); }
inline uint32_t mul_halves(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x * y; }); }
inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) { return each_half(a, b, c, [](float x, float y, float z) { return x * y + z; }); }
inline uint32_t shift_right(uint32_t lo, uint32_t hi, int by) { return uint32_t((uint64_t(hi) << 32 | lo) >> by); }

inline int dot4(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int8_t(uint32_t(a) >> (8 * i)) * int8_t(uint32_t(b) >> (8 * i));
    return c;
}

inline int dot4_unsigned(uint32_t a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(a >> (8 * i) & 0xff) * int8_t(uint32_t(b) >> (8 * i));
    return c;
}

// The fragment layout of mma.m16n8k16: lane = 4 * group + t; A rows group and group + 8, columns 2t and 2t + 8; B columns group.
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Frag { uint32_t a[4], b[2]; } mine, all[32];
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    emulated_exchange(&mine, all, sizeof mine);
    const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    auto part = [](uint32_t w, int i) { return half_to_float(uint16_t(w >> (16 * i))); };
    for (int i = 0; i < 4; i++) {
        const int row = group + (i / 2) * 8, col = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const int kt = (k % 8) / 2, hi = k / 8;
            const float x = part(all[(row % 8) * 4 + kt].a[row / 8 + 2 * hi], k % 2);
            const float y = part(all[col * 4 + kt].b[hi], k % 2);
            c[i] += x * y;
        }
    }
}

#define HAS_GROUP_PRODUCTS
inline void copies_shown() {}
inline void group_products_begin() {}
inline void group_products_end() {}
inline void group_products_wait() {}
template <int N> inline void mma_group(float (&d)[N][4], const uint16_t* a, const uint16_t* b, int ks, bool add) {
    auto at = [ks](const uint16_t* p, int row, int k) { return half_to_float(p[64 * row + 8 * ((2 * ks + k / 8) ^ (row & 7)) + k % 8]); };
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int j = 0; j < N; j++) {
        for (int i = 0; i < 4; i++) {
            if (!add) d[j][i] = 0.0f;
            for (int k = 0; k < 16; k++) d[j][i] += at(a, row + i / 2 * 8, k) * at(b, 8 * j + 2 * (lane % 4) + i % 2, k);
        }
    }
}
