// A whole decode step in one launch: what its phases share.
//
// One block lives on every multiprocessor for the whole step and runs the same list of phases (`Phase`), most of them a few products with
// one input. No barrier stands between phases. What a phase writes for another goes to a place of its own (`SENTINEL` in every word
// before), and whoever wants it looks until it is there: a word is its own flag. There are two sets of these places; a launch uses one and
// makes the other ready for the next. What makes this faster than a launch for each phase is also what happens while a block waits:
// weights never change, so that the first of them are already in shared memory when the activations arrive: each warp has a ring there, and
// asks for the weights of this phase and of those behind it as long as there is room.
//
// Every block runs all phases in order, and each waits only for earlier ones, so that somebody can always go on.
#pragma once
#include "elements.cuh"

constexpr int STEP_WARPS = 16;
constexpr int RING = 9 << 10;       // bytes of weights on their way to a warp
constexpr int MAX_STAGES = 8;       // that are on their way or wait to be read, at most
constexpr uint32_t AHEAD = 2;       // phases that warps ask for weights ahead
constexpr uint32_t SENTINEL = 0xffffffff;  // a number that no sum is: arithmetic answers with another NaN

constexpr int MAX_WORDS = 896;
constexpr int MAX_USED = 16;        // experts of a token, at most

enum PhaseKind : uint32_t { EMBED = 0, PRODUCTS = 1, ATTEND = 2, WEIGH = 3, BEST = 4 };
// What products are of. Those of gate and up choose the experts first, by the results of a phase before (the router's), and hand over gated
// results times what the expert weighs, so that what goes down is one sum over all of them.
enum ExpertsOf : uint32_t { NO_EXPERTS = 0, GATE_UP = 1, DOWN = 2 };
// What norms of queries and keys are over: each head, each head once it has rotated, all heads together.
enum NormOf : uint32_t { HEADS = 0, ROTATED_HEADS = 1, ALL_HEADS = 2 };

// A matrix of a phase of products. Each block has rows of one matrix, so that its warps stream through one run of them.
struct __align__(16) Matrix {
    const uint8_t* w;    // (n_out) rows
    float* out;          // (n_out)
    const float* bias;   // (n_out) or null
    const float* add;    // (n_out) what is added to the results, or null
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_out;
    // How it comes to a warp: a stage of the ring is filled at once, by as many copies.
    uint32_t copies;     // two of rows of gate and up, and of chunks of two rows
    uint32_t apart;      // bytes between the rows of a group in the stage
    uint32_t bytes;      // of a copy, and the way to the next
    uint32_t tail;       // of the last copy of a row, if it comes in several
    uint32_t jump;       // the way from there to the next
    uint32_t of_row;     // how often is asked for a row; 1 if it comes whole
    uint32_t stage;      // bytes of a stage, a multiple of 128
    uint32_t unit;       // bytes of a unit: a group of whole rows, or a chunk
    uint32_t units;      // in a stage
    uint32_t expert_bytes;
    uint32_t pad[2];
};

// Rows of one matrix that a warp computes in a phase of products, in groups of one or two. With gates a group is a row of gate and one of up.
struct Work {
    const uint8_t* w0;  // the rows of the first group
    const uint8_t* w1;
    uint32_t row;       // the first row
    uint32_t n_row;     // with gates, pairs
    uint32_t last;      // bytes of a copy of the last time it asks for weights
    uint32_t single;    // how often it asks for one row instead of two at the end
    uint32_t asks;      // how often it asks
    uint8_t matrix;     // of the phase
    uint8_t type;
    uint8_t wide;       // rows of a group
    uint8_t slot;       // which of the chosen experts
    uint8_t pad[8];
};

