// Runs the kernels of this folder on a CPU: blocks one after the other, the threads of a block as fibers. Blocks that wait for each
// other run together.
#include "emulate.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <mutex>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char* emulated_shared;
const HalfTable half_table;

namespace emulator {

constexpr size_t STACK = 128 << 10;
constexpr unsigned MAX_THREADS = 1024, MAX_SHARED = 227 << 10, MAX_GUARD = 4 << 10;
constexpr unsigned char GUARD = 0xa5;

struct Barrier { unsigned arrived = 0, generation = 0; };

// A block's dynamic shared memory, aligned as on a GPU.
struct Shared {
    static constexpr size_t ALIGN = 1024;
    std::unique_ptr<unsigned char[]> all{new unsigned char[MAX_SHARED + MAX_GUARD + ALIGN]};
    unsigned char* get() const { return all.get() + (ALIGN - uintptr_t(all.get()) % ALIGN) % ALIGN; }
    unsigned char operator[](size_t i) const { return get()[i]; }
};

// A block's barrier, the threads it still has, its dynamic shared memory.
struct Block {
    Barrier barrier;
    unsigned alive = 0;
    Shared shared;
    uint3 index;
};

struct Warp { Barrier barrier; unsigned alive = 0; };

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::unique_ptr<unsigned char[]> stack;
    bool started = false, done = false;
    unsigned char mailbox[64];
};

std::mutex one_launch;
std::deque<Fiber> fibers;
std::deque<Block> blocks;
std::deque<Warp> warps;
ucontext_t home;
jmp_buf home_at;
unsigned n_fibers, per_block, alive, current;
bool backwards;  // the order in which threads take turns
void (*body)(const void*);
const void* body_args;

void enter(unsigned i);

unsigned after(unsigned me, unsigned k) { return (backwards ? me + n_fibers - k : me + k) % n_fibers; }

// Those who wait for a thread that is gone wait no more.
void leave(Barrier& b, unsigned& members) {
    members--;
    if (members && b.arrived == members) b.arrived = 0, b.generation++;
}

void main_of_fiber() {
    const unsigned me = current;
    for (;;) {
        body(body_args);
        fibers[me].done = true;
        alive--;
        leave(blocks[me / per_block].barrier, blocks[me / per_block].alive);
        leave(warps[me / 32].barrier, warps[me / 32].alive);
        // Lies here until the next block.
        if (_setjmp(fibers[me].at) == 0) {
            for (unsigned k = 1; k < n_fibers; k++) {
                const unsigned next = after(me, k);
                if (!fibers[next].done) enter(next);
            }
            _longjmp(home_at, 1);
        }
    }
}

// Leaves for fiber i; does not come back (who wants to come back saves itself first).
void enter(unsigned i) {
    current = i;
    const Block& b = blocks[i / per_block];
    threadIdx = {i % per_block, 0, 0};
    blockIdx = b.index;
    emulated_shared = b.shared.get();
    Fiber& f = fibers[i];
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.start);
    f.stack.reset(new unsigned char[STACK]);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = &home;
    makecontext(&f.start, main_of_fiber, 0);
    setcontext(&f.start);
    abort();
}

void yield() {
    const unsigned me = current;
    for (unsigned k = 1; k < n_fibers; k++) {
        const unsigned next = after(me, k);
        if (fibers[next].done) continue;
        if (_setjmp(fibers[me].at) == 0) enter(next);
        return;
    }
}

void wait(Barrier& b, const unsigned& members) {
    const unsigned generation = b.generation;
    if (++b.arrived == members) {
        b.arrived = 0;
        b.generation++;
        return;
    }
    while (b.generation == generation) yield();
}

// Runs `n` blocks that are resident together; `at` gives their places in the grid.
// False if any wrote behind its shared memory.
template <class At> bool run_blocks(unsigned n, unsigned threads, unsigned shared_bytes, At at) {
    per_block = threads;
    n_fibers = alive = n * threads;
    while (fibers.size() < n_fibers) fibers.emplace_back();
    while (blocks.size() < n) blocks.emplace_back();
    while (warps.size() < (n_fibers + 31) / 32) warps.emplace_back();
    for (unsigned i = 0; i < n; i++) {
        blocks[i].barrier = {};
        blocks[i].alive = threads;
        blocks[i].index = at(i);
        memset(blocks[i].shared.get(), 0xff, shared_bytes);  // NaN: reading what nobody wrote shows
        memset(blocks[i].shared.get() + shared_bytes, GUARD, MAX_GUARD);
    }
    for (unsigned i = 0; i < n_fibers; i++) fibers[i].done = false;
    for (unsigned w = 0; w < n_fibers / 32; w++) warps[w].barrier = {}, warps[w].alive = 32;
    if (_setjmp(home_at) == 0) enter(backwards ? n_fibers - 1 : 0);
    for (unsigned i = 0; i < n; i++) {
        for (unsigned b = 0; b < MAX_GUARD; b++) {
            if (blocks[i].shared[shared_bytes + b] != GUARD) return false;
        }
    }
    return true;
}

