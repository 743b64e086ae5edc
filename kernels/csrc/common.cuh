// What every kernel here shares: launching with errors as text, and the element types.
// Compiled by nvcc, or by a C++ compiler against emulate.h, which runs the kernels on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

// Null, or what CUDA says is wrong with the launch.
template <class... Parameters, class... Arguments>
const char *launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) {
        kernel<<<grid, block, shared, stream>>>(arguments...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// fminf and fmaxf drop a NaN; these keep it.
__device__ __forceinline__ float clamp_keeping_nan(float x, float low, float high) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
}

#else
#include "emulate.h"
#endif

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// The sum of the lanes before this one; total: of all.
__device__ __forceinline__ int warp_before(int value, int lane, int &total) {
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        int other = __shfl_up_sync(WHOLE_WARP, sum, distance);
        if (lane >= distance) sum += other;
    }
    total = __shfl_sync(WHOLE_WARP, sum, 31);
    return sum - value;
}

// DTYPE is a constant of the build: torch's float32, bfloat16 or float16 (jit.DTYPES).
#ifndef DTYPE
#define DTYPE 0
#endif
#if DTYPE == 0
using Element = float;
__device__ __forceinline__ float to_float(Element x) { return x; }
__device__ __forceinline__ Element from_float(float x) { return x; }
#elif DTYPE == 1
using Element = __nv_bfloat16;
__device__ __forceinline__ float to_float(Element x) { return __bfloat162float(x); }
__device__ __forceinline__ Element from_float(float x) { return __float2bfloat16(x); }
#else
using Element = __half;
__device__ __forceinline__ float to_float(Element x) { return __half2float(x); }
__device__ __forceinline__ Element from_float(float x) { return __float2half(x); }
#endif

template <class T> __host__ __device__ constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <class T> __host__ __device__ constexpr T larger(T a, T b) { return a < b ? b : a; }
template <class T> __host__ __device__ constexpr T divide_up(T a, T b) { return (a + b - 1) / b; }
