// Runs the kernels of this folder on the CPU, for tests on machines without a GPU: one block after
// another, its threads as fibers that change places at every barrier and warp operation, in a
// shuffled order, so that a missing barrier shows. Shared memory starts as NaN. A barrier that not
// all threads reach aborts. Half precision is left out; numbers are those of the CPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char *name = emulated::shared.data()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
using cudaStream_t = void *;

namespace emulated {

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    uint64_t slots[2][32];  // two sets: a fast lane writes the next exchange beside the last one
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    unsigned number = 0, turn = 0;
    bool done = false;
};

constexpr size_t STACK = 64 * 1024;
static std::vector<unsigned char> shared;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Barrier block_barrier;
static int block_sums[2];
static Thread *current;
static ucontext_t scheduler;
static bool progress;
static dim3 block_index, block_size, grid_size;
static std::function<void()> body;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait(Barrier &barrier) {
    unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0, barrier.generation++, progress = true;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline Warp &warp() { return warps[current->number / 32]; }
inline unsigned lane() { return current->number % 32; }

// Every lane gives a value and sees those of all.
template <class T> const uint64_t *exchange(unsigned mask, T value) {
    if (mask != 0xffffffffu) std::abort();  // the kernels here only use whole warps
    uint64_t *slots = warp().slots[current->turn++ % 2];
    slots[lane()] = 0;
    std::memcpy(&slots[lane()], &value, sizeof(T));
    wait(warp().barrier);
    return slots;
}

template <class T> T slot(const uint64_t *slots, unsigned lane) {
    T value;
    std::memcpy(&value, &slots[lane % 32], sizeof(T));
    return value;
}

inline void start() {
    body();
    current->done = progress = true;
    yield();
}

inline void run_block() {
    unsigned count = block_size.x * block_size.y * block_size.z, alive = count;
    if (count % 32) std::abort();
    std::fill(shared.begin(), shared.end(), 0xff);
    warps.assign(count / 32, Warp{});
    for (Warp &warp : warps) warp.barrier.expected = 32;
    block_barrier = Barrier{count};
    if (threads.size() < count) threads.resize(count);
    for (unsigned i = 0; i < count; i++) {
        Thread &thread = threads[i];
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        thread.index = {i % block_size.x, i / block_size.x % block_size.y,
                        i / block_size.x / block_size.y};
        thread.number = i, thread.turn = 0, thread.done = false;
        makecontext(&thread.context, start, 0);
    }
    static uint32_t random = 1;
    while (alive) {
        progress = false;
        random = random * 1664525u + 1013904223u;
        unsigned offset = random >> 8, stride = (random >> 20) | 1;
        while (std::gcd(stride, count) != 1) stride += 2;
        for (unsigned i = 0; i < count; i++) {
            current = &threads[(offset + uint64_t(i) * stride) % count];
            if (current->done) continue;
            swapcontext(&scheduler, &current->context);
            alive -= current->done;
        }
        if (!progress) std::fprintf(stderr, "a barrier that not all threads reach\n"), std::abort();
    }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

template <class... Parameters, class... Arguments>
const char *launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t, Arguments... arguments) {
    if (shared > 227 * 1024) return "too much shared memory";
    if (block.x * block.y * block.z > 1024 || !grid.x || !grid.y) return "invalid configuration";
    emulated::shared.resize(shared);
    emulated::grid_size = grid, emulated::block_size = block;
    emulated::body = [=] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
            emulated::block_index = {x, y, 0};
            emulated::run_block();
        }
    return nullptr;
}

inline void __syncthreads() { emulated::wait(emulated::block_barrier); }
inline void __syncwarp() { emulated::wait(emulated::warp().barrier); }
inline int __syncthreads_count(int predicate) {
    using namespace emulated;
    unsigned turn = block_barrier.generation % 2;
    if (block_barrier.arrived == 0) block_sums[turn] = 0;
    block_sums[turn] += predicate != 0;
    wait(block_barrier);
    return block_sums[turn];
}

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    return emulated::slot<T>(emulated::exchange(mask, value), source);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulated::slot<T>(emulated::exchange(mask, value), emulated::lane() ^ bits);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const uint64_t *slots = emulated::exchange(mask, value);
    unsigned lane = emulated::lane();
    return emulated::slot<T>(slots, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t *slots = emulated::exchange(mask, predicate);
    unsigned ballot = 0;
    for (int i = 0; i < 32; i++) ballot |= unsigned(slots[i] != 0) << i;
    return ballot;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
    const uint64_t *slots = emulated::exchange(mask, value);
    unsigned match = 0;
    for (int i = 0; i < 32; i++) match |= unsigned(slots[i] == value) << i;
    return match;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const uint64_t *slots = emulated::exchange(mask, value);
    for (int i = 0; i < 32; i++) value = value < slots[i] ? unsigned(slots[i]) : value;
    return value;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const uint64_t *slots = emulated::exchange(mask, value);
    for (int i = 0; i < 32; i++) value = value > slots[i] ? unsigned(slots[i]) : value;
    return value;
}

inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (uint64_t(x) * y) >> 32; }
inline int atomicAdd(int *address, int value) { int old = *address; *address += value; return old; }
inline float clamp_keeping_nan(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
