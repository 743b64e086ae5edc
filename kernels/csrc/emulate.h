// Runs the kernels of this folder on the CPU, for tests on machines without a GPU: one block after
// another, its threads as fibers that change places at every barrier and warp operation, in a
// shuffled order, so that a missing barrier shows. Shared memory starts as NaN. A barrier that not
// all threads reach aborts. Asynchronous copies arrive later, in any order; products of four warps
// are done when they are waited for. Half precision is left out; numbers are those of the CPU.
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
#define GRID_CONSTANT const
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
    std::vector<std::vector<std::function<void()>>> products;  // groups begun; the last is open
};

constexpr size_t STACK = 64 * 1024;
static std::vector<unsigned char> shared;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static Barrier block_barrier, named_barriers[16];
static std::vector<std::function<void()>> copies;  // asked for, not yet there
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
    for (Barrier &barrier : named_barriers) barrier = Barrier{};
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
        thread.products.assign(1, {});
        makecontext(&thread.context, start, 0);
    }
    static uint32_t random = 1;
    while (alive) {
        bool idle = !progress;
        progress = false;
        random = random * 1664525u + 1013904223u;
        unsigned offset = random >> 8, stride = (random >> 20) | 1;
        while (std::gcd(stride, count) != 1) stride += 2;
        if (!copies.empty() && (idle || offset % 16 == 0)) {
            std::swap(copies[offset % copies.size()], copies.back());
            std::function<void()> copy = std::move(copies.back());
            copies.pop_back();
            copy();
            progress = true;
        }
        for (unsigned i = 0; i < count; i++) {
            current = &threads[(offset + uint64_t(i) * stride) % count];
            if (current->done) continue;
            swapcontext(&scheduler, &current->context);
            alive -= current->done;
        }
        if (!progress && copies.empty()) {
            std::fprintf(stderr, "a barrier that not all threads reach\n");
            std::abort();
        }
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
    if (block.x * block.y * block.z > 1024 || !grid.x || !grid.y || !grid.z)
        return "invalid configuration";
    emulated::shared.resize(shared);
    emulated::grid_size = grid, emulated::block_size = block;
    emulated::body = [=] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                emulated::block_index = {x, y, z};
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

// What projection/hopper.cuh says, at its latest: copies arrive when the scheduler likes, products
// are done when they are waited for.

struct Map {
    const unsigned char *base;
    int dimensions;
    int64_t sizes[5], strides[5];
    int box[5];
};
using Barrier = uint64_t;

inline const char *make_map(Map &map, const void *base, int dimensions, const int64_t *sizes,
                            const int64_t *strides, const int *box) {
    map = {static_cast<const unsigned char *>(base), dimensions, {}, {2}, {}};
    bool good = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] <= 64;
    for (int i = 0; i < dimensions; i++) {
        map.sizes[i] = sizes[i], map.box[i] = box[i];
        good = good && sizes[i] > 0 && box[i] > 0 && box[i] <= 256;
        if (i) map.strides[i] = strides[i - 1], good = good && strides[i - 1] % 16 == 0;
    }
    return good ? nullptr : "the driver refused the tensor map";
}

