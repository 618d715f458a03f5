// What every kernel file shares: bit casts, reductions, and the shapes of the buffers.
//
// Kernels take one struct by value. The same struct is declared in Rust (`src/args.rs`), field by field; both sides order
// fields by falling alignment, so there is no hidden padding.
//
// The files also compile as plain C++ with LEMMA_EMULATE defined: `emulate.h` then supplies threads, barriers and shuffles on
// the CPU, so that every kernel can be tested where there is no GPU.
#pragma once

#ifdef LEMMA_EMULATE
#include "emulate.h"
#else
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

// Kernels are entry points with unmangled names: the host finds them by name.
#define KERNEL extern "C" __global__ void
// Arguments that are read where the launch has put them.
#define IN_PLACE __grid_constant__
// Dynamic shared memory of a block, as an array of T.
#define DYNAMIC_SHARED(T, name) extern __shared__ __align__(1024) unsigned char name##_bytes[]; T* name = reinterpret_cast<T*>(name##_bytes)

// The first thing in every kernel. With programmatic dependent launch the next kernel becomes resident once every block of this one
// has begun, and waits here until this one is done and its writes can be seen; without it, this does nothing.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
__device__ __forceinline__ int dot4(int a, int b, int c) { return __dp4a(a, b, c); }
// Each rounded by itself: the compiler does not make one operation of two.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
// Two numbers of half precision in a word.
__device__ __forceinline__ uint32_t halves(float x, float y) { return uint32_t(float_to_half(x)) | uint32_t(float_to_half(y)) << 16; }
__device__ __forceinline__ __half2 as_halves(uint32_t w) { return *reinterpret_cast<const __half2*>(&w); }
__device__ __forceinline__ uint32_t as_word(const __half2& h) { return *reinterpret_cast<const uint32_t*>(&h); }
__device__ __forceinline__ uint32_t sub_halves(uint32_t a, uint32_t b) { return as_word(__hsub2(as_halves(a), as_halves(b))); }
__device__ __forceinline__ uint32_t mul_halves(uint32_t a, uint32_t b) { return as_word(__hmul2(as_halves(a), as_halves(b))); }
__device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    return as_word(__hfma2(as_halves(a), as_halves(b), as_halves(c)));
}
// The low word of (hi, lo) shifted to the right by fewer than 32 bits.
__device__ __forceinline__ uint32_t shift_right(uint32_t lo, uint32_t hi, int by) { return __funnelshift_r(lo, hi, by); }
// The same with bytes of `a` that have no sign.
__device__ __forceinline__ int dot4_unsigned(uint32_t a, int b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Loads of what no kernel writes while this one runs. `volatile` keeps them where they are written: ahead of a barrier, say.
__device__ __forceinline__ uint4 ld16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 ld8(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ uint32_t ld4(const void* p) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ uint16_t ld2(const void* p) {
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

// Loads of what other blocks of the same launch have written before a grid barrier: past the L1 cache, which does not hear of it.
__device__ __forceinline__ float2 fresh(const float2* p) { return __ldcg(p); }
__device__ __forceinline__ uint4 fresh16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t fresh4(const void* p) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// What blocks of a launch hand to each other without a barrier: a word is written once, and read until it is no longer SENTINEL.
__device__ __forceinline__ float look(const float* p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float2 look(const float2* p) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float4 look(const float4* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void show(float* p, float v) { asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }
__device__ __forceinline__ void show(float2* p, const float2& v) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void show(float4* p, const float4& v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// Sixteen bytes that are seen together.
__device__ __forceinline__ uint4 look(const uint4* p) {
    uint64_t lo, hi;
    asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}" : "=l"(lo), "=l"(hi) : "l"(p) : "memory");
    return make_uint4(uint32_t(lo), uint32_t(lo >> 32), uint32_t(hi), uint32_t(hi >> 32));
}
__device__ __forceinline__ void show(uint4* p, const uint4& v) {
    const uint64_t lo = uint64_t(v.y) << 32 | v.x, hi = uint64_t(v.w) << 32 | v.z;
    asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}" ::"l"(p), "l"(lo), "l"(hi) : "memory");
}

// Asks for the 128 bytes around an address to be brought to the L2 cache.
__device__ __forceinline__ void bring(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A barrier of the block that warps may meet at different places of the program.
__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

// Counters that blocks meet at. `release` makes the writes of this thread, and those it has seen, visible to whoever `acquire`s.
__device__ __forceinline__ void release_add(uint32_t* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }
__device__ __forceinline__ uint32_t acquire(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint64_t acquire(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t count_up(uint32_t* p) {
    uint32_t v;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// The same for the threads of a block, in shared memory; nothing else is ordered by it.
__device__ __forceinline__ uint32_t count_in_block(uint32_t* p) { return atomicAdd(p, 1u); }
// The larger of two is kept.
__device__ __forceinline__ void raise(uint64_t* p, uint64_t v) { asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ void spin() {}
// Does nothing for up to 80 nanoseconds.
__device__ __forceinline__ void rest() { __nanosleep(40); }
// One lane of the warp, always the same; all of them ask.
__device__ __forceinline__ bool elected() {
#if __CUDA_ARCH__ >= 900
    uint32_t yes;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
    return yes;
#else
    return threadIdx.x % 32 == 0;
#endif
}
__device__ __forceinline__ uint64_t clock_now() { return clock64(); }

// Copies from global to shared memory that one thread asks for and that are counted by a barrier in shared memory; both are named by where
// they lie there (`shared_at`). `expect` says how many bytes will come, `copy` brings some of them (addresses and sizes are multiples of 16),
// `landed` waits for the end of the barrier's phase of that parity; phases begin at 0. What is copied is used once, so it leaves the L2 cache
// first: gigabytes of weights pass through it in a step, and would take activations and the kernel's own instructions with them.
__device__ __forceinline__ uint32_t shared_at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void expect_init(uint64_t* b) { asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_at(b)) : "memory"); }
__device__ __forceinline__ void expect_ready() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void expect(uint32_t b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t b) {
    uint64_t once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(b), "l"(once)
                 : "memory");
}
// The same of what is used again.
__device__ __forceinline__ void copy_kept(uint32_t to, const void* from, uint32_t bytes, uint32_t b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(b) : "memory");
}
__device__ __forceinline__ void landed(uint32_t b, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(b), "r"(parity) : "memory");
}
#else
__device__ __forceinline__ void expect_init(uint64_t*) {}
__device__ __forceinline__ void expect_ready() {}
__device__ __forceinline__ void expect(uint32_t, uint32_t) {}
__device__ __forceinline__ void copy(uint32_t, const void*, uint32_t, uint32_t) {}
__device__ __forceinline__ void copy_kept(uint32_t, const void*, uint32_t, uint32_t) {}
__device__ __forceinline__ void landed(uint32_t, uint32_t) {}
#endif
// Copies of 16 bytes to shared memory that every thread asks for itself, in groups; waits until but one of its groups are there.
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_at(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void copies_wait_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
// Four fragments of 8 x 8 halves; lane l points at row l % 8 of fragment l / 8.
__device__ __forceinline__ void load_fragments(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_at(row))
                 : "memory");
}
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
// One instruction each; what is smaller than any normal number is zero.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A number that the compiler knows nothing about, so that it does not compute ahead of a branch what is needed behind it.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ uint32_t opaque(uint32_t x) { return uint32_t(opaque(int(x))); }
// The largest and the smallest number of a warp's lanes.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffff, x); }
__device__ __forceinline__ uint32_t warp_min(uint32_t x) { return __reduce_min_sync(0xffffffff, x); }
// Byte i of the result is byte number `which`[4 i ..] of the eight of b, a; with 8 added to the number, its sign: all bits or none.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
    return r;
}
// The lowest byte of each.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// Bytes 0 and 1 of `w`, or 2 and 3, with 0x64 above each: halves of 1024 and the byte.
__device__ __forceinline__ uint32_t low_wide(uint32_t w) { return __byte_perm(w, 0x64646464, 0x4140); }
__device__ __forceinline__ uint32_t high_wide(uint32_t w) { return __byte_perm(w, 0x64646464, 0x4342); }
// Two bytes of each operand: bytes 0, 1 or bytes 2, 3.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// c[16 x 8] += a[16 x 16] b[16 x 8] over a warp: f16 operands, f32 sums.
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Products of four warps, whose factors the tensor cores read from shared memory: rows of 64 halves, whose units of 16 bytes are mixed by the
// row's number, aligned to 1,024 bytes. `copies_shown` makes what this thread has written there visible to them, ahead of a barrier.
// Behind `group_products_begin` several may be asked for, and `group_products_end`; sums are there behind `group_products_wait`.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void copies_shown() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void group_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Elements 16 ks .. 16 ks + 16 of rows that begin at `p`: eight rows have 1,024 bytes, the swizzle is that of 128.
__device__ __forceinline__ uint64_t group_factor(const uint16_t* p, int ks) {
    // Shared memory is too small for the sum to leave its 14 bits.
    const uint32_t low = (shared_at(p) >> 4 & 0x3fff | 1 << 16) + 2 * ks;
    return low | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// d[64 x n] = a[64 x 16] b[n x 16]^T, added to what is there if `add`; d as fragments of 16 x 8, 16 rows a warp.
__device__ __forceinline__ void mma_group(float (&d)[8][4], const uint16_t* a, const uint16_t* b, int ks, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, 0;\n}"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
          "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
          "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
          "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
          "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
          "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
          "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
        : "l"(group_factor(a, ks)), "l"(group_factor(b, ks)), "r"(int(add)));
}
__device__ __forceinline__ void mma_group(float (&d)[16][4], const uint16_t* a, const uint16_t* b, int ks, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 0, 0;\n}"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),
          "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
          "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
          "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
          "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
          "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
          "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
          "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
          "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
          "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]),
          "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
          "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
          "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
          "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]),
          "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
        : "l"(group_factor(a, ks)), "l"(group_factor(b, ks)), "r"(int(add)));
}
#define HAS_GROUP_PRODUCTS
#endif
#endif

