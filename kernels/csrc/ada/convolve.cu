// The causal depthwise convolution of ADA's keys along the sequence, and its gradients. A thread
// owns VECTOR channels of a span of tokens and walks along it: what it has read stays in registers,
// so every number is read from memory once, but for the few at the border of spans.
// Letters: B batch, T tokens, C channels, P taps (TAPS, a constant of the build).
#include "common.cuh"

#ifndef TAPS
#define TAPS 4
#endif

constexpr int VECTOR = 16 / sizeof(Element), AHEAD = 8;  // rows asked for before the first is used

struct alignas(16) Pack {
    Element x[VECTOR];
};

struct Row {
    float x[VECTOR];
};

__device__ __forceinline__ Row zero() {
    Row row;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) row.x[i] = 0;
    return row;
}

__device__ __forceinline__ Row unpack(const Pack &pack) {
    Row row;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) row.x[i] = to_float(pack.x[i]);
    return row;
}

__device__ __forceinline__ Pack pack(const Row &row) {
    Pack packed;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) packed.x[i] = from_float(row.x[i]);
    return packed;
}

__device__ __forceinline__ void load_taps(const float *taps_PC, int64_t channels, int64_t c,
                                          float taps[TAPS][VECTOR]) {
#pragma unroll
    for (int p = 0; p < TAPS; p++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) taps[p][i] = taps_PC[p * channels + c + i];
}

// y_t = sum_p taps[p] x_(t - p). Grid: blocks of channels, spans, B.
__global__ void convolve_rows(const Pack *x_BTC, const float *taps_PC, const int *segment_BT,
                              Pack *y_BTC, int tokens, int channels, int span) {
    int64_t c = int64_t(blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (c >= channels) return;
    float taps[TAPS][VECTOR];
    load_taps(taps_PC, channels, c, taps);
    int first = blockIdx.y * span, last = smaller(first + span, tokens);
    int64_t stride = channels / VECTOR, row = int64_t(blockIdx.z) * tokens;
    const Pack *x = x_BTC + row * stride + c / VECTOR;
    Pack *y = y_BTC + row * stride + c / VECTOR;
    const int *segment = segment_BT ? segment_BT + row : nullptr;
    Row past[TAPS];  // past[p]: the row of p tokens ago
#pragma unroll
    for (int p = 1; p < TAPS; p++)
        past[p - 1] = first >= p ? unpack(x[int64_t(first - p) * stride]) : zero();
    for (int from = first; from < last; from += AHEAD) {
        Pack ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            ahead[i] = x[int64_t(smaller(from + i, last - 1)) * stride];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int t = from + i;
            if (t >= last) break;
#pragma unroll
            for (int p = TAPS - 1; p > 0; p--) past[p] = past[p - 1];
            past[0] = unpack(ahead[i]);
            Row sum = zero();
#pragma unroll
            for (int p = 0; p < TAPS; p++) {
                bool same = !segment || p == 0 || (t >= p && segment[t - p] == segment[t]);
#pragma unroll
                for (int i = 0; i < VECTOR; i++)
                    sum.x[i] += same ? taps[p][i] * past[p].x[i] : 0.0f;
            }
            y[int64_t(t) * stride] = pack(sum);
        }
    }
}

// dx_s = sum_p taps[p] dz_(s + p), and of this span sum_s dz_(s + p) x_s. Grid as above.
__global__ void unconvolve_rows(const Pack *dz_BTC, const Pack *x_BTC, const float *taps_PC,
                                const int *segment_BT, Pack *dx_BTC, float *part_NPC, int tokens,
                                int channels, int span) {
    int64_t c = int64_t(blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (c >= channels) return;
    float taps[TAPS][VECTOR], sums[TAPS][VECTOR];
    load_taps(taps_PC, channels, c, taps);
#pragma unroll
    for (int p = 0; p < TAPS; p++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sums[p][i] = 0;
    int first = blockIdx.y * span, last = smaller(first + span, tokens);
    int64_t stride = channels / VECTOR, row = int64_t(blockIdx.z) * tokens;
    const Pack *dz = dz_BTC + row * stride + c / VECTOR, *x = x_BTC + row * stride + c / VECTOR;
    Pack *dx = dx_BTC + row * stride + c / VECTOR;
    const int *segment = segment_BT ? segment_BT + row : nullptr;
    Row coming[TAPS];  // coming[p]: the gradient p tokens on
#pragma unroll
    for (int p = 1; p < TAPS; p++)
        coming[p] = first + p - 1 < tokens ? unpack(dz[int64_t(first + p - 1) * stride]) : zero();
    for (int from = first; from < last; from += AHEAD) {
        Pack ahead_dz[AHEAD], ahead_x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            ahead_dz[i] = dz[int64_t(smaller(from + i + TAPS - 1, tokens - 1)) * stride];
            ahead_x[i] = x[int64_t(smaller(from + i, last - 1)) * stride];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int s = from + i;
            if (s >= last) break;
#pragma unroll
            for (int p = 0; p < TAPS - 1; p++) coming[p] = coming[p + 1];
            coming[TAPS - 1] = s + TAPS - 1 < tokens ? unpack(ahead_dz[i]) : zero();
            Row own = unpack(ahead_x[i]), sum = zero();
#pragma unroll
            for (int p = 0; p < TAPS; p++) {
                bool same =
                    !segment || p == 0 || (s + p < tokens && segment[s + p] == segment[s]);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) {
                    float d = same ? coming[p].x[i] : 0.0f;
                    sum.x[i] += taps[p][i] * d;
                    sums[p][i] += d * own.x[i];
                }
            }
            dx[int64_t(s) * stride] = pack(sum);
        }
    }
    int64_t part = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
#pragma unroll
    for (int p = 0; p < TAPS; p++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            part_NPC[(part * TAPS + p) * channels + c + i] = sums[p][i];
}

static dim3 grid_of(int64_t batch, int64_t tokens, int64_t channels, int64_t span,
                    int64_t threads) {
    return dim3(divide_up<int64_t>(channels, VECTOR * threads), divide_up<int64_t>(tokens, span),
                batch);
}

// channels: a multiple of VECTOR; rows begin at multiples of 16 bytes.
extern "C" const char *convolve(const Pack *x_BTC, const float *taps_PC, const int *segment_BT,
                                Pack *y_BTC, int64_t batch, int64_t tokens, int64_t channels,
                                int64_t span, int64_t threads, cudaStream_t stream) {
    return launch(convolve_rows, grid_of(batch, tokens, channels, span, threads), dim3(threads), 0,
                  stream, x_BTC, taps_PC, segment_BT, y_BTC, int(tokens), int(channels), int(span));
}

extern "C" const char *unconvolve(const Pack *dz_BTC, const Pack *x_BTC, const float *taps_PC,
                                  const int *segment_BT, Pack *dx_BTC, float *part_NPC,
                                  int64_t batch, int64_t tokens, int64_t channels, int64_t span,
                                  int64_t threads, cudaStream_t stream) {
    return launch(unconvolve_rows, grid_of(batch, tokens, channels, span, threads), dim3(threads),
                  0, stream, dz_BTC, x_BTC, taps_PC, segment_BT, dx_BTC, part_NPC, int(tokens),
                  int(channels), int(span));
}
