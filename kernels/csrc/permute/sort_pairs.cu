// A stable counting sort of pairs by channel, in three passes: a block counts the channels of its
// run of pairs; one warp a channel turns the counts into places relative to the channel's start; a
// block then ranks its pairs. No atomic decides an order.
// Letters: S pairs, C channels, B blocks of pairs.

#include "common.cuh"

constexpr int STEPS = 4;            // pairs a lane; a warp owns 32 * STEPS neighbours
constexpr int WARP_PAIRS = 32 * STEPS;

// Channel of a pair; index is int32 or int64 by its width in bytes.
__device__ __forceinline__ int channel_at(const void *index, int64_t width, int64_t pair) {
    return width == 8 ? int(static_cast<const int64_t *>(index)[pair])
                      : static_cast<const int *>(index)[pair];
}

// count_BC: how many pairs of a channel a block has. Shared memory: [C].
__global__ void count_channels(const void *index, int64_t width, int *count_BC, int pairs,
                               int channels) {
    SHARED_MEMORY(memory);
    int *count_C = reinterpret_cast<int *>(memory);
    int run = blockDim.x * STEPS, first = blockIdx.x * run, end = smaller(pairs, first + run);
    for (int c = threadIdx.x; c < channels; c += blockDim.x) count_C[c] = 0;
    __syncthreads();
    for (int pair = first + threadIdx.x; pair < end; pair += blockDim.x)
        atomicAdd(&count_C[channel_at(index, width, pair)], 1);
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += blockDim.x)
        count_BC[int64_t(blockIdx.x) * channels + c] = count_C[c];
}

// In place: counts become the number of the channel's pairs in earlier blocks. 32 channels a block,
// a column of the table each; thread row y takes a run of blocks. total_C: pairs of a channel.
__global__ void scan_blocks(int *count_BC, int *total_C, int blocks, int channels) {
    SHARED_MEMORY(memory);
    int *run_sums = reinterpret_cast<int *>(memory);
    int channel = blockIdx.x * 32 + threadIdx.x, rows = blockDim.y;
    int run = divide_up(blocks, rows), first = smaller(blocks, int(threadIdx.y) * run);
    int end = smaller(blocks, first + run), sum = 0;
    bool live = channel < channels;
    for (int b = first; live && b < end; b++) sum += count_BC[int64_t(b) * channels + channel];
    run_sums[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (!live) return;
    int before = 0;
    for (int y = 0; y < threadIdx.y; y++) before += run_sums[y * 32 + threadIdx.x];
    if (threadIdx.y == rows - 1) total_C[channel] = before + sum;
    for (int b = first; b < end; b++) {
        int64_t place = int64_t(b) * channels + channel;
        int count = count_BC[place];
        count_BC[place] = before;
        before += count;
    }
}

// Starts of the channels, from their totals, into shared memory: every thread sums a run of
// channels, and a scan over the threads gives what comes before the run. scratch: an int a warp.
__device__ void scan_totals(const int *total_C, int *start_C, int *scratch, int channels) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int run = divide_up<int>(channels, blockDim.x);
    int first = smaller<int>(channels, threadIdx.x * run), end = smaller(channels, first + run);
    int sum = 0, total;
    for (int c = first; c < end; c++) sum += total_C[c];
    int before = warp_before(sum, lane, total);
    if (lane == 0) scratch[warp] = total;
    __syncthreads();
    for (int w = 0; w < warp; w++) before += scratch[w];
    for (int c = first; c < end; c++) {
        start_C[c] = before;
        before += total_C[c];
    }
    __syncthreads();
}

// Places: a warp ranks its pairs by channel, 32 at a time in order; its counter of a channel then
// starts after the channel's pairs in earlier channels, blocks and warps.
// Shared memory: counters [warps, C], starts [C], a scratch of one int a warp.
__global__ void place_pairs(const void *index, int64_t width, const int *before_BC,
                            const int *total_C, int *order_S, int *place_S, int *start_C1,
                            int pairs, int channels) {
    SHARED_MEMORY(memory);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int *counters = reinterpret_cast<int *>(memory), *own = counters + warp * channels;
    int *start_C = counters + warps * channels, *scratch = start_C + channels;
    for (int c = lane; c < channels; c += 32) own[c] = 0;
    scan_totals(total_C, start_C, scratch, channels);
    int first = (blockIdx.x * warps + warp) * WARP_PAIRS + lane, channel[STEPS], rank[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int pair = first + 32 * step;
        channel[step] = pair < pairs ? channel_at(index, width, pair) : -1;
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned same = __match_any_sync(WHOLE_WARP, channel[step]);
        int earlier = __popc(same & ((1u << lane) - 1));
        bool live = channel[step] >= 0;
        rank[step] = live ? own[channel[step]] + earlier : 0;
        __syncwarp();
        if (live && earlier == 0) own[channel[step]] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        int place = start_C[c] + before_BC[int64_t(blockIdx.x) * channels + c];
        for (int w = 0; w < warps; w++) {
            int count = counters[w * channels + c];
            counters[w * channels + c] = place;
            place += count;
        }
        if (blockIdx.x == 0) start_C1[c] = start_C[c];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) start_C1[channels] = pairs;
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int pair = first + 32 * step;
        if (pair >= pairs) continue;
        int place = own[channel[step]] + rank[step];
        order_S[place] = pair;
        place_S[pair] = place;
    }
}

// warps: of a block of pairs. count_BC [blocks, C], total_C: workspace; blocks is at least 1 and
// ceil(pairs / (warps * WARP_PAIRS)).
extern "C" const char *sort_pairs(const void *index, int *count_BC, int *total_C, int *order_S,
                                  int *place_S, int *start_C1, int64_t width, int64_t pairs,
                                  int64_t channels, int64_t blocks, int64_t warps,
                                  cudaStream_t stream) {
    dim3 block(32 * warps);
    const char *failure = launch(count_channels, dim3(blocks), block, 4 * channels, stream, index,
                                 width, count_BC, int(pairs), int(channels));
    if (failure) return failure;
    dim3 column(32, smaller<int64_t>(32, blocks));
    failure = launch(scan_blocks, dim3(divide_up<int64_t>(channels, 32)), column,
                     32 * column.y * 4, stream, count_BC, total_C, int(blocks), int(channels));
    if (failure) return failure;
    return launch(place_pairs, dim3(blocks), block, 4 * ((warps + 1) * channels + warps), stream,
                  index, width, count_BC, total_C, order_S, place_S, start_C1, int(pairs),
                  int(channels));
}