// What a warp asks for next, and its ring. Between phases it is kept in shared memory.
struct __align__(16) Asker {
    const uint8_t* w0;  // where the next copies come from
    const uint8_t* w1;
    uint32_t left;      // how often it will ask in the phase
    uint32_t of_row;    // and for this row
    uint32_t phase;     // of what it asks for, and the next phase of products, or NOBODY
    uint32_t next;
    uint32_t stage;     // bytes
    uint32_t ring;      // where the ring lies, in bytes from the first ring's beginning too, and its barriers, MAX_STAGES in turn
    uint32_t begin;
    uint32_t landing;
    uint32_t asked;     // stages that have been asked for, and that have been read
    uint32_t used;
    uint32_t to;        // bytes of the ring: where the next stage goes, and the next one read is
    uint32_t from;
    uint32_t room;      // bytes that are free
    uint32_t chosen;    // the phase that chose experts last
    uint32_t pad[2];
};

struct Phase {
    Matrix m[3];           // ATTEND: of each tier after the first, keys (w) and values (bias) and their types (type, n_out)
    const float* src;      // PRODUCTS: input (n_in)
    const float* norm;     // PRODUCTS: (n_in) weights of an RMS norm of the input, or null
    const float* q;        // ATTEND: (n_head, head_dim) not yet normed nor rotated
    const float* k;        // (n_head_kv, head_dim) likewise
    const float* v;        // (n_head_kv, head_dim)
    const float* q_norm;   // (head_dim) or, of all heads together, (n_head, head_dim), or null
    const float* k_norm;   // likewise
    uint16_t* pool_k;      // (slots, PAGE, n_head_kv, head_dim) f16
    uint16_t* pool_v;      // likewise
    const uint2* pages;    // (n_pages) slot (and tier, pages.cuh), first position, in position order
    float* out;            // (n_head, head_dim)
    float2* page_ml;       // (n_head, max_pages) maximum (an exponent of two) and sum of powers of two of each page, or null
    float2* head_ml;       // (n_head) the same over all pages
    float* mass;           // WEIGH: (n_in, max_pages), n_in layers; page_ml and head_ml are then those of all layers
    const uint32_t* reach; // WEIGH: (n_in) `most_pages` of each layer
    const float* sinks;    // ATTEND: (n_head) scores that take part in the softmax and have no value, or null
    const float* logits;   // GATE_UP: (n_expert) of the router
    const float* lean;     // (n_expert) what is added to what they weigh where experts are chosen, or null
    const float* plus;     // PRODUCTS: (n_in) what is normed and added to `src` before all else, or null
    const float* plus_norm;  // (n_in) the weights of that norm
    float* sum;            // (n_in) what comes of it
    uint32_t kind;
    uint32_t gated;        // PRODUCTS: m[0].out = glu(m[0], m[1]) of kind `gated` - 1
    uint32_t again;        // PRODUCTS: its input lies where that of the phase of products before did
    uint32_t n_in;
    uint32_t layer;        // ATTEND
    uint32_t arrive;       // ATTEND: whether this is the last before they are weighed
    uint32_t want_f;       // PRODUCTS: the input is wanted as numbers
    uint32_t want_q;       // and quantized
    float eps;
    float eps_q;
    float eps_k;
    uint32_t rope;         // which of the rotations queries and keys go through, from 1 on, or 0
    uint32_t next;         // EMBED, PRODUCTS: the next phase of products, or NOBODY
    uint32_t f_at;         // PRODUCTS: where the forms of the input lie in shared memory (`Input`), behind room for sums of squares
    uint32_t q_at;
    uint32_t ds_at;
    uint32_t early;        // PRODUCTS: weights of this phase and the next ones are asked for ahead of the input
    uint32_t experts;      // PRODUCTS: `ExpertsOf`; matrices are those of all experts, one after the other, m[].n_out rows each
    uint32_t width;        // of a row; in DOWN inputs of the chosen experts follow one another
    uint32_t n_expert;
    uint32_t n_used;
    uint32_t sigmoid;      // GATE_UP: experts weigh the sigmoid of their logit, not their share in a softmax over all
    uint32_t norm_chosen;  // and then what makes those that are chosen sum to one
    float weights_scale;   // times this
    uint32_t chosen_in;    // the phase that chooses
    uint32_t join_at;      // DOWN: where results of the block's rows lie in shared memory until all experts' are there, (n_used, rows); what GATE_UP chooses by
    uint32_t window;       // ATTEND: tokens that a query sees, itself included, or NO_WINDOW
    uint32_t most_pages;   // and pages that may have such
    float eps_plus;
    float scale;           // EMBED, PRODUCTS: factor of the results, before they are added to others
    uint32_t normed;       // ATTEND: `NormOf` queries and keys
    uint32_t center;       // PRODUCTS: the mean of the input is taken off, ahead of the norm
    ActivationParams act;               // what becomes of the results, which are then not gated
    uint32_t pad;
};

