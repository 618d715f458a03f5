// Phases of products: rows of one to three matrices times one input.
//
// A warp computes a row, or two at a time: those of gate and up, or neighbours where there are enough for all warps. Chunks of its rows,
// or several rows, come through a ring of stages in shared memory that belongs to the warp: a lane asks for them, as far ahead as the ring
// is long, across the ends of rows and of phases, and what has landed is multiplied, a piece a lane. Sums stay with lanes and are handed
// over together.
//
// All of this is inlined into the kernel. Beside the rings hardly any L1 cache is left, so that every register that is spilled, around a
// call or for want of room, is a trip to the L2 cache. What stands between the end of a phase and the first product of the next is
// executed once, at six to ten clocks an instruction: so the host has divided the rows (`Work`) and says what is asked for at once (`Matrix`).
//
// ANY: products may be those of experts, whose weights are asked for once it is known which; inputs may be sums, results may have factors.
#pragma once
#include "step.cuh"

// The rows of a block in a phase of products, which are the same for all its experts: the first, and how many.
struct Rows {
    int first, n;

    __device__ __forceinline__ explicit Rows(const Work* work) : first(work[0].row) {
        const Work& last = work[blockDim.x / WARP - 1];
        n = int(last.row + last.n_row) - first;
    }
};

// What a lane needs to hand over the result of a row.
struct Result {
    float* to;         // null if this lane has no row
    const float* add;  // null if nothing is added
    float bias, bias2, old;
    float weight;      // of the expert

    // Of groups of R from `g` on.
    template <int R, bool ANY> __device__ __forceinline__ void prepare(const Here& h, const Work& work, int g) {
        const int lane = threadIdx.x % WARP, half = lane / (WARP / 2);
        const bool gated = h.p.gated;
        const int in_warp = R == 1 || gated ? g + lane : 2 * (g + lane % (WARP / 2)) + half, row = work.row + in_warp;
        const Matrix& m = h.p.m[work.matrix];
        to = nullptr, add = nullptr;
        bias = bias2 = old = 0.0f;
        weight = 1.0f;
        if (in_warp >= int(work.n_row) || (gated && half > 0)) return;
        if (ANY && h.p.experts) return of_expert(h, work, row);
        to = m.out + row;
        if (m.bias) bias = m.bias[row];
        if (gated && h.p.m[1].bias) bias2 = h.p.m[1].bias[row];
        if (m.add) add = m.add + row, old = look(add);
    }

    __device__ __forceinline__ void of_expert(const Here& h, const Work& work, int row) {
        DYNAMIC_SHARED(StepShared, shared);
        const Matrix& m = h.p.m[0];
        const int slot = work.slot;
        const size_t at = size_t(shared->chosen.id[slot]) * m.n_out + row;
        weight = shared->chosen.weight[slot];
        if (m.bias) bias = m.bias[at];
        if (h.p.experts == GATE_UP) {
            if (h.p.m[1].bias) bias2 = h.p.m[1].bias[at];
            to = m.out + slot * m.n_out + row;
        } else {
            const Rows rows(shared->work[h.phase % 4]);
            bias *= weight;
            to = reinterpret_cast<float*>(h.shared + h.p.join_at) + slot * rows.n + (row - rows.first);
        }
    }
};

// Asks for weights while there is room for them in the ring of a warp, of this phase (`now`), then of the next ones.
template <bool ANY> __device__ __forceinline__ void ask(StepShared& shared, Asker& a, uint32_t now) {
    const int warp = threadIdx.x / WARP;
#pragma unroll 1
    while (true) {
        if (a.left == 0) {
            if (a.next == NOBODY || a.next > now + AHEAD) return;
            landed(shared_at(shared.fetched + a.next % 4), a.next / 4 % 2);
            const Phase& p = shared.p[a.next % 4];
            const Work& work = shared.work[a.next % 4][warp];
            size_t expert = 0;
            if (ANY && p.experts) {
                if (p.chosen_in != a.chosen) return;
                expert = size_t(shared.chosen.id[work.slot]) * p.m[0].expert_bytes;
            }
            a.phase = a.next;
            a.next = p.next, a.w0 = work.w0 + expert, a.w1 = work.w1 + expert, a.left = work.asks;
            a.of_row = p.m[work.matrix].of_row, a.stage = p.m[work.matrix].stage;
            continue;
        }
        const bool wraps = a.to + a.stage > RING;
        const uint32_t taken = a.stage + (wraps ? RING - a.to : 0);
        if (a.room < taken || a.asked - a.used == MAX_STAGES) return;
        if (wraps) a.to = 0;
        const Work& work = shared.work[a.phase % 4][warp];
        const Matrix& m = shared.p[a.phase % 4].m[work.matrix];
        const uint4 how = *reinterpret_cast<const uint4*>(&m.copies);  // and apart, bytes, tail
        const uint2 end = *reinterpret_cast<const uint2*>(&work.last);  // and single
        const bool last = a.of_row == 1;
        if (elected()) {
            const uint32_t bytes = a.left == 1 ? end.x : last ? how.w : how.z, to = a.ring + a.to, there = a.landing + a.asked % MAX_STAGES * 8;
            // An odd last row is asked for once and not multiplied.
            const bool both = how.x == 2 && a.left > end.y;
            expect(there, both ? 2 * bytes : bytes);
            copy(to, a.w0, bytes, there);
            if (both) copy(to + how.y, a.w1, bytes, there);
        }
        const uint32_t on = last ? m.jump : how.z;
        a.w0 += on, a.w1 += on, a.of_row = last ? m.of_row : a.of_row - 1;
        a.left--, a.asked++, a.to += a.stage, a.room -= taken;
    }
}

