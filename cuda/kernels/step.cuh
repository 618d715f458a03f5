// A whole decode step in one launch: what its phases share.
//
// One block lives on every multiprocessor for the whole step and runs the same list of phases (`Phase`), most of them a few products with
// one input. Between phases the blocks meet at a barrier in global memory. What makes this faster than a launch for each phase is what
// happens around the barrier: weights never change, so that the first of them are already in shared memory when the barrier opens and
// the activations of the phase before can be read.
//
// The code of a phase is run once and then again only after that of all the others, so it comes from far away: it has to be short.
// Hence functions that are not inlined, loops that are not unrolled, and copies that one thread asks for.
#pragma once
#include "types.cuh"

constexpr int STEP_WARPS = 16;      // at most
constexpr int RING = 9 << 10;       // bytes of weights on their way to a warp
constexpr int MAX_STAGES = 8;       // pieces that they come in

enum PhaseKind : uint32_t { EMBED = 0, PRODUCTS = 1, ATTEND = 2, WEIGH = 3 };
enum PhaseMode : uint32_t { PUT = 0, ADD_TO = 1, GATED = 2 };

// A matrix of a phase of products.
struct Matrix {
    const uint8_t* w;    // (n_out) rows
    float* out;          // (n_out)
    const float* bias;   // (n_out) or null
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_out;
};

struct Phase {
    Matrix m[3];
    const float* src;      // PRODUCTS: input (n_in)
    const float* norm;     // PRODUCTS: (n_in) weights of an RMS norm of the input, or null
    const float* q;        // ATTEND: (n_head, head_dim) not yet normed nor rotated
    const float* k;        // (n_head_kv, head_dim) likewise
    const float* v;        // (n_head_kv, head_dim)
    const float* q_norm;   // (head_dim) or null
    const float* k_norm;   // (head_dim) or null
    uint16_t* pool_k;      // (slots, PAGE, n_head_kv, head_dim) f16
    uint16_t* pool_v;      // likewise
    const uint2* pages;    // (n_pages) slot, first position, in position order
    const uint32_t* n_pages;
    const uint32_t* place; // slot * PAGE + row of the token
    float* out;            // (n_head, head_dim)
    float2* page_ml;       // (n_head, max_pages) maximum and sum of exponentials of each page, or null
    float2* head_ml;       // (n_head) the same over all pages
    float* mass;           // WEIGH: (n_in, max_pages), n_in layers; n_pages, page_ml and head_ml are then those of all layers
    uint32_t kind;
    uint32_t mode;
    uint32_t n_mat;
    uint32_t n_in;
    uint32_t wait;         // whether the phase begins behind a grid barrier
    uint32_t arrive;       // whether it ends at one
    uint32_t want_f;       // the input is wanted as numbers
    uint32_t want_q;       // and quantized
    float eps;
    float eps_q;
    float eps_k;
    uint32_t rope;         // whether queries and keys are rotated
    uint32_t pad[2];
};

struct Step {
    const Phase* phases;
    uint32_t* arrived;       // (1) blocks that came to barriers, zero between launches
    uint32_t* left;          // (1) blocks that are done, zero between launches
    uint32_t* joined;        // (units) blocks that have left their part of a unit of attention, zero between launches
    float* part;             // (n_head, max_splits, head_dim)
    float2* part_ml;         // (n_head, max_splits)
    const float2* rope;      // (head_dim / 2) cosine and sine
    const uint32_t* pos;     // (1)
    const uint32_t* token;   // (1)
    uint64_t* trace;         // (n_phase, 3, blocks) clocks: begin, barrier open, end; or null
    uint32_t n_phase;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_dim;       // a multiple of 8, at most 128
    uint32_t max_pages;
    uint32_t max_splits;
    uint32_t neox;
    uint32_t mean;
    float scale;
    uint32_t pad[3];
};

// The beginning of a block's dynamic shared memory.
struct StepShared {
    Step a;
    Phase p[2];  // this phase and the next, in turn
    uint64_t landing[STEP_WARPS][MAX_STAGES];  // of each warp's stages
    uint32_t parity[STEP_WARPS];               // bit i: phase of stage i
    unsigned char ring[STEP_WARPS][RING];      // weights on their way, STEP_WARPS or fewer
};

// Where a block is: phase and grid barriers so far. Functions that are called get this and find the rest in shared memory.
struct Place {
    uint32_t phase, met;
};

// What a block knows while it runs a phase.
struct Here {
    const Step& a;
    const Phase& p;
    unsigned char* shared;   // dynamic shared memory behind StepShared
    uint32_t phase, met;
};
__device__ __forceinline__ Here here(Place at) {
    DYNAMIC_SHARED(StepShared, all);
    return {all->a, all->p[at.phase % 2], reinterpret_cast<unsigned char*>(all + 1), at.phase, at.met};
}

__device__ __forceinline__ void trace(const Here& h, int what) {
    if (h.a.trace && threadIdx.x == 0) h.a.trace[(size_t(h.phase) * 3 + what) * gridDim.x + blockIdx.x] = clock_now();
}

// Everybody waits until all blocks have arrived `met` times.
__device__ __forceinline__ void grid_wait(const Here& h) {
    if (h.p.wait) {
        if (threadIdx.x == 0) {
            const uint32_t all = h.met * gridDim.x;
            while (acquire(h.a.arrived) < all) spin();
        }
        block_barrier();
    }
    trace(h, 1);
}

