// The phases of a step that attend, and what comes of the pages' masses.
#pragma once
#include "step_attend_f16.cuh"
#include "step_attend_tiers.cuh"

// TIERS: pages may be of any tier; the first is of f16. If not, all are of the first.
template <int NC, int NJ, bool EXACT, bool TIERS, bool ANY> __device__ __noinline__ uint32_t attend(const uint32_t at) {
    if constexpr (TIERS) {
        attend_tiers<NC, NJ, EXACT, ANY>(at);
    } else {
        attend_f16<NC, NJ, EXACT, ANY>(at);
    }
    return at;
}

// Masses of pages over the heads, from the maximum and sum that attention left for each page and for each head. Blocks take a layer each.
__device__ __noinline__ uint32_t weigh(const uint32_t at) {
    const Here h = here(at);
    const Step& a = h.a;
    const int n_head = a.n_head;
    float2* all = reinterpret_cast<float2*>(h.shared);
    if (threadIdx.x == 0 && blockIdx.x < h.p.n_in) {
        while (acquire(a.arrived) < gridDim.x) spin();
    }
    block_barrier();
    trace(h, 0);
    for (uint32_t il = blockIdx.x; il < h.p.n_in; il += gridDim.x) {
        const int n_pages = a.n_pages(il), beyond = max(0, n_pages - int(min(h.p.reach[il], 0x7fffffffu)));
        for (int i = threadIdx.x; i < n_head; i += blockDim.x) {
            const float2 ml = fresh(h.p.head_ml + il * n_head + i);
            all[i] = make_float2(ml.x, quotient(1.0f, ml.y));
        }
        block_barrier();
        for (int p = threadIdx.x; p < n_pages; p += blockDim.x) {
            float w = 0.0f;
            // Nobody has looked at what is out of reach.
            for (int i = p < beyond ? n_head : 0; i < n_head; i++) {
                const float2 ml = fresh(h.p.page_ml + (size_t(il) * n_head + i) * a.max_pages + p);
                const float mass = ml.y * power_of_two(ml.x - all[i].x) * all[i].y;
                w = a.mean ? w + mass : fmaxf(w, mass);
            }
            h.p.mass[size_t(il) * a.max_pages + p] = a.mean ? w / float(n_head) : w;
        }
        block_barrier();
    }
    trace(h, 1);
    return at;
}