// The rings are empty, and the list begins.
template <bool ANY> __device__ __forceinline__ void begin_asking(StepShared& shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t ring = shared_at(shared.ring[warp]), landing = shared_at(shared.landing[warp]);
    const uint32_t first = shared.p[0].kind == PRODUCTS ? 0 : shared.p[0].next;
    Asker a = {nullptr, nullptr, 0, 0, 0, first, 0, ring, uint32_t(warp * RING), landing, 0, 0, 0, 0, RING, 0, {}};
    ask<ANY>(shared, a, 0);
    if (lane == 0) shared.askers[warp] = a;
    __syncwarp();
}

// The products of rows of format T, R at a time, with the input in shared memory.
template <class T, int R, bool ANY> struct Stream {
    using C = Chunk<T>;

    static __device__ __forceinline__ void multiply(const Here& h, StepShared& shared, const Work& work, Asker& a, Result& result, int lane) {
        constexpr int AT_ONCE = R == 1 ? WARP : WARP / 2;  // groups whose sums are handed over together
        const Matrix& m = h.p.m[work.matrix];
        const int n_in = opaque(ANY ? h.p.width : h.p.n_in), n_piece = n_in / T::PIECE, n_group = R == 1 || h.p.gated ? work.n_row : (work.n_row + 1) / 2;
        const int units = m.units, unit = m.unit, apart = m.apart;
        const int x0 = ANY && h.p.experts == DOWN ? work.slot * n_piece : 0;
        const Input in(h);
        const Spread x = in.view();
        const unsigned char* w = nullptr;
        int seen = 0;  // units of the stage
        float mine = 0.0f;
#pragma unroll 1
        for (int g = 0; g < n_group; g++) {
            float acc[R] = {};
#pragma unroll 1
            for (int c = 0; c < n_piece; c += C::PIECES) {
                if (seen == 0) {
                    landed(a.landing + a.used % MAX_STAGES * 8, a.used / MAX_STAGES % 2);
                    const uint32_t stage = m.stage;
                    if (a.from + stage > RING) a.room += RING - a.from, a.from = 0;
                    w = &shared.ring[0][0] + a.begin + a.from;
                }
                const int n = C::PLAIN ? 0 : min(C::BLOCKS, (n_in - c * T::PIECE) / T::BLOCK);
                const uint32_t end = min(C::PIECES, n_piece - c);
#pragma unroll 1
                for (uint32_t p = lane; p < end; p += WARP) {
#pragma unroll
                    for (int k = 0; k < R; k++) acc[k] += T::dot(T::template load<Shared>(w + k * apart, n, p), x0 + c + p, x);
                }
                w += unit;
                // A stage ends with its units, with a row if it has chunks of it, and with the phase.
                const bool row_ends = c + C::PIECES >= n_piece, phase_ends = row_ends && g == n_group - 1;
                if (++seen == units || phase_ends || (row_ends && n_piece > C::PIECES)) {
                    __syncwarp();
                    const uint32_t stage = m.stage;
                    seen = 0, a.used++, a.from += stage, a.room += stage;
                    // Behind the last, results are handed over first.
                    if (!phase_ends) ask<ANY>(shared, a, h.phase);
                }
            }
            // Of two rows the first one's sum comes to the lower half of the lanes, the second's to the upper.
            const bool upper = R == 2 && lane >= WARP / 2;
            float y = upper ? acc[R - 1] : acc[0];
            y += __shfl_xor_sync(ALL, R == 1 ? y : upper ? acc[0] : acc[R - 1], WARP / 2);
#pragma unroll
            for (int o = WARP / 4; o > 0; o /= 2) y += __shfl_xor_sync(ALL, y, o);
            if (lane % AT_ONCE == g % AT_ONCE) mine = y;
            if (g % AT_ONCE == AT_ONCE - 1 || g == n_group - 1) {
                hand_over_rows(h, in, mine, result);
                if (g < n_group - 1) result.template prepare<R, ANY>(h, work, g + 1);
            }
        }
    }

    // Hands over what stands in the lanes.
    static __device__ __forceinline__ void hand_over_rows(const Here& h, const Input& in, float sum, Result& result) {
        float y = sum * input_scale(h, in) + result.bias;
        if (R == 2 && h.p.gated) {
            const float up = __shfl_xor_sync(ALL, y, WARP / 2) + result.bias2;
            if (ANY && h.p.gated != 1 + SWIGLU) {
                y = glu(h.p.gated - 1, y, up);
            } else {
                y = quotient(y, 1.0f + __expf(-y)) * up;
            }
            if (ANY) y *= result.weight;
        }
        if (ANY && h.p.act.kind != NO_ACTIVATION) y = activated(h.p.act, y);
        if (ANY) y *= h.p.scale;
        if (result.to == nullptr) return;
        if (ANY && h.p.experts == DOWN) {
            *result.to = y;
            return;
        }
        if (result.add && missing(result.old)) result.old = receive(result.add);
        hand_over(result.to, y + result.old);
    }
};

