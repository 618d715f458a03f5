// A whole decode step in one launch; step.cuh says how.
#include "step_attend.cuh"
#include "step_products.cuh"

// Row of the embedding matrix. Blocks take 16 elements in turn.
__device__ __noinline__ void embed_token(const Place at) {
    const Here h = here(at);
    grid_wait(h);
    const Matrix& m = h.p.m[0];
    const int n = h.p.n_in, units = (n + 15) / 16;
    for (int u = blockIdx.x + gridDim.x * threadIdx.x; u < units; u += gridDim.x * blockDim.x) {
        float v[16];
        load16(m.type, m.w + *h.a.token * m.row_bytes, n, 16 * u, v);
        for (int i = 0; i < 16; i++) {
            if (16 * u + i < n) m.out[16 * u + i] = v[i];
        }
    }
    finish(h);
}

// Grid: as many blocks as are resident at once. Block: 32 * (1 .. STEP_WARPS).
// Dynamic shared memory: StepShared, then what the largest of the phases wants.
KERNEL __launch_bounds__(WARP* STEP_WARPS, 1) step(const Step a) {
    DYNAMIC_SHARED(StepShared, s);
    constexpr int WORDS = sizeof(Phase) / 16;
    static_assert(sizeof(Phase) % 16 == 0 && WORDS <= WARP && sizeof(Step) % 16 == 0, "a warp fetches a phase");
    auto fetch = [&](uint32_t i) {
        if (i < a.n_phase && int(threadIdx.x) < WORDS)
            reinterpret_cast<uint4*>(s->p + i % 2)[threadIdx.x] = ld16(reinterpret_cast<const uint4*>(a.phases + i) + threadIdx.x);
    };
    if (threadIdx.x < STEP_WARPS * MAX_STAGES) expect_init(&s->landing[0][threadIdx.x]);
    block_barrier();
    if (threadIdx.x == 0) s->a = a;
    if (threadIdx.x < STEP_WARPS) s->parity[threadIdx.x] = 0;
    expect_ready();
    fetch(0);
    block_barrier();
    Place at = {0, 0};
    bool filled = false;
    for (; at.phase < a.n_phase; at.phase++) {
        fetch(at.phase + 1);
        // Read now: behind the end of the phase its description may be overwritten by a warp that is ahead.
        const uint32_t kind = s->p[at.phase % 2].kind, arrive = s->p[at.phase % 2].arrive;
        trace(here(at), 0);
        switch (kind) {
            case EMBED: embed_token(at); break;
            case PRODUCTS:
                products(at, filled ? FILLED : EMPTY);
                filled = false;
                break;
            case ATTEND:
                // The ring is idle meanwhile: the weights of the phase behind can be on their way.
                block_barrier();
                if (at.phase + 1 < a.n_phase && s->p[(at.phase + 1) % 2].kind == PRODUCTS) {
                    products({at.phase + 1, at.met}, FILL);
                    filled = true;
                }
                if (a.head_dim == 64) {
                    attend<2, 1, true>(at);
                } else if (a.head_dim == 128) {
                    attend<4, 2, true>(at);
                } else {
                    attend<4, 2, false>(at);
                }
                break;
            case WEIGH: weigh(at); break;
        }
        at.met += arrive;
    }
    // The last to leave makes the counters ready for the next launch.
    if (threadIdx.x == 0 && count_up(a.left) == gridDim.x - 1) *a.arrived = 0, *a.left = 0;
}