// Kernels with Hopper's products have a twin for all other devices. What is compiled for a device has the one that the host asks it for
// (Gpu::has_group_products); the emulator has both, and so has what a driver may compile for Hopper by itself.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER(...) __VA_ARGS__
#define ELSEWHERE(...)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ON_HOPPER(...)
#define ELSEWHERE(...) __VA_ARGS__
#else
#define ON_HOPPER(...) __VA_ARGS__
#define ELSEWHERE(...) __VA_ARGS__
#endif

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
// Tokens in a page of the KV pool.
constexpr int PAGE = 16;

// No token.
constexpr uint32_t NOBODY = 0xffffffff;

// Logits as whole numbers of the same order, those of equal logits by falling token, so that all differ; 0 for what is no number. Minus zero is
// zero, and plus infinity the largest number.
__device__ __forceinline__ uint64_t logit_key(float x, uint32_t token) {
    const uint32_t bits = __float_as_uint(fminf(x, 3.402823466e38f) + 0.0f);
    return x > -INFINITY ? uint64_t(bits & 0x80000000 ? ~bits : bits | 0x80000000) << 32 | (NOBODY - token) : 0;
}
__device__ __forceinline__ float key_logit(uint64_t key) {
    const uint32_t bits = uint32_t(key >> 32);
    return __uint_as_float(bits & 0x80000000 ? bits & 0x7fffffff : ~bits);
}
__device__ __forceinline__ uint32_t key_token(uint64_t key) { return NOBODY - uint32_t(key); }

