// What is written to pages that are not f16, and pages that move to other tiers.
#include "pages.cuh"

struct StoreRows {
    const float* k;          // (n, n_head_kv, head_dim)
    const float* v;          // likewise
    const uint32_t* places;  // (n) slot * PAGE + row
    Tier tier;               // where they go; rows, not whole pages
    uint32_t n_head_kv;
    uint32_t head_dim;       // a multiple of 32
    uint32_t n_part;         // 2, or 1: keys alone
    uint32_t pad;
};

// Keys and values into their slots. Grid: (ceil(n_part * n_head_kv * head_dim / 32 / warps of a block), n). A warp stores a block.
KERNEL store_rows(const StoreRows a) {
    begin();
    const int blocks = a.head_dim / TILE_ROW, n_kv = a.n_head_kv, d = a.head_dim, lane = threadIdx.x % WARP, t = blockIdx.y;
    const int i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, b = i % blocks, kv = i / blocks % n_kv, part = i / blocks / n_kv;
    if (part >= int(a.n_part)) return;
    const float x = (part ? a.v : a.k)[(size_t(t) * n_kv + kv) * d + b * TILE_ROW + lane];
    const uint32_t type = part ? a.tier.type_v : a.tier.type_k, slot = a.places[t] / PAGE, row = a.places[t] % PAGE;
    uint8_t* page = const_cast<uint8_t*>(page_at(part ? a.tier.v : a.tier.k, type, slot, n_kv, kv, d));
    store_block(x, page, type, n_kv * d, d, row, b);
}

// The byte of the least scale that is not below d.
__device__ __forceinline__ int scale_above(float d) {
    const int above = min(int((__float_as_uint(d) + ((1 << 20) - 1)) >> 20) - ((127 - 16) << 3), 255);
    return above > 0 ? above : d > 0.0f;
}

// The nearest of 0 .. top.
__device__ __forceinline__ float nearest(float steps, float top) {
    return add_rn(add_rn(fminf(fmaxf(steps, 0.0f), top), 12582912.0f), -12582912.0f);
}

// The scale, zero and quants of 0 .. TOP that stand for N numbers with the least squared error of those tried, as lemma-quant finds them
// (`pages/mod.rs`), operation by operation. A thread does it alone.
template <int N, int TOP, int PARTS, int TRIES> __device__ __forceinline__ int fit(float (&x)[N], int& zero, uint32_t (&q)[N]) {
    constexpr float top = TOP, parts = PARTS, largest = 65504.0f;
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = x[i] == x[i] ? fminf(fmaxf(x[i], -largest), largest) : 0.0f;
        lo = fminf(lo, x[i]), hi = fmaxf(hi, x[i]);
    }
    const float middle = mul_rn(add_rn(lo, hi), 0.5f), farthest = 127.0f / parts - top / 2.0f;
    const int reach = scale_above(div_rn(fabsf(middle), farthest));
    const int first = max(scale_above(div_rn(add_rn(hi, -lo), top)), reach);
    float least = INFINITY;
    int best = 0;
    zero = 0;
#pragma unroll 1
    for (int byte = max(max(first - TRIES, reach), 1); byte <= first; byte++) {
        const float d = byte_scale(byte);
        const float z = fminf(fmaxf(rintf(mul_rn(parts, add_rn(div_rn(middle, d), -top / 2.0f))), -127.0f), 127.0f), at = z / parts;
        float error = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float off = add_rn(mul_rn(add_rn(nearest(add_rn(div_rn(x[i], d), -at), top), at), d), -x[i]);
            error = add_rn(error, mul_rn(off, off));
        }
        if (error < least) least = error, best = byte, zero = int(z);
    }
    const float d = byte_scale(best), at = float(zero) / parts;
#pragma unroll
    for (int i = 0; i < N; i++) q[i] = best ? uint32_t(nearest(add_rn(div_rn(x[i], d), -at), top)) : 0;
    return best;
}