namespace emulated {

struct Phase {
    int32_t bytes;
    uint8_t pending, count;
    uint16_t phase;
};
static_assert(sizeof(Phase) == sizeof(uint64_t), "in the place of a barrier");

inline void count(void *barrier, int arrivals, int bytes) {
    Phase &phase = *static_cast<Phase *>(barrier);
    if (arrivals > phase.pending) std::abort();
    phase.pending -= arrivals, phase.bytes += bytes;
    if (phase.pending || phase.bytes) return;
    phase.phase++, phase.pending = phase.count, progress = true;
}

inline unsigned offset(const void *pointer) {
    return unsigned(static_cast<const unsigned char *>(pointer) - shared.data());
}

inline unsigned swizzled(unsigned at) { return at ^ (at >> 3 & 112); }

// The box that begins at x and at the outermost place.
inline void later(unsigned to, Map map, int x, int outermost, unsigned barrier) {
    if (to % 1024) std::abort();
    copies.push_back([=] {
        int elements = 1, last = map.dimensions - 1;
        for (int i = 0; i < map.dimensions; i++) elements *= map.box[i];
        for (int n = 0; n < elements; n++) {
            int64_t from = 0;
            bool inside = true;
            for (int i = 0, rest = n; i <= last; rest /= map.box[i++]) {
                int64_t at = rest % map.box[i] + (i == 0 ? x : i == last ? outermost : 0);
                inside = inside && at >= 0 && at < map.sizes[i];
                from += at * map.strides[i];
            }
            uint16_t value = 0;
            if (inside) std::memcpy(&value, map.base + from, 2);
            std::memcpy(&shared.at(swizzled(to + 2 * n)), &value, 2);
        }
        emulated::count(&shared.at(barrier), 0, -2 * elements);
    });
}

inline float half_at(unsigned at) {
    uint16_t bits;
    std::memcpy(&bits, &shared.at(swizzled(at)), 2);
    return __uint_as_float(uint32_t(bits) << 16);
}

}  // namespace emulated

inline void barrier_init(Barrier *barrier, int count) {
    emulated::Phase phase{0, uint8_t(count), uint8_t(count), 0};
    std::memcpy(barrier, &phase, sizeof(phase));
}
inline void barrier_fence() {}
inline void barrier_expect(Barrier *barrier, int bytes) { emulated::count(barrier, 1, bytes); }
inline void barrier_arrive(Barrier *barrier) { emulated::count(barrier, 1, 0); }
inline uint32_t barrier_wait(Barrier *barrier, int parity) {
    while ((reinterpret_cast<emulated::Phase *>(barrier)->phase & 1) == parity) emulated::yield();
    return 0;
}
inline void named_barrier(int name, int threads) {
    emulated::Barrier &barrier = emulated::named_barriers[name];
    barrier.expected = threads;
    emulated::wait(barrier);
}

inline void load_box(void *to, const Map &map, int x, int outermost, Barrier *barrier) {
    using namespace emulated;
    later(offset(to), map, x, outermost, offset(barrier));
}
inline void announce_box(const Map &, int, int) {}
inline void announce_line(const void *from, int bytes) {
    if ((reinterpret_cast<uintptr_t>(from) | bytes) % 16) std::abort();
}
inline uint4 load_once(const void *from) { return *static_cast<const uint4 *>(from); }
inline void store_once(void *to, uint2 value) { *static_cast<uint2 *>(to) = value; }

inline uint64_t operand(const void *at) { return emulated::offset(at) / 16; }
inline void four_warps_product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    using namespace emulated;
    unsigned g = lane() / 4, q = lane() % 4;
    std::vector<float> rows[2];  // this thread's two rows of a
    uint32_t mine[2][2] = {{a[0], a[2]}, {a[1], a[3]}};
    for (int half = 0; half < 2; half++)
        for (int eight = 0; eight < 2; eight++) {
            const uint64_t *slots = exchange(0xffffffffu, mine[half][eight]);
            for (int i = 0; i < 4; i++) {
                uint32_t pair = slot<uint32_t>(slots, 4 * g + i);
                rows[half].push_back(__uint_as_float(pair << 16));
                rows[half].push_back(__uint_as_float(pair & 0xffff0000u));
            }
        }
    unsigned start = b * 16;
    current->products.back().push_back([=, &d] {
        for (int i = 0; i < 32; i++) {
            int column = i / 4 * 8 + 2 * q + i % 2;
            float sum = add ? d[i] : 0.f;
            for (int k = 0; k < 16; k++)
                sum += rows[i / 2 % 2][k] * half_at(start + k * 128 + 2 * column);
            d[i] = sum;
        }
    });
    if (!add)
        for (float &sum : d) sum = NAN;  // until it is waited for
}
inline void products_begin() {}
inline void products_commit() { emulated::current->products.push_back({}); }
inline void products_wait() {
    auto &groups = emulated::current->products;
    while (groups.size() > 1) {
        for (auto &product : groups.front()) product();
        groups.erase(groups.begin());
    }
}
template <int N> void settle(float (&)[N]) {}
