// Decode: matrix times one token's activations, for every weight format.
//
// The two rows of a block are of one matrix, or the same row of gate and up. Several matrices with one input (q, k, v) share a launch as
// segments of its grid.
#include "matvec.cuh"

// Grid: (blocks of all segments, columns). Block: 32 * (1 .. MAX_WARPS) threads.
// A segment has ceil(n_out / ROWS) blocks; gated there are n_out blocks in all.
KERNEL __launch_bounds__(WARP* MAX_WARPS, 4) mul_mat_vec(const MatVec a) {
    begin();
    const int col = blockIdx.y;
    int block = blockIdx.x, s = 0;
    if (a.mode < GATED) {
        while (s + 1 < int(a.n_seg) && block >= int(a.seg[s].n_out + ROWS - 1) / ROWS) {
            block -= (a.seg[s].n_out + ROWS - 1) / ROWS;
            s++;
        }
    }
    const Segment& g = s == 0 ? a.seg[0] : s == 1 ? a.seg[1] : s == 2 ? a.seg[2] : a.seg[3];
    const size_t input = col / a.per_input;
    const size_t expert = a.ids ? a.ids[col] : 0;
    const Act x = {a.xf + input * a.n_in, a.xq + input * a.n_in, a.xds + input * (a.n_in / 32)};

    const uint8_t *r0, *r1;
    int row;  // first row of the block
    if (a.mode >= GATED) {
        row = block;
        r0 = a.seg[0].w + expert * a.seg[0].expert_bytes + row * a.seg[0].row_bytes;
        r1 = a.seg[1].w + expert * a.seg[1].expert_bytes + row * a.seg[1].row_bytes;
    } else {
        row = block * ROWS;
        r0 = g.w + expert * g.expert_bytes + row * g.row_bytes;
        // An odd last row is computed twice and stored once.
        r1 = row + 1 < int(g.n_out) ? r0 + g.row_bytes : r0;
    }

    float acc[ROWS] = {}, y[ROWS];
    add_products(g.type, r0, r1, a.n_in, x, acc);
    block_rows(acc, y);
    if (threadIdx.x >= ROWS) return;

    if (a.mode >= GATED) {
        if (threadIdx.x != 0) return;
        if (a.seg[0].bias) y[0] += a.seg[0].bias[expert * g.n_out + row];
        if (a.seg[1].bias) y[1] += a.seg[1].bias[expert * g.n_out + row];
        g.out[size_t(col) * g.n_out + row] = glu(a.mode - GATED, y[0], y[1]);
        return;
    }
    const int r = row + threadIdx.x;
    if (r >= int(g.n_out)) return;
    float v = threadIdx.x == 0 ? y[0] : y[1];
    if (g.bias) v += g.bias[expert * g.n_out + r];
    float* out = g.out + size_t(col) * g.n_out + r;
    if (a.mode == SQUARE) v = fmaxf(v, 0.0f), v *= v;
    *out = a.mode == ADD ? *out + v : v;
}