__device__ __forceinline__ float bf16_to_float(uint16_t b) { return __uint_as_float(uint32_t(b) << 16); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(ALL, x, o);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int o = WARP / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, o));
    return x;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// log(1 + exp(x)). Far out it is the number itself, and its exponential none.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written as x times a sigmoid.
__device__ __forceinline__ float gelu(float x) { return x / (1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

// What feed-forward blocks make of a gate and of what goes up beside it.
enum Glu : uint32_t {
    SWIGLU = 0,      // silu(gate) * up
    SWIGLU_OAI = 1,  // of a gate of at most 7 and up within 7 of zero: gate * sigmoid(1.702 gate) * (up + 1)
    GEGLU = 2,       // gelu(gate) * up
    REGLU = 3,       // max(gate, 0) * up
};
__device__ __forceinline__ float glu(uint32_t kind, float g, float u) {
    if (kind == SWIGLU) return silu(g) * u;
    if (kind == GEGLU) return gelu(g) * u;
    if (kind == REGLU) return fmaxf(g, 0.0f) * u;
    g = fminf(g, 7.0f), u = fminf(fmaxf(u, -7.0f), 7.0f);
    return g / (1.0f + __expf(-1.702f * g)) * (u + 1.0f);
}

// What feed-forward blocks without gates make of each element.
enum Activation : uint32_t {
    NO_ACTIVATION = 0,
    RELU_SQR = 1,  // max(x, 0)^2
    XIELU = 2,     // alpha_p x^2 + beta x where x is positive, elsewhere alpha_n (exp(min(x, eps)) - 1 - x) + beta x
    GELU = 3,      // by the tanh formula
};
struct ActivationParams {
    uint32_t kind;  // `Activation`
    float alpha_n;
    float alpha_p;
    float beta;
    float eps;
};
__device__ __forceinline__ float activated(const ActivationParams& by, float x) {
    if (by.kind == RELU_SQR) return x > 0.0f ? x * x : 0.0f;
    if (by.kind == GELU) return gelu(x);
    if (by.kind == XIELU) return (x > 0.0f ? by.alpha_p * x * x : by.alpha_n * (expm1f(fminf(x, by.eps)) - x)) + by.beta * x;
    return x;
}

// cap * tanh(x / cap)
__device__ __forceinline__ float soft_cap(float x, float cap) { return cap - quotient(2.0f * cap, 1.0f + __expf(quotient(2.0f * x, cap))); }

// Sum over the block, known to every thread. `scratch` holds a float per warp; the block is a multiple of 32 threads.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warp = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // scratch may still be read from an earlier call
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < n_warp; w++) sum += scratch[w];
    return sum;
}