// Does something with the stream of a format.
template <int R, bool ANY, class F> __device__ __forceinline__ void with_stream(uint32_t type, F f) {
    switch (type) {
        case F32: f(Of<Stream<TF32, R, ANY>>()); break;
        case F16: f(Of<Stream<TF16, R, ANY>>()); break;
        case BF16: f(Of<Stream<TBF16, R, ANY>>()); break;
        case Q4_0: f(Of<Stream<TQ4_0, R, ANY>>()); break;
        case Q4_1: f(Of<Stream<TQ4_1, R, ANY>>()); break;
        case Q5_0: f(Of<Stream<TQ5_0, R, ANY>>()); break;
        case Q5_1: f(Of<Stream<TQ5_1, R, ANY>>()); break;
        case Q8_0: f(Of<Stream<TQ8_0, R, ANY>>()); break;
        case IQ4_NL: f(Of<Stream<TIQ4_NL, R, ANY>>()); break;
        case MXFP4: f(Of<Stream<TMXFP4, R, ANY>>()); break;
        case IQ4_XS: f(Of<Stream<TIQ4_XS, R, ANY>>()); break;
        case Q2_K: f(Of<Stream<TQ2_K, R, ANY>>()); break;
        case Q3_K: f(Of<Stream<TQ3_K, R, ANY>>()); break;
        case Q4_K: f(Of<Stream<TQ4_K, R, ANY>>()); break;
        case Q5_K: f(Of<Stream<TQ5_K, R, ANY>>()); break;
        case Q6_K: f(Of<Stream<TQ6_K, R, ANY>>()); break;
    }
}
template <bool ANY, class F> __device__ __forceinline__ void with_rows(const Work& work, F f) {
    if (work.wide == 2) {
        with_stream<2, ANY>(work.type, f);
    } else {
        with_stream<1, ANY>(work.type, f);
    }
}

