// A whole decode step in one launch; step.cuh says how.
#include "step_attend.cuh"
#include "step_products.cuh"

// Row of the embedding matrix. Blocks take 16 elements in turn.
__device__ __noinline__ uint32_t embed_token(const uint32_t at) {
    const Here h = here(at);
    trace(h, 0);
    const Matrix& m = h.p.m[0];
    const int n = h.p.n_in, units = (n + 15) / 16;
    // Behind logits of which none is a number anything may follow.
    const uint32_t token = min(h.a.follows ? *h.a.follows : h.a.token(), m.n_out - 1);
    for (int u = blockIdx.x + gridDim.x * threadIdx.x; u < units; u += gridDim.x * blockDim.x) {
        float v[16];
        load16(m.type, m.w + token * m.row_bytes, n, 16 * u, v);
        for (int i = 0; i < 16; i++) {
            if (16 * u + i < n) hand_over(m.out + 16 * u + i, v[i] * h.p.scale);
        }
    }
    block_barrier();
    trace(h, 1);
    return at;
}

// The largest of this block's results of the phase before.
__device__ __noinline__ uint32_t find_best(const uint32_t at) {
    const Here h = here(at);
    const Matrix& m = h.p.m[0];
    trace(h, 0);
    DYNAMIC_SHARED(StepShared, shared);
    const Work* work = shared->work[h.phase % 4];
    const Work& last = work[blockDim.x / WARP - 1];
    const int from = work[0].row, to = min(last.row + last.n_row, m.n_out);
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

template <bool TIERS, bool ANY> __device__ __forceinline__ void run_step(const Step& a) {
    DYNAMIC_SHARED(StepShared, s);
    static_assert(sizeof(Phase) % 16 == 0 && sizeof(Step) % 16 == 0, "phases are copied in bulk");
    auto fetch = [&](uint32_t i) {
        if (i >= a.n_phase || threadIdx.x != 0) return;
        const uint32_t n_warp = blockDim.x / WARP, work = n_warp * sizeof(Work);
        const uint32_t fetched = shared_at(s->fetched + i % 4);
        expect(fetched, sizeof(Phase) + work);
        copy_kept(shared_at(s->p + i % 4), a.phases + i, sizeof(Phase), fetched);
        copy_kept(shared_at(s->work[i % 4]), a.work + (i * gridDim.x + blockIdx.x) * n_warp, work, fetched);
    };
    if (threadIdx.x < STEP_WARPS * MAX_STAGES) expect_init(&s->landing[0][threadIdx.x]);
    if (threadIdx.x < 4) expect_init(s->fetched + threadIdx.x);
    for (uint32_t i = threadIdx.x; i < (offsetof(Step, words) + 15) / 16 + (a.n_words + 3) / 4; i += blockDim.x)
        reinterpret_cast<uint4*>(&s->a)[i] = reinterpret_cast<const uint4*>(&a)[i];
    expect_ready();
    block_barrier();
    for (int i = 0; i < 3; i++) fetch(i);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n_unused; i += gridDim.x * blockDim.x)
        a.unused[i] = make_uint4(SENTINEL, SENTINEL, SENTINEL, SENTINEL);
    landed(shared_at(s->fetched), 0);
    begin_asking<ANY>(*s);
    // Functions that are called hand the number back: registers that live across a call end up in local memory, for which hardly any cache is
    // left beside the rings.
    uint32_t phase = 0;
    while (phase < a.n_phase) {
        landed(shared_at(s->fetched + phase % 4), phase / 4 % 2);
        const uint32_t kind = s->p[phase % 4].kind;
        if (kind == PRODUCTS) {
            products<ANY>(phase);
        } else {
            if (kind != EMBED) block_barrier();
            if (kind == EMBED) phase = embed_token(phase);
            if (kind == WEIGH) phase = weigh(phase);
            if (kind == BEST) phase = find_best(phase);
            if (kind == ATTEND) {
                if (!is_attending<ANY>(phase)) {
                    trace(here(phase), 0), trace(here(phase), 1);
                } else if (a.head_dim == 64) {
                    phase = attend<2, 1, true, TIERS, ANY>(phase);
                } else if (a.head_dim == 128) {
                    phase = attend<4, 2, true, TIERS, ANY>(phase);
                } else {
                    phase = attend<4, 2, false, TIERS, ANY>(phase);
                }
                if (s->p[phase % 4].arrive && threadIdx.x == 0) release_add(a.arrived);
            }
        }
        // Every phase has a barrier of the block in it, so that nobody reads any more what stands there.
        fetch(phase + 3);
        phase++;
    }
    // The last to leave says which token is best and makes the counters ready for the next launch.
    if (threadIdx.x == 0 && count_up(a.left) == gridDim.x - 1) {
        *a.best = *a.told = key_token(acquire(a.top));
        *a.arrived = 0, *a.left = 0, *a.top = 0;
    }
}

// Grid: as many blocks as are resident at once. Block: 32 * STEP_WARPS.
// Dynamic shared memory: StepShared, then what the largest of the phases wants.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step(const IN_PLACE Step a) { run_step<false, false>(a); }
// The same with pages of any tier, the first of which is f16.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step_tiers(const IN_PLACE Step a) { run_step<true, false>(a); }
// And with all that only some models have (`any` of the host): what is not there costs those who do without it nothing.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step_any(const IN_PLACE Step a) { run_step<false, true>(a); }
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step_any_tiers(const IN_PLACE Step a) { run_step<true, true>(a); }