struct Step {
    const Phase* phases;
    const Work* work;        // (n_phase, blocks, warps)
    uint4* unused;           // (n_unused) the places that the next launch will use
    uint32_t* arrived;       // (1) blocks that have left attention behind, zero between launches
    uint32_t* left;          // (1) blocks that are done, zero between launches
    uint4* part;             // (n_head, max_splits, head_dim / 2) two sums of a split, its maximum or the sum of its powers of two, `turn` + phase
    uint64_t* top;           // (1) the largest logit so far and its token (`BEST`), zero between launches
    uint32_t* best;          // (1) the token with the largest logit, or NOBODY
    uint32_t* told;          // (1) the same, where the host sees it
    const uint32_t* follows; // (1) the token of this step, if it is not among the words
    uint64_t* trace;         // (n_phase, 2, blocks) clocks: input there, end; or null
    uint32_t n_unused;
    uint32_t turn;           // differs from that of recent launches by more than n_phase
    uint32_t n_phase;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t group;          // query heads that share a key/value head
    uint32_t tiles;          // units of each key/value head
    uint32_t units;          // of attention
    uint32_t head_dim;       // a multiple of 8, at most 128
    uint32_t max_pages;
    uint32_t max_splits;
    uint32_t neox;           // `Pair`
    uint32_t mean;
    uint32_t pad;
    float scale;
    uint32_t n_layer;
    uint32_t n_words;
    uint32_t each;           // pages of a block, as `splits_of` has it
    // What differs between steps: position, token, live pages of each layer, place (slot * PAGE + row) of the token in each layer,
    // (head_dim / 2) cosines and sines of each rotation.
    uint32_t words[MAX_WORDS];

    __device__ __forceinline__ uint32_t pos() const { return words[0]; }
    __device__ __forceinline__ uint32_t token() const { return words[1]; }
    __device__ __forceinline__ uint32_t n_pages(int il) const { return words[2 + il]; }
    __device__ __forceinline__ uint32_t place(int il) const { return words[2 + n_layer + il]; }
    __device__ __forceinline__ float2 rope(int i) const { return reinterpret_cast<const float2*>(words + 2 + 2 * n_layer)[i]; }
};

// The experts of a token, best first, and what they weigh.
struct Chosen {
    uint32_t id[MAX_USED];
    float weight[MAX_USED];
};

// The beginning of a block's dynamic shared memory.
struct StepShared {
    Step a;
    Phase p[4];          // this phase and the next, in turn
    uint64_t fetched[4];
    uint64_t landing[STEP_WARPS][MAX_STAGES];  // of each warp's stages
    Asker askers[STEP_WARPS];
    Work work[4][STEP_WARPS];                  // in the phases of `p`
    Chosen chosen;
    // Weights on their way. Bulk copies are faster where 128 bytes are aligned.
    __align__(128) unsigned char ring[STEP_WARPS][RING];
};

// What a block knows while it runs a phase.
struct Here {
    const Step& a;
    const Phase& p;
    unsigned char* shared;   // dynamic shared memory behind StepShared
    uint32_t phase;
};
__device__ __forceinline__ Here here(uint32_t phase) {
    DYNAMIC_SHARED(StepShared, all);
    return {all->a, all->p[phase % 4], reinterpret_cast<unsigned char*>(all + 1), phase};
}