// Chooses the best experts by what the router says, equal ones by number. By the first warp, in short loops: it is executed once a layer, and
// what costs most is to fetch the instructions.
__device__ __noinline__ void choose(const uint32_t phase) {
    const Here h = here(phase);
    DYNAMIC_SHARED(StepShared, shared);
    Chosen& chosen = shared->chosen;
    const int lane = threadIdx.x % WARP, n = h.p.n_expert, n_used = h.p.n_used, n_key = (n + 4 * WARP - 1) / (4 * WARP) * (4 * WARP);
    const bool sigmoid = h.p.sigmoid;
    // What the router says, and whole numbers of the order in which experts are chosen: 1 for what is no number, 0 for what is not there or taken.
    float* x = reinterpret_cast<float*>(h.shared + h.p.join_at);
    uint32_t* key = reinterpret_cast<uint32_t*>(x + n_key);
    float largest = -INFINITY, all = 0.0f;
#pragma unroll 1
    for (int e = 4 * lane; e < n; e += 4 * WARP) {
        float4 v;
        while (true) {
            v = look(reinterpret_cast<const float4*>(h.p.logits + e));
            // There is nothing behind the last.
            if (e + 1 >= n) v.y = -INFINITY;
            if (e + 2 >= n) v.z = -INFINITY;
            if (e + 3 >= n) v.w = -INFINITY;
            if (!missing(v)) break;
            rest();
        }
        *reinterpret_cast<float4*>(x + e) = v;
        largest = fmaxf(largest, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
    }
    __syncwarp();
    largest = warp_max(largest);
    auto weight = [&](int e) { return sigmoid ? quotient(1.0f, 1.0f + __expf(-x[e])) : __expf(x[e] - largest); };
#pragma unroll 1
    for (int e = lane; e < n; e += WARP) all += weight(e);
    all = sigmoid ? 1.0f : warp_sum(all);
#pragma unroll 1
    for (int e = lane; e < n_key; e += WARP) {
        float by = e < n ? x[e] : 0.0f;
        if (h.p.lean && e < n) by = h.p.lean[e] + quotient(weight(e), all);
        key[e] = e < n ? max(1u, uint32_t(logit_key(by, 0) >> 32)) : 0;
    }
    float sum = 0.0f, mine = 0.0f;
#pragma unroll 1
    for (int u = 0; u < n_used; u++) {
        __syncwarp();
        uint32_t best = 0, id = 0;
#pragma unroll 1
        for (int e = 4 * lane; e < n_key; e += 4 * WARP) {
            const uint4 k = *reinterpret_cast<const uint4*>(key + e);
            if (k.x > best) best = k.x, id = e;
            if (k.y > best) best = k.y, id = e + 1;
            if (k.z > best) best = k.z, id = e + 2;
            if (k.w > best) best = k.w, id = e + 3;
        }
        id = warp_min(best == warp_max(best) ? id : NOBODY);
        const float w = weight(id);
        sum += w;
        if (lane == u) chosen.id[u] = id, mine = w;
        if (lane == 0) key[id] = 0;
    }
    if (lane < n_used) chosen.weight[lane] = quotient(mine, h.p.norm_chosen ? fmaxf(sum, 6.103515625e-5f * all) : all) * h.p.weights_scale;
}

// Adds up what the experts say of the block's rows, behind the sums of all its warps.
__device__ __forceinline__ void join_experts(const Here& h, const Work* work) {
    const Matrix& m = h.p.m[0];
    const Rows rows(work);
    const float* parts = reinterpret_cast<const float*>(h.shared + h.p.join_at);
    const int i0 = threadIdx.x;
    const float old = i0 < rows.n ? look(m.add + rows.first + i0) : 0.0f;
    block_barrier();
    for (int i = i0; i < rows.n; i += blockDim.x) {
        float sum = i == i0 && !missing(old) ? old : receive(m.add + rows.first + i);
        for (int u = 0; u < int(h.p.n_used); u++) sum += parts[u * rows.n + i];
        hand_over(m.out + rows.first + i, sum);
    }
}

template <bool ANY> __device__ __forceinline__ void products(const uint32_t phase) {
    DYNAMIC_SHARED(StepShared, shared);
    const Here h = here(phase);
    const int warp = opaque(threadIdx.x / WARP), lane = opaque(threadIdx.x % WARP);
    const Work& work = shared->work[phase % 4][warp];
    Result result;
    auto prepare = [&] {
        if (work.wide == 2) {
            result.prepare<2, ANY>(h, work, 0);
        } else {
            result.prepare<1, ANY>(h, work, 0);
        }
    };
    Asker a;
    if (ANY && h.p.experts == GATE_UP) {
        read_input<ANY>(h);
        if (warp == 0) choose(phase);
        block_barrier();
        a = shared->askers[warp];
        a.chosen = phase;
        prepare();
        ask<ANY>(*shared, a, phase);
    } else {
        prepare();
        // What is asked for now comes while the input does not yet, and nobody waits for it behind the input.
        a = shared->askers[warp];
        if (h.p.early || a.phase < phase) ask<ANY>(*shared, a, phase);
        read_input<ANY>(h);
    }
    with_rows<ANY>(work, [&](auto of) { decltype(of)::Type::multiply(h, *shared, work, a, result, lane); });
    __syncwarp();
    ask<ANY>(*shared, a, phase);
    if (lane == 0) shared->askers[warp] = a;
    __syncwarp();
    if (ANY && h.p.experts == DOWN) join_experts(h, shared->work[phase % 4]);
    trace(h, 1);
}
