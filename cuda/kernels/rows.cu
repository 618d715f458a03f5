// Kernels over the rows of activations: embedding, norms, quantization, rotation; and the unpacking of weights at upload.
#include "elements.cuh"

struct Repack {
    const uint8_t* src;  // (n_row, n_block, block_bytes) as in the file
    uint8_t* dst;        // (n_row, row_bytes) chunks of planes
    uint64_t n_row;
    uint32_t n_block;
    uint32_t block_bytes;
    uint32_t row_bytes;
    uint32_t n_plane;
    uint32_t chunk;      // blocks of a chunk
    uint32_t pad;
    uint32_t offset[4];  // of each plane's part in a block
    uint32_t length[4];
};

// Blocks of the file to chunks of planes (types.cuh). Grid: (any). A thread copies bytes; padding becomes zero.
KERNEL repack(const Repack a) {
    begin();
    const uint64_t total = a.n_row * a.row_bytes;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += uint64_t(gridDim.x) * blockDim.x) {
        const uint64_t row = i / a.row_bytes;
        uint32_t at = uint32_t(i % a.row_bytes);
        const uint32_t first = at / (a.chunk * a.block_bytes) * a.chunk, n_block = min(a.chunk, a.n_block - first);
        at -= first * a.block_bytes;
        uint8_t v = 0;
        for (uint32_t p = 0; p < a.n_plane; p++) {
            const uint32_t bytes = a.length[p] * n_block, padded = (bytes + 15) & ~15u;
            if (at < padded) {
                if (at < bytes) v = a.src[(row * a.n_block + first + at / a.length[p]) * a.block_bytes + a.offset[p] + at % a.length[p]];
                break;
            }
            at -= padded;
        }
        a.dst[i] = v;
    }
}

struct Embed {
    const uint8_t* w;        // (n_vocab) rows
    const uint32_t* tokens;  // (n)
    float* out;              // (n, n_embd)
    uint64_t row_bytes;
    uint32_t type;
    uint32_t n_embd;
};

// Grid: (ceil(n_embd / 16 / threads), n). A thread dequantizes 16 elements.
KERNEL embed(const Embed a) {
    begin();
    const int k = 16 * (blockIdx.x * blockDim.x + threadIdx.x), n = a.n_embd;
    if (k >= n) return;
    float v[16];
    load16(a.type, a.w + a.tokens[blockIdx.y] * a.row_bytes, n, k, v);
    float* out = a.out + size_t(blockIdx.y) * n;
    for (int i = 0; i < 16; i++) {
        if (k + i < n) out[k + i] = v[i];
    }
}

struct RmsNorm {
    const float* x;     // (n, width), rows `stride` apart
    const float* w;     // (width)
    const float* bias;  // (width) or null
    float* out;         // as x
    int8_t* q;          // (n, width) or null
    float2* ds;         // (n, width / 32)
    uint32_t width;     // a multiple of 32 if q is not null
    uint32_t stride;
    float eps;
    uint32_t pad;
};