// Pair i of a head of 2 * half elements. neox: 0 pairs neighbours, else elements that are so many apart, as far as twice as many rotate;
// behind them the rest is paired too, so that every element is in one pair.
struct Pair {
    int i0, i1;
    __device__ __forceinline__ Pair(int i, int half, int neox)
        : i0(!neox ? 2 * i : i < neox ? i : i + neox), i1(!neox ? 2 * i + 1 : i < neox ? i + neox : i + half) {}
};

// A number without its fraction, within bounds; what is not a number is 0.
__device__ __forceinline__ int whole(float x, int lo, int hi) {
    return x == x ? min(max(int(fminf(fmaxf(x, float(lo) - 1.0f), float(hi) + 1.0f)), lo), hi) : 0;
}

// Activations of one token quantized for integer dot products: blocks of 32 elements.
//   q  : (n) int8, x ~ d * q
//   ds : (n / 32) pairs, d and d * sum(q) of the block
//
// A warp quantizes one block, a lane holding one element. Returns nothing; writes q[lane] and, from lane 0, the pair.
__device__ __forceinline__ void quantize_block(float x, int8_t* q, float2* ds) {
    const int lane = threadIdx.x % WARP;
    const float amax = warp_max(fabsf(x));
    const float d = amax / 127.0f;
    const float inv = amax > 0.0f ? 127.0f / amax : 0.0f;
    const int v = __float2int_rn(x * inv);
    const float sum = warp_sum(float(v));
    q[lane] = int8_t(v);
    if (lane == 0) *ds = make_float2(d, d * sum);
}
// The same of eight elements a lane, four lanes for a block; `keep`: this lane has some. `q` and `ds` are theirs.
__device__ __forceinline__ void quantize_eight(const float (&x)[8], bool keep, int8_t* q, float2* ds) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(x[i]));
    amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, 2));
    const float d = amax / 127.0f, inv = amax > 0.0f ? 127.0f / amax : 0.0f;
    uint32_t w[2] = {};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int v = __float2int_rn(x[i] * inv);
        sum += v, w[i / 4] |= uint32_t(v & 0xff) << (8 * (i % 4));
    }
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (!keep) return;
    *reinterpret_cast<uint2*>(q) = make_uint2(w[0], w[1]);
    if (threadIdx.x % 4 == 0) *ds = make_float2(d, d * float(sum));
}
