// A whole decode step in one launch; step.cuh says how.
#include "step_attend.cuh"
#include "step_products.cuh"

// Row of the embedding matrix. Blocks take 16 elements in turn.
__device__ __noinline__ uint32_t embed_token(const uint32_t at) {
    const Here h = here(at / 2);
    trace(h, 0);
    const Matrix& m = h.p.m[0];
    const int n = h.p.n_in, units = (n + 15) / 16;
    // Behind logits of which none is a number anything may follow.
    const uint32_t token = min(h.a.follows ? *h.a.follows : h.a.token(), m.n_out - 1);
    for (int u = blockIdx.x + gridDim.x * threadIdx.x; u < units; u += gridDim.x * blockDim.x) {
        float v[16];
        load16(m.type, m.w + token * m.row_bytes, n, 16 * u, v);
        for (int i = 0; i < 16; i++) {
            if (16 * u + i < n) hand_over(m.out + 16 * u + i, v[i]);
        }
    }
    block_barrier();
    trace(h, 1);
    return at;
}

// The largest of this block's results of the phase before.
__device__ __noinline__ uint32_t find_best(const uint32_t at) {
    const Here h = here(at / 2);
    const Matrix& m = h.p.m[0];
    trace(h, 0);
    const int block = blockIdx.x, rest = m.rest, from = m.wide * (m.per_block * block + min(block, rest));
    const int to = min(from + int(m.wide * (m.per_block + (block < rest))), int(m.n_out));
    uint64_t best = 0;
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
        const uint64_t key = logit_key(look(m.out + i), i);
        best = key > best ? key : best;
    }
    uint64_t* all = reinterpret_cast<uint64_t*>(h.shared);
    for (int o = WARP / 2; o > 0; o /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL, best, o);
        if (other > best) best = other;
    }
    if (threadIdx.x % WARP == 0) all[threadIdx.x / WARP] = best;
    block_barrier();
    if (threadIdx.x == 0) {
        for (int w = 1; w < int(blockDim.x) / WARP; w++) best = all[w] > best ? all[w] : best;
        raise(h.a.top, best);
    }
    trace(h, 1);
    return at;
}

template <bool TIERS> __device__ __forceinline__ void run_step(const Step& a) {
    DYNAMIC_SHARED(StepShared, s);
    static_assert(sizeof(Phase) % 16 == 0 && sizeof(Step) % 16 == 0, "phases are copied in bulk");
    auto fetch = [&](uint32_t i) {
        if (i >= a.n_phase || threadIdx.x != 0) return;
        expect(s->fetched + i % 4, sizeof(Phase));
        copy_kept(s->p + i % 4, a.phases + i, sizeof(Phase), s->fetched + i % 4);
    };
    if (threadIdx.x < STEP_WARPS * MAX_STAGES) expect_init(&s->landing[0][threadIdx.x]);
    if (threadIdx.x < 4) expect_init(s->fetched + threadIdx.x);
    for (uint32_t i = threadIdx.x; i < (offsetof(Step, words) + 15) / 16 + (a.n_words + 3) / 4; i += blockDim.x)
        reinterpret_cast<uint4*>(&s->a)[i] = reinterpret_cast<const uint4*>(&a)[i];
    if (threadIdx.x < STEP_WARPS) s->parity[threadIdx.x] = 0;
    expect_ready();
    block_barrier();
    fetch(0);
    fetch(1);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n_unused; i += gridDim.x * blockDim.x)
        a.unused[i] = make_uint4(SENTINEL, SENTINEL, SENTINEL, SENTINEL);
    // Twice the phase, plus one if the ring has been filled for it. Functions that are called hand it back: registers that live across a
    // call end up in local memory, for which hardly any cache is left beside the rings.
    uint32_t at = 0;
    while (at / 2 < a.n_phase) {
        landed(s->fetched + at / 2 % 4, at / 8 % 2);
        const uint32_t kind = s->p[at / 2 % 4].kind;
        if (kind == ATTEND || kind == WEIGH || kind == BEST) block_barrier();
        if (kind == EMBED) at = embed_token(at);
        if (kind == WEIGH) at = weigh(at);
        if (kind == BEST) at = find_best(at);
        // While attention is computed the weights of the phase behind can be on their way.
        if (kind == PRODUCTS || (kind == ATTEND && at / 2 + 1 < a.n_phase)) {
            const uint32_t phase = at / 2 + (kind == ATTEND);
            landed(s->fetched + phase % 4, phase / 4 % 2);
            if (s->p[phase % 4].kind == PRODUCTS) {
                products(phase, kind == ATTEND ? FILL : at % 2 ? FILLED : EMPTY);
                at = at / 2 * 2 + (kind == ATTEND);
            }
        }
        if (kind == ATTEND) {
            if (!is_attending(at / 2)) {
                trace(here(at / 2), 0), trace(here(at / 2), 1);
            } else if (a.head_dim == 64) {
                at = attend<2, 1, true, TIERS>(at);
            } else if (a.head_dim == 128) {
                at = attend<4, 2, true, TIERS>(at);
            } else {
                at = attend<4, 2, false, TIERS>(at);
            }
            if (s->p[at / 2 % 4].arrive && threadIdx.x == 0) release_add(a.arrived);
        }
        // Every phase has a barrier of the block in it, so that nobody reads any more what stands there.
        fetch(at / 2 + 2);
        at += 2;
    }
    // The last to leave says which token is best and makes the counters ready for the next launch.
    if (threadIdx.x == 0 && count_up(a.left) == gridDim.x - 1) {
        *a.best = *a.told = key_token(acquire(a.top));
        *a.arrived = 0, *a.left = 0, *a.top = 0;
    }
}

// Grid: as many blocks as are resident at once. Block: 32 * (1 .. STEP_WARPS).
// Dynamic shared memory: StepShared, then what the largest of the phases wants.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step(const IN_PLACE Step a) { run_step<false>(a); }
// The same with pages of any tier, the first of which is f16.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step_tiers(const IN_PLACE Step a) { run_step<true>(a); }
