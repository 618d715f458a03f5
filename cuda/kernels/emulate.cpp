// Runs the kernels of this folder on a CPU: blocks one after the other, the threads of a block as fibers.
#include "emulate.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char* emulated_shared;
const HalfTable half_table;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr unsigned MAX_THREADS = 1024, MAX_SHARED = 232 << 10;

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<unsigned char> stack;
    bool started = false, done = false;
};

struct Barrier { unsigned arrived = 0, generation = 0; };

std::mutex one_launch;
std::vector<Fiber> fibers(MAX_THREADS);
ucontext_t home;
jmp_buf home_at;
unsigned n_threads, alive, current;
bool backwards;  // the order in which threads take turns
Barrier block_barrier, warp_barriers[MAX_THREADS / 32];
unsigned warp_alive[MAX_THREADS / 32];
unsigned char mailbox[MAX_THREADS][64];
void (*body)(const void*);
const void* body_args;
alignas(256) unsigned char shared[MAX_SHARED];

void enter(unsigned i);

unsigned after(unsigned me, unsigned k) { return (backwards ? me + n_threads - k : me + k) % n_threads; }

void main_of_fiber() {
    const unsigned me = current;
    for (;;) {
        body(body_args);
        fibers[me].done = true;
        alive--;
        warp_alive[me / 32]--;
        // Those who wait for this thread wait no more.
        if (alive && block_barrier.arrived == alive) block_barrier.arrived = 0, block_barrier.generation++;
        Barrier& w = warp_barriers[me / 32];
        if (warp_alive[me / 32] && w.arrived == warp_alive[me / 32]) w.arrived = 0, w.generation++;
        // Lies here until the next block.
        if (_setjmp(fibers[me].at) == 0) {
            for (unsigned k = 1; k < n_threads; k++) {
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
    threadIdx = {i, 0, 0};
    Fiber& f = fibers[i];
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.start);
    f.stack.resize(STACK);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = &home;
    makecontext(&f.start, main_of_fiber, 0);
    setcontext(&f.start);
    abort();
}

void yield() {
    const unsigned me = current;
    for (unsigned k = 1; k < n_threads; k++) {
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

}  // namespace

void __syncthreads() { wait(block_barrier, alive); }
void __syncwarp(unsigned) { wait(warp_barriers[current / 32], warp_alive[current / 32]); }

void emulated_exchange(const void* mine, void* all, size_t n) {
    const unsigned me = current, warp = me / 32;
    memcpy(mailbox[me], mine, n);
    __syncwarp();
    for (unsigned i = 0; i < 32; i++) memcpy(static_cast<unsigned char*>(all) + i * n, mailbox[warp * 32 + i], n);
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
    ENTRY(repack), ENTRY(embed), ENTRY(rms_norm), ENTRY(quantize_rows), ENTRY(swiglu), ENTRY(rope_store), ENTRY(mul_mat_vec),
    ENTRY(mul_mat_64), ENTRY(mul_mat_128), ENTRY(attention), ENTRY(attention_combine), ENTRY(moe_route), ENTRY(moe_sum), ENTRY(read_all),
};
}  // namespace

// Runs a kernel by name. 0: done; 1: no such kernel; 2: arguments of another size; 3: a launch that no GPU accepts.
extern "C" int lemma_emulate(const char* name, const unsigned* grid, unsigned block, unsigned shared_bytes, const void* args,
                             size_t args_bytes, int descending) {
    for (const Entry& e : entries) {
        if (strcmp(e.name, name) != 0) continue;
        if (e.args != args_bytes) return 2;
        if (block == 0 || block > MAX_THREADS || block % 32 || shared_bytes > MAX_SHARED) return 3;
        if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return 3;
        std::lock_guard<std::mutex> lock(one_launch);
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block, 1, 1};
        emulated_shared = shared;
        body = e.run;
        body_args = args;
        n_threads = block;
        backwards = descending != 0;
        for (unsigned z = 0; z < grid[2]; z++)
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) {
                    blockIdx = {x, y, z};
                    alive = block;
                    block_barrier = {};
                    memset(shared, 0xff, shared_bytes);  // NaN: reading what nobody wrote shows
                    for (unsigned i = 0; i < block; i++) fibers[i].done = false;
                    for (unsigned w = 0; w < block / 32; w++) warp_barriers[w] = {}, warp_alive[w] = 32;
                    if (_setjmp(home_at) == 0) enter(descending ? block - 1 : 0);
                }
        return 0;
    }
    return 1;
}