// Eight elements a thread, which all stay in registers: one trip to memory.
__device__ __forceinline__ void norm_eights(const RmsNorm& a, float* scratch) {
    const int n = a.width, e = 8 * threadIdx.x;
    const bool in = e < n;
    const float* x = a.x + size_t(blockIdx.x) * a.stride + e;
    float v[8] = {}, w[8] = {}, b[8] = {};
    auto load = [](const float* from, float (&to)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 f = *reinterpret_cast<const float4*>(from + i);
            to[i] = f.x, to[i + 1] = f.y, to[i + 2] = f.z, to[i + 3] = f.w;
        }
    };
    if (in) {
        load(x, v), load(a.w + e, w);
        if (a.bias) load(a.bias + e, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i] * v[i];
    const float scale = rsqrtf(block_sum(sum, scratch) / float(n) + a.eps);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * scale * w[i] + b[i];
    if (in) {
        float4* out = reinterpret_cast<float4*>(a.out + size_t(blockIdx.x) * a.stride + e);
        out[0] = make_float4(v[0], v[1], v[2], v[3]), out[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
    if (a.q) quantize_eight(v, in, a.q + size_t(blockIdx.x) * n + e, a.ds + (size_t(blockIdx.x) * n + e) / WARP);
}

// out = x / rms(x) * w + bias, and the same quantized. Grid: (n). Block: a multiple of 32 threads.
KERNEL __launch_bounds__(1024) rms_norm(const RmsNorm a) {
    begin();
    __shared__ float scratch[WARP];
    if (a.width % 8 == 0 && a.stride % 8 == 0 && a.width <= 8 * blockDim.x) return norm_eights(a, scratch);
    const int n = a.width, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float* x = a.x + size_t(blockIdx.x) * a.stride;
    float* out = a.out + size_t(blockIdx.x) * a.stride;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i] * x[i];
    const float scale = rsqrtf(block_sum(sum, scratch) / float(n) + a.eps);
    // A warp takes 32 elements at a time, all lanes together, so that it can quantize them.
    for (int i0 = warp * WARP; i0 < n; i0 += blockDim.x) {
        const int i = i0 + lane;
        float v = 0.0f;
        if (i < n) out[i] = v = x[i] * scale * a.w[i] + (a.bias ? a.bias[i] : 0.0f);
        if (a.q) quantize_block(v, a.q + size_t(blockIdx.x) * n + i0, a.ds + (size_t(blockIdx.x) * n + i0) / WARP);
    }
}

struct Quantize {
    const float* x;    // (n, stride), of which rows begin with what is quantized
    int8_t* q;         // (n, 32 * per_row)
    float2* ds;        // (n, per_row)
    uint64_t n_block;  // n * per_row
    uint32_t per_row;
    uint32_t stride;
};

// Grid: (ceil(n_block / warps of a block)).
KERNEL quantize_rows(const Quantize a) {
    begin();
    const uint64_t b = uint64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (b >= a.n_block) return;
    const uint32_t row = uint32_t(b) / a.per_row, in_row = uint32_t(b) % a.per_row;
    quantize_block(a.x[size_t(row) * a.stride + in_row * WARP + threadIdx.x % WARP], a.q + b * WARP, a.ds + b);
}

struct GateUp {
    float* gate;      // (n_elem)
    const float* up;  // (n_elem)
    uint64_t n_elem;
    uint32_t kind;    // `Glu`
    uint32_t pad;
};

// gate = glu(kind, gate, up). Grid: (ceil(n_elem / threads)).
KERNEL glu(const GateUp a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_elem) a.gate[i] = glu(a.kind, a.gate[i], a.up[i]);
}

struct Activate {
    float* x;  // (n_elem)
    uint64_t n_elem;
    ActivationParams by;
    uint32_t pad;
};

// x = activation(x). Grid: (ceil(n_elem / threads)).
KERNEL activate(const Activate a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_elem) a.x[i] = activated(a.by, a.x[i]);
}

struct SigmoidMul {
    float* x;           // (n, width)
    const float* gate;  // (n, n_gate)
    uint64_t n_elem;    // n * width
    uint32_t width;     // a multiple of n_gate
    uint32_t n_gate;
};

// x *= sigmoid(gate); one element of a gate for several of x that lie side by side. Grid: (ceil(n_elem / threads)).
KERNEL sigmoid_mul(const SigmoidMul a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_elem) a.x[i] *= 1.0f / (1.0f + __expf(-a.gate[i / (a.width / a.n_gate)]));
}

struct Center {
    float* x;  // (n, width)
    uint32_t width;
    uint32_t pad;
};

// x -= mean(x). Grid: (n). Block: a multiple of 32 threads.
KERNEL __launch_bounds__(1024) center(const Center a) {
    begin();
    __shared__ float scratch[WARP];
    const int n = a.width;
    float* x = a.x + size_t(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    const float mean = block_sum(sum, scratch) / float(n);
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] -= mean;
}

struct SoftCap {
    float* x;  // (n_elem)
    uint64_t n_elem;
    float cap;
    uint32_t pad;
};

// x = cap * tanh(x / cap). Grid: (ceil(n_elem / threads)).
KERNEL soft_cap_all(const SoftCap a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_elem) a.x[i] = soft_cap(a.x[i], a.cap);
}

struct AddScaled {
    float* x;        // (n_elem)
    const float* y;  // (n_elem) or null
    uint64_t n_elem;
    float factor;
    uint32_t pad;
};

// x = factor * x + y. Grid: (ceil(n_elem / threads)).
KERNEL add_scaled(const AddScaled a) {
    begin();
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_elem) a.x[i] = a.factor * a.x[i] + (a.y ? a.y[i] : 0.0f);
}