// The end of a phase: the block has written what it had to. Called inside the functions of the phases, so that what they restore
// before they return comes behind it.
__device__ __forceinline__ void finish(const Here& h) {
    const bool arrive = h.p.arrive;
    block_barrier();
    trace(h, 2);
    if (arrive && threadIdx.x == 0) release_add(h.a.arrived);
}

// The rows of a phase that this block computes: lo .. hi of all matrices one after the other (of one matrix if they are gated).
__device__ __forceinline__ int phase_rows(const Phase& p) {
    int n = p.m[0].n_out;
    if (p.mode != GATED) {
        for (uint32_t i = 1; i < p.n_mat; i++) n += p.m[i].n_out;
    }
    return n;
}
// Where part i of n begins, parts differing by one at most.
__device__ __forceinline__ int share(int n, int i, int of) { return n / of * i + min(i, n % of); }

// One token's activations in shared memory, in units of 16 bytes whose order within 128 bytes is mixed, so that lanes which read
// every second, fourth or eighth unit meet different banks.
struct Spread {
    const float* f;
    const int8_t* q;
    const float2* ds;

    static __device__ __forceinline__ int key(int u) { return (0x7250 >> (4 * ((u >> 3) & 3))) & 7; }
    static __device__ __forceinline__ int at(int u) { return u ^ key(u); }
    __device__ __forceinline__ uint4 q16(int u, int i) const { return reinterpret_cast<const uint4*>(q)[at(u) ^ i]; }
    __device__ __forceinline__ float2 scale(int b) const { return ds[b]; }
    __device__ __forceinline__ void f8(int p, float (&out)[8]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 v = reinterpret_cast<const float4*>(f)[at(2 * p) ^ i];
            out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
        }
    }
};

// Bytes of the forms of an input in shared memory: numbers, quantized, their scales; then a float for each warp.
struct Input {
    float* f;
    int8_t* q;
    float2* ds;
    float* sums;

    __device__ __forceinline__ Input(const Here& h) {
        const size_t n = h.p.n_in;
        unsigned char* at = h.shared;
        sums = reinterpret_cast<float*>(at), at += 4 * STEP_WARPS;
        f = reinterpret_cast<float*>(at), at += h.p.want_f ? (4 * n + 127) / 128 * 128 : 0;
        q = reinterpret_cast<int8_t*>(at), at += h.p.want_q ? (n + 127) / 128 * 128 : 0;
        ds = reinterpret_cast<float2*>(at);
    }
    __device__ __forceinline__ Spread view() const { return {f, q, ds}; }
};

// Behind the barrier: the input of a phase of products, times the weights of the norm if there is one, into shared memory in the forms
// that are wanted. What the norm divides by is the same for all of the input, so it multiplies the results instead (`input_scale`).
__device__ __forceinline__ void read_input(const Here& h, const Input& in) {
    grid_wait(h);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n8 = h.p.n_in / 8;
    float sum = 0.0f;
    for (int u0 = warp * WARP; u0 < n8; u0 += blockDim.x) {
        const int u = u0 + lane;
        float x[8] = {};
        if (u < n8) {
            const float4* src = reinterpret_cast<const float4*>(h.p.src) + 2 * u;
            const float4 v0 = fresh(src), v1 = fresh(src + 1);
            x[0] = v0.x, x[1] = v0.y, x[2] = v0.z, x[3] = v0.w, x[4] = v1.x, x[5] = v1.y, x[6] = v1.z, x[7] = v1.w;
            if (h.p.norm) {
                const uint4 w0 = ld16(h.p.norm + 8 * u), w1 = ld16(h.p.norm + 8 * u + 4);
#pragma unroll
                for (int i = 0; i < 8; i++) sum += x[i] * x[i], x[i] *= __uint_as_float(word(i < 4 ? w0 : w1, i % 4));
            }
            if (h.p.want_f) {
                float4* f = reinterpret_cast<float4*>(in.f);
                f[Spread::at(2 * u)] = make_float4(x[0], x[1], x[2], x[3]);
                f[Spread::at(2 * u + 1)] = make_float4(x[4], x[5], x[6], x[7]);
            }
        }
        if (h.p.want_q) {
            // Four lanes hold a block of 32.
            float amax = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(x[i]));
            amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, 1));
            amax = fmaxf(amax, __shfl_xor_sync(ALL, amax, 2));
            const float d = amax * (1.0f / 127.0f), inv = amax > 0.0f ? quotient(127.0f, amax) : 0.0f;
            uint32_t w[2] = {0, 0};
            int total = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int v = __float2int_rn(x[i] * inv);
                total += v, w[i / 4] |= uint32_t(v & 0xff) << (8 * (i % 4));
            }
            total += __shfl_xor_sync(ALL, total, 1);
            total += __shfl_xor_sync(ALL, total, 2);
            if (u < n8) {
                reinterpret_cast<uint2*>(in.q)[2 * Spread::at(u / 2) + u % 2] = make_uint2(w[0], w[1]);
                if (lane % 4 == 0) in.ds[u / 4] = make_float2(d, d * float(total));
            }
        }
    }
    if (h.p.norm) {
        sum = warp_sum(sum);
        if (lane == 0) in.sums[warp] = sum;
    }
    block_barrier();
}

// What the results of the phase are multiplied by.
__device__ __forceinline__ float input_scale(const Here& h, const Input& in) {
    if (!h.p.norm) return 1.0f;
    const int lane = threadIdx.x % WARP;
    const float sum = warp_sum(lane < int(blockDim.x) / WARP ? in.sums[lane] : 0.0f);
    return rsqrtf(sum / float(h.p.n_in) + h.p.eps);
}