void block_barrier() { wait(blocks[current / per_block].barrier, blocks[current / per_block].alive); }
void warp_barrier() { wait(warps[current / 32].barrier, warps[current / 32].alive); }

}  // namespace emulator

void __syncthreads() { emulator::block_barrier(); }
void __syncwarp(unsigned) { emulator::warp_barrier(); }
void spin() { emulator::yield(); }

void emulated_exchange(const void* mine, void* all, size_t n) {
    using namespace emulator;
    const unsigned me = current, warp = me / 32;
    memcpy(fibers[me].mailbox, mine, n);
    __syncwarp();
    for (unsigned i = 0; i < 32; i++) memcpy(static_cast<unsigned char*>(all) + i * n, fibers[warp * 32 + i].mailbox, n);
    __syncwarp();
}

template <class T> static void call(void (*f)(T), const void* args) {
    T a;
    memcpy(&a, args, sizeof(T));
    f(a);
}

#include "lemma.cu"

namespace {
struct Entry { const char* name; void (*run)(const void*); size_t args; };
template <class T> constexpr size_t size_of_args(void (*)(T)) { return sizeof(T); }
#define ENTRY(k) {#k, [](const void* a) { call(k, a); }, size_of_args(k)}
const Entry entries[] = {
    ENTRY(repack), ENTRY(embed), ENTRY(rms_norm), ENTRY(quantize_rows), ENTRY(glu), ENTRY(sigmoid_mul), ENTRY(center), ENTRY(soft_cap_all), ENTRY(add_scaled), ENTRY(rope_store), ENTRY(mul_mat_vec),
    ENTRY(mul_mat_64), ENTRY(mul_mat_128), ENTRY(attention), ENTRY(attention_combine), ENTRY(moe_router), ENTRY(moe_down), ENTRY(moe_sum), ENTRY(read_all), ENTRY(step),
    ENTRY(attention_batch), ENTRY(unpack), ENTRY(to_half), ENTRY(mul_mat_f16), ENTRY(mul_mat_f16_hopper), ENTRY(draw),
    ENTRY(attention_tiers), ENTRY(attention_batch_tiers), ENTRY(attention_batch_bounded), ENTRY(attention_batch_bounded_tiers),
    ENTRY(step_tiers), ENTRY(step_any), ENTRY(step_any_tiers), ENTRY(store_rows), ENTRY(move_pages), ENTRY(moe_sort), ENTRY(mul_mat_experts_64),
    ENTRY(mul_mat_experts_128), ENTRY(mul_mat_experts_64_hopper), ENTRY(mul_mat_experts_128_hopper),
    ENTRY(mul_mat_small_64), ENTRY(mul_mat_small_128), ENTRY(mul_mat_small_64_hopper), ENTRY(mul_mat_small_128_hopper), ENTRY(join_parts),
    ENTRY(activate), ENTRY(split_heads), ENTRY(ssm_conv), ENTRY(short_conv), ENTRY(ssm_scan), ENTRY(rms_norm_groups), ENTRY(moe_choose), ENTRY(l2_norm_first), ENTRY(delta_gates),
    ENTRY(gated_delta_net), ENTRY(gated_delta_step), ENTRY(gated_norm), ENTRY(copy_heads), ENTRY(mul_mat_vec_heads), ENTRY(rotate_ends), ENTRY(attention_latent), ENTRY(attention_wide),
};
}  // namespace

// Runs a kernel by name; all its blocks at once if they are `together`.
// 0: done; 1: no such kernel; 2: arguments of another size; 3: a launch that no GPU accepts; 4: a write behind shared memory.
extern "C" int lemma_emulate(const char* name, const unsigned* grid, unsigned block, unsigned shared_bytes, const void* args,
                             size_t args_bytes, int descending, int together) {
    using namespace emulator;
    for (const Entry& e : entries) {
        if (strcmp(e.name, name) != 0) continue;
        if (e.args != args_bytes) return 2;
        if (block == 0 || block > MAX_THREADS || block % 32 || shared_bytes > MAX_SHARED) return 3;
        if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return 3;
        std::lock_guard<std::mutex> lock(one_launch);
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block, 1, 1};
        body = e.run;
        body_args = args;
        backwards = descending != 0;
        const unsigned n = grid[0] * grid[1] * grid[2], at_once = together ? n : 1;
        for (unsigned first = 0; first < n; first += at_once) {
            const bool good = run_blocks(at_once, block, shared_bytes, [&](unsigned i) {
                const unsigned b = first + i;
                return uint3{b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
            });
            if (!good) return 4;
        }
        return 0;
    }
    return 1;
}