struct RopeStore {
    float* q;                // (n, n_head, head_dim), rotated in place
    float* k;                // (n, n_head_kv, head_dim)
    const float* v;          // (n, n_head_kv, head_dim)
    const float* q_norm;     // (head_dim) or null
    const float* k_norm;     // (head_dim) or null
    const float2* rope_q;    // (n, head_dim / 2) cosine and sine for queries, or null
    const float2* rope_k;    // likewise for keys; usually the same
    uint16_t* pool_k;        // (slots, PAGE, n_head_kv, head_dim) f16, or null: k is changed in place and v left alone
    uint16_t* pool_v;        // likewise
    const uint32_t* places;  // (n) slot * PAGE + row
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_dim;       // even, at most 512
    uint32_t neox;           // `Pair`
    float eps_q;
    float eps_k;
};

constexpr int MAX_PAIRS = 8;  // pairs of a lane: head_dim is at most 2 * 8 * 32

// Norm over heads, rotation, and keys and values into their slots.
// Grid: (ceil((n_head + 2 n_head_kv) / warps of a block), n). A warp does one head of q, k or v of one token.
KERNEL rope_store(const RopeStore a) {
    begin();
    const int head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int t = blockIdx.y, d = a.head_dim, half = d / 2, neox = a.neox, n_head = a.n_head, n_kv = a.n_head_kv;
    if (head >= n_head + 2 * n_kv) return;
    const bool is_q = head < n_head, is_v = head >= n_head + n_kv;
    const int h = is_q ? head : is_v ? head - n_head - n_kv : head - n_head;
    const size_t at = (size_t(t) * (is_q ? n_head : n_kv) + h) * d;
    const size_t pool = a.pool_k ? (size_t(a.places[t]) * n_kv + h) * d : 0;

    if (is_v) {
        if (!a.pool_v) return;
        for (int i = lane; i < d; i += WARP) a.pool_v[pool + i] = float_to_half(a.v[at + i]);
        return;
    }
    float* x = (is_q ? a.q : a.k) + at;
    const float* w = is_q ? a.q_norm : a.k_norm;
    const float2* rope = is_q ? a.rope_q : a.rope_k;
    float first[MAX_PAIRS], second[MAX_PAIRS];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int i = lane + WARP * j;
        if (i < half) {
            const Pair p(i, half, neox);
            first[j] = x[p.i0], second[j] = x[p.i1];
            sum += first[j] * first[j] + second[j] * second[j];
        }
    }
    const float scale = w ? rsqrtf(warp_sum(sum) / float(d) + (is_q ? a.eps_q : a.eps_k)) : 1.0f;
#pragma unroll
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int i = lane + WARP * j;
        if (i >= half) continue;
        const Pair p(i, half, neox);
        const int i0 = p.i0, i1 = p.i1;
        float x0 = first[j], x1 = second[j];
        if (w) x0 *= scale * w[i0], x1 *= scale * w[i1];
        if (rope) {
            const float2 cs = rope[size_t(t) * half + i];
            const float y0 = x0 * cs.x - x1 * cs.y, y1 = x0 * cs.y + x1 * cs.x;
            x0 = y0, x1 = y1;
        }
        if (is_q || !a.pool_k) {
            x[i0] = x0, x[i1] = x1;
        } else {
            a.pool_k[pool + i0] = float_to_half(x0), a.pool_k[pool + i1] = float_to_half(x1);
        }
    }
}

struct ReadAll {
    const uint4* src;  // (n)
    uint32_t* out;     // (1), never written in practice
    uint64_t n;
};

// Reads a buffer and does nothing with it: the ceiling that decoding is measured against. Grid: (any).
KERNEL read_all(const ReadAll a) {
    begin();
    uint32_t acc = 0;
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 3 * step < a.n; i += 4 * step) {
        const uint4 v0 = ld16(a.src + i), v1 = ld16(a.src + i + step), v2 = ld16(a.src + i + 2 * step), v3 = ld16(a.src + i + 3 * step);
        acc ^= v0.x ^ v0.y ^ v0.z ^ v0.w ^ v1.x ^ v1.y ^ v1.z ^ v1.w ^ v2.x ^ v2.y ^ v2.z ^ v2.w ^ v3.x ^ v3.y ^ v3.z ^ v3.w;
    }
    for (; i < a.n; i += step) acc ^= ld16(a.src + i).x;
    if (acc == 0x12345678u) *a.out = acc;
}