__device__ __forceinline__ void trace(const Here& h, int what) {
    if (h.a.trace && threadIdx.x == 0) h.a.trace[(size_t(h.phase) * 2 + what) * gridDim.x + blockIdx.x] = clock_now();
}

// A number for others.
__device__ __forceinline__ void hand_over(float* to, float v) {
    show(to, __float_as_uint(v) == SENTINEL ? __uint_as_float(0x7fffffff) : v);
}
__device__ __forceinline__ bool missing(float v) { return __float_as_uint(v) == SENTINEL; }
__device__ __forceinline__ bool missing(const float4& v) { return missing(v.x) || missing(v.y) || missing(v.z) || missing(v.w); }
// A number from others, once it is there.
template <class T> __device__ __forceinline__ T receive(const T* from) {
    T v = look(from);
    while (missing(v)) {
        spin();
        v = look(from);
    }
    return v;
}

// Where part i of n begins, parts differing by one at most.
__device__ __forceinline__ int share(int n, int i, int of) { return n / of * i + min(i, n % of); }

// One token's activations in shared memory, in units of 16 bytes whose order within 128 bytes is mixed, so that lanes which read
// every second, fourth or eighth unit meet different banks.
struct Spread {
    const float* f;
    const int8_t* q;
    const float2* ds;
    const int* sums;

    static __device__ __forceinline__ int key(int u) { return (0x7250 >> (4 * ((u >> 3) & 3))) & 7; }
    static __device__ __forceinline__ int at(int u) { return u ^ key(u); }
    __device__ __forceinline__ uint4 q16(int u, int i) const { return reinterpret_cast<const uint4*>(q)[at(u) ^ i]; }
    __device__ __forceinline__ int sum_q16(int u, int i, const uint4&) const { return sums[u + i]; }
    __device__ __forceinline__ float2 scale(int b) const { return ds[b]; }
    __device__ __forceinline__ void f8(int p, float (&out)[8]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 v = reinterpret_cast<const float4*>(f)[at(2 * p) ^ i];
            out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
        }
    }
};

constexpr int NORMS = 128;  // bytes
static_assert(NORMS >= 2 * STEP_WARPS * sizeof(float), "sums of squares of the input and of what is added to it");
// The forms of an input in shared memory: two floats for each warp; numbers; quantized, their scales, sums of 16 of them.
struct Input {
    float* norms;
    float* f;
    int8_t* q;
    float2* ds;
    int* sums;

    __device__ __forceinline__ Input(const Here& h)
        : norms(reinterpret_cast<float*>(h.shared + h.p.f_at - NORMS)),
          f(reinterpret_cast<float*>(h.shared + h.p.f_at)),
          q(reinterpret_cast<int8_t*>(h.shared + h.p.q_at)),
          ds(reinterpret_cast<float2*>(h.shared + h.p.ds_at)),
          sums(reinterpret_cast<int*>(h.shared + h.p.ds_at + h.p.n_in / 4)) {}
    __device__ __forceinline__ Spread view() const { return {f, q, ds, sums}; }
};

// Eight numbers of the input, and the weights of their norm.
struct Eight {
    float4 lo, hi;
    uint4 w[2];
};

// Eight numbers (times the weights of the norm) into shared memory in the forms that are wanted; `sum` collects squares.
__device__ __forceinline__ void keep_input(const Here& h, const Input& in, int u, int n8, const Eight& v, float& sum) {
    float x[8] = {v.lo.x, v.lo.y, v.lo.z, v.lo.w, v.hi.x, v.hi.y, v.hi.z, v.hi.w};
    if (u < n8) {
        if (h.p.norm) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum += x[i] * x[i], x[i] *= __uint_as_float(word(v.w[i / 4], i % 4));
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
        // Added to 1.5 * 2^23, a number is rounded to a whole one that stands in the low bits.
        uint32_t b[8];
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = __float_as_uint(fmaf(x[i], inv, 12582912.0f));
        const uint32_t w0 = low_bytes(b[0], b[1], b[2], b[3]), w1 = low_bytes(b[4], b[5], b[6], b[7]);
        int total = dot4(w0, 0x01010101, dot4(w1, 0x01010101, 0));
        total += __shfl_xor_sync(ALL, total, 1);
        const int all = total + __shfl_xor_sync(ALL, total, 2);
        if (u < n8) {
            reinterpret_cast<uint2*>(in.q)[2 * Spread::at(u / 2) + u % 2] = make_uint2(w0, w1);
            if (u % 2 == 0) in.sums[u / 2] = total;
            if (u % 4 == 0) in.ds[u / 4] = make_float2(d, d * float(all));
        }
    }
}