// Keys of a tile: a lane has a channel.
__device__ __forceinline__ void store_k4(float (&x)[PAGE], uint8_t* tile) {
    const int c = threadIdx.x % WARP;
    uint32_t q[PAGE], words[2] = {};
    int zero;
    const int d = fit<PAGE, 15, 1, 2>(x, zero, q);
#pragma unroll
    for (int t = 0; t < PAGE; t++) words[t / 8] |= q[t] << 4 * (t % 8);
    reinterpret_cast<uint32_t*>(tile)[c] = words[0], reinterpret_cast<uint32_t*>(tile)[TILE_ROW + c] = words[1];
    tile[256 + c] = uint8_t(d), tile[288 + c] = uint8_t(zero);
}

// Values of a tile, of which a lane has a channel: a lane fits a token.
__device__ __forceinline__ void store_v2(const float (&x)[PAGE], uint8_t* tile, float (&turned)[PAGE][WARP + 1]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int t = 0; t < PAGE; t++) turned[t][lane] = x[t];
    __syncwarp();
    if (lane < PAGE) {
        float row[WARP];
        uint32_t q[WARP];
        int zero;
#pragma unroll
        for (int c = 0; c < WARP; c++) row[c] = turned[lane][c];
        const int d = fit<WARP, 3, 8, 5>(row, zero, q);
        tile[128 + lane] = uint8_t(d), tile[144 + lane] = uint8_t(zero);
#pragma unroll
        for (int c = 0; c < WARP; c++) turned[lane][c] = __uint_as_float(q[c]);
    }
    __syncwarp();
    uint32_t bits = 0;
#pragma unroll
    for (int t = 0; t < PAGE; t++) bits |= __float_as_uint(turned[t][lane]) << 2 * t;
    reinterpret_cast<uint32_t*>(tile)[lane] = bits;
}

struct MovePages {
    const Tier* tiers;   // (regions, MAX_TIERS)
    const uint4* moves;  // (n) region, from and to: slots with their tiers
    uint32_t n_head_kv;
    uint32_t head_dim;   // a multiple of 32
};

// Pages to other slots, stored anew where the type is another. No move may write where another one reads or writes.
// Grid: (moves, n_head_kv * head_dim / 32, 2: keys and values, or 1: keys alone). Block: a warp, which moves a tile.
KERNEL __launch_bounds__(WARP) move_pages(const MovePages a) {
    begin();
    __shared__ float turned[PAGE][WARP + 1];
    const int d = a.head_dim, tiles = d / TILE_ROW, n_kv = a.n_head_kv, kv = blockIdx.y / tiles, b = blockIdx.y % tiles, lane = threadIdx.x;
    const uint4 move = a.moves[blockIdx.x];
    const uint2 from = make_uint2(move.y, 0), to = make_uint2(move.z, 0);
    const Tier old_tier = a.tiers[move.x * MAX_TIERS + tier_of(from)], new_tier = a.tiers[move.x * MAX_TIERS + tier_of(to)];
    const bool values = blockIdx.z == 1;
    const uint32_t old_type = values ? old_tier.type_v : old_tier.type_k, new_type = values ? new_tier.type_v : new_tier.type_k;
    const uint8_t* old_page = page_at(values ? old_tier.v : old_tier.k, old_type, slot_of(from), n_kv, kv, d);
    uint8_t* new_page = const_cast<uint8_t*>(page_at(values ? new_tier.v : new_tier.k, new_type, slot_of(to), n_kv, kv, d));
    if (old_type == new_type && new_type != F16) {
        const int bytes = tile_bytes(new_type), n = bytes / 4;
        for (int i = lane; i < n; i += WARP)
            reinterpret_cast<uint32_t*>(new_page + b * bytes)[i] = reinterpret_cast<const uint32_t*>(old_page + b * bytes)[i];
        return;
    }
    float x[PAGE];
#pragma unroll
    for (int row = 0; row < PAGE; row++) x[row] = stored(old_page, old_type, n_kv * d, d, row, b * TILE_ROW + lane);
    if (new_type == K4) {
        store_k4(x, new_page + b * tile_bytes(K4));
    } else if (new_type == V2) {
        store_v2(x, new_page + b * tile_bytes(V2), turned);
    } else {
#pragma unroll
        for (int row = 0; row < PAGE; row++) store_block(x[row], new_page, new_type, n_kv * d, d, row, b);
    }
}
