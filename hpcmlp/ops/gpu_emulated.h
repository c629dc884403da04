// What gpu_kernels.cu and gpu_products.cu need of CUDA, for a C++20 compiler: threads of a block are coroutines that take turns.
//
// Blocks run one after the other. A thread gives up its turn at a shuffle and at __syncthreads; a shuffle keeps what
// the lanes gave in one of two places in turn, so that a quick lane cannot overwrite what a slow one has still to read.
#include <csetjmp>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static

struct dim { unsigned x; };
static dim threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };

// A coroutine lives on from block to block. It is entered once by setcontext, then by _longjmp, which costs no call to
// the kernel.
struct Fiber {
    std::vector<char> stack;
    jmp_buf jump;
    unsigned phase;
    bool started, done;
};
static Fiber fibers[1024];
static jmp_buf scheduler;
static unsigned current, arrived, alive, generation;
static double lanes[1024][2];
static void (*body_of)(void *);
static void *body_data;

static void yield_turn() {
    if (!_setjmp(fibers[current].jump)) _longjmp(scheduler, 1);
}
static void enter() {
    for (;;) {
        body_of(body_data);
        fibers[current].done = true;
        yield_turn();
    }
}
static void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    fiber.stack.resize(64 * 1024);
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&context, enter, 0);
    setcontext(&context);
}
static void run_block(unsigned block, unsigned threads, void (*body)(void *), void *data) {
    blockIdx.x = block;
    body_of = body; body_data = data;
    arrived = generation = 0;
    alive = threads;
    for (unsigned k = 0; k < threads; k++) { fibers[k].phase = 0; fibers[k].done = false; }
    while (alive)
        for (unsigned k = 0; k < threads; k++)
            if (!fibers[k].done) {
                current = k; threadIdx.x = k;
                resume(fibers[k]);
                if (fibers[current].done) alive--;
            }
}
template <class T> static T __shfl_xor_sync(unsigned, T value, int distance) {
    unsigned phase = fibers[current].phase++ & 1;
    lanes[current][phase] = (double)value;
    yield_turn();
    return (T)lanes[current ^ (unsigned)distance][phase];
}
static void __syncthreads() {
    unsigned before = generation;
    if (++arrived == alive) { arrived = 0; generation++; }
    while (generation == before) yield_turn();
}
static void __threadfence() {}
static int atomicAdd(int *at, int value) { int before = *at; *at += value; return before; }
static float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }

// A function that runs a whole grid of the kernel F, with its arguments behind grid and block. A kernel whose threads
// know nothing of each other needs no coroutines.
template <auto F, bool Meets> struct Grid;
template <class... A, void (*F)(A...), bool Meets> struct Grid<F, Meets> {
    static void run(int grid, int block, A... arguments) {
        auto call = [&] { F(arguments...); };
        gridDim.x = grid; blockDim.x = block;
        for (int k = 0; k < grid; k++)
            if (Meets)
                run_block(k, block, [](void *data) { (*(decltype(call) *)data)(); }, &call);
            else
                for (blockIdx.x = k, threadIdx.x = 0; threadIdx.x < (unsigned)block; threadIdx.x++) call();
    }
};
#define EXPORT(name, meets) extern "C" void *kernel_##name() { return (void *)&Grid<&name, meets>::run; }
