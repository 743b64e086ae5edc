// Hopper's asynchronous copies, their barriers, and products of four warps, as plain functions.
// emulate.h has the same functions for the CPU. The copies write 16-byte pieces of a row of 128
// bytes in places that change from row to row ("swizzled"): a column of pieces has no bank twice.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#define GRID_CONSTANT const __grid_constant__

using Map = CUtensorMap;  // a box-shaped view of device memory; must be a kernel parameter
using Barrier = uint64_t;

// Null, or what is wrong. Sizes and boxes in elements, innermost first; strides in bytes, without
// the innermost. What lies outside of the sizes is read as zero.
inline const char *make_map(Map &map, const Element *base, int dimensions, const int64_t *sizes,
                            const int64_t *strides, const int *box) {
    static const auto encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult state;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &state);
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    if (!encode) return "the driver has no cuTensorMapEncodeTiled";
    cuuint64_t size[5], stride[5];
    cuuint32_t edge[5], step[5];
    for (int i = 0; i < dimensions; i++) {
        size[i] = sizes[i], edge[i] = box[i], step[i] = 1;
        if (i) stride[i - 1] = strides[i - 1];
    }
    auto type = DTYPE == 1 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result = encode(
        &map, type, dimensions, const_cast<Element *>(base), size, stride, edge, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "the driver refused the tensor map";
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(Barrier *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

// After barrier_init: for the copies to see.
__device__ __forceinline__ void barrier_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies too.
__device__ __forceinline__ void barrier_expect(Barrier *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Until the phase of this parity is over. The result is zero, which the compiler does not know:
// what is combined with it stays after the wait.
__device__ __forceinline__ uint32_t barrier_wait(Barrier *barrier, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
    return done ^ 1;
}

// A barrier of some of the block's warps; 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// A copy that the barrier counts in bytes: from column x of the first of the outermost places on.
// Other blocks will read it again: the L2 cache shall keep it.
__device__ __forceinline__ void load_box(void *to, const Map &map, int x, int outermost,
                                         Barrier *barrier) {
    constexpr uint64_t EVICT_LAST = 0x14f0000000000000;
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %4, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(0), "r"(outermost), "l"(EVICT_LAST)
        : "memory");
}

// The L2 cache reads what will be copied, or loaded: a multiple of 16 bytes.
__device__ __forceinline__ void announce_box(const Map &map, int x, int outermost) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %2, %2, %3}];" ::"l"(&map),
        "r"(x), "r"(0), "r"(outermost)
        : "memory");
}
__device__ __forceinline__ void announce_line(const void *from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// 16 bytes that no other thread of the multiprocessor will read.
__device__ __forceinline__ uint4 load_once(const void *from) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(from));
    return r;
}

// 8 bytes that the L2 cache need not keep.
__device__ __forceinline__ void store_once(void *to, uint2 value) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y)
                 : "memory");
}

// Where the right operand of four warps' product lies: rows of 128 bytes that a copy wrote.
__device__ __forceinline__ uint64_t operand(const void *at) {
    uint64_t eight_rows = 1024 >> 4, swizzle = 1;
    return uint64_t(shared_address(at) & 0x3ffff) >> 4 | eight_rows << 16 | eight_rows << 32 |
           swizzle << 62;
}

#if DTYPE == 1
#define NUMBERS "bf16"
#else
#define NUMBERS "f16"
#endif

// sums (+)= a b, asynchronously. a: 64 rows, 16 deep; b: 16 deep, 64 columns, these innermost.
// Thread 4 g + q of warp w has, as sums[4 j ..], row 16 w + g, columns 8 j + 2 q and the next, then
// the same of row 16 w + g + 8; its a are depths 2 q and the next
// of row 16 w + g and of row 16 w + g + 8, then of both the same 8 depths on.
__device__ __forceinline__ void four_warps_product(float (&d)[32], const uint32_t (&a)[4],
                                                   uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBERS "." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Keeps the compiler from moving what uses the sums to before the wait.
template <int N> __device__ __forceinline__ void settle(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#undef NUMBERS

#endif