// Units of eight numbers into shared memory, N of them at a time.
template <int N> __device__ __forceinline__ void read_units(const Here& h, const Input& in, float& sum) {
    const int lane = threadIdx.x % WARP, n8 = h.p.n_in / 8;
    const float4* src = reinterpret_cast<const float4*>(h.p.src);
    bool barrier = h.p.again;
#pragma unroll 1
    for (int u0 = threadIdx.x - lane; u0 < n8 || barrier; u0 += N * blockDim.x) {
        Eight v[N];
        auto look_at = [&](int i) {
            const int u = u0 + i * blockDim.x + lane;
            v[i].lo = look(src + 2 * u), v[i].hi = look(src + 2 * u + 1);
        };
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int u = u0 + i * blockDim.x + lane;
            v[i].w[0] = v[i].w[1] = make_uint4(0, 0, 0, 0);
            if (h.p.norm && u < n8) v[i].w[0] = ld16(h.p.norm + 8 * u), v[i].w[1] = ld16(h.p.norm + 8 * u + 4);
        }
        // All lanes look at one number until it is there: most others are, then, and those who still work need the bandwidth.
        if (u0 < n8) receive(h.p.src + 8 * u0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i].lo = v[i].hi = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (u0 + i * int(blockDim.x) + lane < n8) look_at(i);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            // All blocks look at the same few lines, which others are still writing to: not again and again.
            while (missing(v[i].lo) || missing(v[i].hi)) {
                rest();
                look_at(i);
            }
        }
        // Lanes that came one after another from waiting would otherwise go on so.
        __syncwarp();
        // Behind it no warp is busy with the input that lies there.
        if (barrier) block_barrier();
        barrier = false;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int u = u0 + i * blockDim.x;
            if (u < n8) keep_input(h, in, u + lane, n8, v[i], sum);
        }
    }
}

// Joins sums of warps.
__device__ __forceinline__ float warps_sum(const float* sums) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < STEP_WARPS; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(sums + i);
        sum += (v.x + v.y) + (v.z + v.w);
    }
    return sum;
}
// What a norm multiplies by, given sums of squares of warps.
__device__ __forceinline__ float norm_scale(const float* sums, int n, float eps) { return rsqrtf(quotient(warps_sum(sums), float(n)) + eps); }

// Sums of warps, known to all; behind it no warp is busy with the input that lay there before.
__device__ __forceinline__ const float* join_warps(const Input& in, float x) {
    x = warp_sum(x);
    block_barrier();
    if (threadIdx.x % WARP == 0) in.norms[STEP_WARPS + threadIdx.x / WARP] = x;
    block_barrier();
    return in.norms + STEP_WARPS;
}

// The same where something is normed and added to the input first, or its mean is taken off. Every block does that for itself and shows its share
// of the sum to later phases. All of both is in registers: N units a thread.
template <int N> __device__ __forceinline__ void read_whole(const Here& h, const Input& in, float& sum) {
    const int lane = threadIdx.x % WARP, n8 = h.p.n_in / 8;
    const bool plus = h.p.plus;
    const float4 *src = reinterpret_cast<const float4*>(h.p.src), *other = reinterpret_cast<const float4*>(h.p.plus);
    Eight x[N], y[N];
    auto unit = [&](int i) { return int(threadIdx.x) + i * int(blockDim.x); };
    auto look_at = [&](int i) {
        const int u = unit(i);
        x[i].lo = look(src + 2 * u), x[i].hi = look(src + 2 * u + 1);
        if (plus) y[i].lo = look(other + 2 * u), y[i].hi = look(other + 2 * u + 1);
    };
    auto is_missing = [](const Eight& v) { return missing(v.lo) || missing(v.hi); };
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int u = unit(i);
        x[i] = y[i] = {};
        if (u >= n8) continue;
        if (plus) y[i].w[0] = ld16(h.p.plus_norm + 8 * u), y[i].w[1] = ld16(h.p.plus_norm + 8 * u + 4);
        if (h.p.norm) x[i].w[0] = ld16(h.p.norm + 8 * u), x[i].w[1] = ld16(h.p.norm + 8 * u + 4);
    }
    // What is added has come last.
    if (unit(0) - lane < n8) receive((plus ? h.p.plus : h.p.src) + 8 * (unit(0) - lane));
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (unit(i) < n8) look_at(i);
        while (is_missing(x[i]) || is_missing(y[i])) {
            rest();
            look_at(i);
        }
    }
    __syncwarp();
    if (plus) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float4 &a = y[i].lo, &b = y[i].hi;
            squares += (a.x * a.x + a.y * a.y + (a.z * a.z + a.w * a.w)) + (b.x * b.x + b.y * b.y + (b.z * b.z + b.w * b.w));
        }
        const float f = norm_scale(join_warps(in, squares), h.p.n_in, h.p.eps_plus);
        auto add = [&](float4& to, const float4& a, const uint4& w) {
            to.x += a.x * f * __uint_as_float(w.x), to.y += a.y * f * __uint_as_float(w.y);
            to.z += a.z * f * __uint_as_float(w.z), to.w += a.w * f * __uint_as_float(w.w);
        };
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int u = unit(i);
            add(x[i].lo, y[i].lo, y[i].w[0]), add(x[i].hi, y[i].hi, y[i].w[1]);
            if (u < n8 && u % gridDim.x == blockIdx.x) {
                // No sum is a SENTINEL.
                float4* to = reinterpret_cast<float4*>(h.p.sum) + 2 * u;
                show(to, x[i].lo), show(to + 1, x[i].hi);
            }
        }
    } else {
        float all = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float4 &a = x[i].lo, &b = x[i].hi;
            all += (a.x + a.y + (a.z + a.w)) + (b.x + b.y + (b.z + b.w));
        }
        const float mean = quotient(warps_sum(join_warps(in, all)), float(h.p.n_in));
        auto center = [mean](float4& v) { v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean; };
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (unit(i) < n8) center(x[i].lo), center(x[i].hi);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int u = unit(i);
        if (u - lane < n8) keep_input(h, in, u, n8, x[i], sum);
    }
}

// The input of a phase of products, times the weights of the norm if there is one, into shared memory in the forms
// that are wanted. What the norm divides by is the same for all of the input, so it multiplies the results instead (`input_scale`).
template <bool ANY> __device__ __forceinline__ void read_input(const Here& h) {
    const Input in(h);
    float sum = 0.0f;
    if (ANY && (h.p.plus || h.p.center)) {
        if (h.p.n_in <= 8 * blockDim.x) {
            read_whole<1>(h, in, sum);
        } else {
            read_whole<2>(h, in, sum);
        }
    } else if (h.p.n_in <= 8 * blockDim.x) {
        read_units<1>(h, in, sum);
    } else {
        read_units<2>(h, in, sum);
    }
    if (h.p.norm) {
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) in.norms[threadIdx.x / WARP] = sum;
    }
    block_barrier();
    trace(h, 0);
}

// What the results of the phase are multiplied by.
__device__ __forceinline__ float input_scale(const Here& h, const Input& in) {
    return h.p.norm ? norm_scale(in.norms, h.p.n_in, h.p.eps) : 1.0f;
}
