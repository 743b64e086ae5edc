// y = the sum of a token's pairs' a U_c, added up in shared memory: no row of a pair is written.
//
// A block takes tiles in turn: some tokens and 64 columns, whose sums it keeps in fp32. It goes
// through a list of items, each up to 64 pairs of one channel, in the order of the channels. One
// warp asks for the items' slices of U, several ahead, and has the L2 cache read what comes after.
// Groups of four warps take items in turn: while one adds products to the sums of their tokens,
// the others multiply and wait for their next rows of a, which go to registers. A token has a
// channel at most once, and an item is added when the one before it has been: no sum is touched by
// two at a time, and the order is fixed.
// Letters: S pairs in sorted order, C channels, D width, R rank, B blocks of tokens, I items, P 64.

#include "projection/hopper.cuh"

constexpr int PIECE = 64;    // pairs of an item
constexpr int RANK = 64;     // the only one: a group has its rows of a in registers
constexpr int COLUMNS = 64;  // of a block
constexpr int ROW = COLUMNS * 2, STAGE = RANK * ROW;  // bytes of U
constexpr int GROUPS = 3, WORKERS = 128 * GROUPS;     // threads that multiply and add
constexpr int AHEAD = 16;                             // items that the L2 cache is told of at once
constexpr int PLAN_THREADS = 256;

struct alignas(16) Item {
    int channel, first, count, unused;  // pairs: sorted places from `first` on
};

// The list of a block of tokens, with the tokens of each item's pairs, counted from the block's
// first; -1 where there is none. Shared memory: ints [2, C] and [C + 1].
__global__ void __launch_bounds__(PLAN_THREADS)
    plan_items(const int *order_S, const int *start_C1, Item *item_BI, int16_t *token_BIP,
               int *items_B, int tokens, int kept, int channels, int limit) {
    SHARED_MEMORY(memory);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int *begin_C = reinterpret_cast<int *>(memory), *end_C = begin_C + channels;
    int *base_C1 = end_C + channels, block = blockIdx.x;
    for (int i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
        // The channel's first pair of this block's first token or a later one; of the next block's.
        int64_t pair = int64_t(block + i / channels) * tokens * kept;
        int low = start_C1[i % channels], high = start_C1[i % channels + 1];
        while (low < high) {
            int middle = low + (high - low) / 2;
            if (order_S[middle] < pair)
                low = middle + 1;
            else
                high = middle;
        }
        begin_C[i] = low;
    }
    __syncthreads();
    if (warp == 0) {
        int base = 0, total;
        for (int c_0 = 0; c_0 < channels; c_0 += 32, base += total) {
            int c = c_0 + lane, pairs = c < channels ? end_C[c] - begin_C[c] : 0;
            int before = base + warp_before(divide_up(pairs, PIECE), lane, total);
            if (c < channels) base_C1[c] = before;
        }
        if (lane == 0) base_C1[channels] = items_B[block] = base;
    }
    __syncthreads();
    for (int c = warp; c < channels; c += warps) {
        int first = begin_C[c];
        for (int i = base_C1[c]; i < base_C1[c + 1]; i++, first += PIECE) {
            int64_t at = int64_t(block) * limit + i;
            int count = smaller(PIECE, end_C[c] - first);
            if (lane == 0) item_BI[at] = Item{c, first, count, 0};
#pragma unroll
            for (int row = lane; row < PIECE; row += 32)
                token_BIP[at * PIECE + row] =
                    row < count ? order_S[first + row] / kept - block * tokens : -1;
        }
    }
}

// Which stage comes next, and which parity its barriers' phase has.
struct Ring {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance(int stages, int by = 1) {
        stage += by;
        if (stage >= stages) stage -= stages, parity ^= 1;
    }
};

// The shared memory of a block: U of each stage, barriers, sums.
struct Memory {
    unsigned char *u;
    Barrier *full, *empty, *turns;  // turns: a group's to add
    float *sums;

    __host__ __device__ static int stage_bytes(int stages) {
        return stages * STAGE + divide_up(16 * stages + 8 * GROUPS, 128) * 128;
    }

    __device__ Memory(unsigned char *memory, int stages) : u(memory) {
        full = reinterpret_cast<Barrier *>(memory + stages * STAGE);
        empty = full + stages;
        turns = empty + stages;
        sums = reinterpret_cast<float *>(memory + stage_bytes(stages));
    }
};

struct Shape {
    int tokens, width;          // of all
    int block_tokens, limit;    // tokens of a block, places for items of a block
    int across, tiles, stages;  // tiles of all columns, all tiles; stages are not below GROUPS
};

// Tiles, columns first: blocks that run at once share tokens, and columns.
struct Tile {
    int number;
    const Shape &shape;

    __device__ Tile(const Shape &shape) : number(blockIdx.x), shape(shape) {}
    __device__ __forceinline__ bool live() const { return number < shape.tiles; }
    __device__ __forceinline__ void advance() { number += gridDim.x; }
    __device__ __forceinline__ int column() const { return number % shape.across * COLUMNS; }
    __device__ __forceinline__ int block() const { return number / shape.across; }
};

// What a tile reads: rows of a, U, and lists.
struct Inputs {
    const Element *a_SR;
    const Map &u_map;
    const Item *item_I;
    const int16_t *token_IP;
    int items, column, block;

    // The warp that asks for U. Its first lane does; all read the list.
    __device__ __forceinline__ void ask(const Memory &memory, int stages, Ring &ring) const {
        int lane = threadIdx.x % 32;
        Item now{}, next = announced(lane);
        for (int i = 0; i < items; i++, ring.advance(stages)) {
            if (i % AHEAD == 0) now = next, next = announced(i + AHEAD + lane);
            int channel = __shfl_sync(WHOLE_WARP, now.channel, i % AHEAD);
            if (lane) continue;
            barrier_wait(memory.empty + ring.stage, ring.parity ^ 1);
            barrier_expect(memory.full + ring.stage, STAGE);
            load_box(memory.u + ring.stage * STAGE, u_map, column, channel * (RANK / 32),
                     memory.full + ring.stage);
        }
    }

    // A lane's item, of which this block tells the L2 cache its share.
    __device__ __forceinline__ Item announced(int i) const {
        if (threadIdx.x % 32 >= AHEAD || i >= items) return {};
        Item item = item_I[i];
        if (block % 4 == i % 4) announce_box(u_map, column, item.channel * (RANK / 32));
        if (column / COLUMNS % 8 == i % 8)
            announce_line(a_SR + int64_t(item.first) * RANK, item.count * RANK * 2);
        return item;
    }
};

// Four warps that multiply and add. Over all tiles groups take items in turn.
struct Group {
    const Memory &memory;
    int stages, group, warp, g, q;
    Ring ring;
    int parity, turn;  // of this group's barrier of turns; whose the next tile's first item is
    float products[COLUMNS / 2];
    uint4 a[4];  // of the next item: ranks 8 q .. of two rows, then ranks 32 + 8 q ..
    int to[2];   // its rows' tokens, or -1
    Item next;   // the one after

    __device__ Group(const Memory &memory, int stages)
        : memory(memory), stages(stages), group(threadIdx.x / 128), warp(threadIdx.x / 32 % 4),
          g(threadIdx.x % 32 / 4), q(threadIdx.x % 4), parity(group == 0), turn(0) {}

    // The items of a tile.
    __device__ __forceinline__ void run(const Inputs &inputs) {
        int items = inputs.items, first = (group - turn + GROUPS) % GROUPS;
        turn = (turn + items) % GROUPS;
        ring.advance(stages, smaller(first, items));  // other groups' items
        if (first >= items) return;
        next = inputs.item_I[first];
        load(inputs, first);
        for (int i = first; i < items; i += GROUPS) {
            int now[2] = {to[0], to[1]};
            multiply(inputs, i);
            barrier_wait(memory.turns + group, parity);
            add(now);
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(memory.turns + (group + 1) % GROUPS);
            parity ^= 1;
            ring.advance(stages, smaller(GROUPS, items - i) - 1);
        }
    }

    // This thread's part of item i, and the place of the one after. Where there is no such row or
    // item it reads others: what it makes of them it adds nowhere.
    __device__ __forceinline__ void load(const Inputs &inputs, int i) {
        int last = inputs.items - 1;
        const int16_t *token_P = inputs.token_IP + int64_t(smaller(i, last)) * PIECE;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = 16 * warp + 8 * half + g;
            to[half] = token_P[row];
            const Element *row_R =
                inputs.a_SR + int64_t(next.first + smaller(row, next.count - 1)) * RANK + 8 * q;
            a[half] = load_once(row_R), a[half + 2] = load_once(row_R + 32);
        }
        next = inputs.item_I[smaller(i + GROUPS, last)];
    }

    // The products of item i; what this group's next item needs is asked for.
    __device__ __forceinline__ void multiply(const Inputs &inputs, int i) {
        uint32_t zero = barrier_wait(memory.full + ring.stage, ring.parity);
        uint64_t right = operand(memory.u + ring.stage * STAGE);
        Barrier *empty = memory.empty + ring.stage;
        ring.advance(stages);
        // See the order of U's ranks in shared memory. Were it not for `zero`, the compiler would
        // wait for rows of a where the other groups wait for this one.
        uint32_t left[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int step = j / 2 * 2, row = j % 2;
            left[step][row] = a[j].x ^ zero, left[step][row + 2] = a[j].y ^ zero;
            left[step + 1][row] = a[j].z ^ zero, left[step + 1][row + 2] = a[j].w ^ zero;
        }
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++)  // addresses count 16 bytes
            four_warps_product(products, left[step], right + step * 16 * ROW / 16, step > 0);
        products_commit();
        load(inputs, i + GROUPS);
        products_wait();
        settle(products);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty);
    }

    // Sums lie in another order than columns: of 16 neighbours a thread's four lie together. Lanes
    // of even and odd g take two blocks of 16 in another order, so that eight lanes, two tokens,
    // meet in no bank.
    __device__ __forceinline__ void add(const int (&to)[2]) {
        constexpr int BLOCKS = COLUMNS / 16;
        bool odd = g & 1;
        float4 *at[2][2], sum[2][BLOCKS];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            auto *sums = reinterpret_cast<float4 *>(memory.sums + to[half] * COLUMNS) + q;
            at[half][0] = sums + (odd ? 4 : 0), at[half][1] = sums - (odd ? 4 : 0);
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (to[half] >= 0) sum[half][b] = at[half][b % 2][4 * b];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const float *mine = products + 8 * b + 2 * half;
                const float *other = products + 8 * (b ^ 1) + 2 * half;
                sum[half][b].x += odd ? other[0] : mine[0];
                sum[half][b].y += odd ? other[1] : mine[1];
                sum[half][b].z += odd ? other[4] : mine[4];
                sum[half][b].w += odd ? other[5] : mine[5];
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (to[half] >= 0) at[half][b % 2][4 * b] = sum[half][b];
        }
    }

    __device__ __forceinline__ void sync() { named_barrier(1, WORKERS); }

    // The sums are zero at first, and again once they are stored.
    __device__ __forceinline__ void clear(int tokens) {
        auto *sums = reinterpret_cast<float4 *>(memory.sums);
        for (int i = threadIdx.x; i < tokens * COLUMNS / 4; i += WORKERS)
            sums[i] = float4{0.f, 0.f, 0.f, 0.f};
        sync();
    }

    // A thread has columns 2 q, and 8 after them, of a block of 16; it trades with its neighbour
    // for four in a row.
    __device__ __forceinline__ void store(Element *y_ND, int tokens, int column, int width) {
        constexpr int LINE = COLUMNS / 4;
        sync();
        bool odd = q & 1;
        int line = threadIdx.x % LINE;
        int at = column + line / 4 * 16 + 8 * odd + 4 * (q / 2);
#pragma unroll 4
        for (int token_0 = 0; token_0 < tokens; token_0 += WORKERS / LINE) {
            int token = token_0 + threadIdx.x / LINE;
            bool live = token < tokens;
            auto *from = reinterpret_cast<float4 *>(memory.sums) + token * LINE + line;
            float4 sum{0.f, 0.f, 0.f, 0.f};
            if (live) {
                sum = *from;
                *from = float4{0.f, 0.f, 0.f, 0.f};
            }
            uint32_t left = pack(sum.x, sum.y), right = pack(sum.z, sum.w);
            uint32_t theirs = __shfl_xor_sync(WHOLE_WARP, odd ? left : right, 1);
            uint2 four = odd ? uint2{theirs, right} : uint2{left, theirs};
            if (live && at < width) store_once(y_ND + int64_t(token) * width + at, four);
        }
        sync();
    }

    __device__ __forceinline__ static uint32_t pack(float low, float high) {
        union {
            Element halves[2];
            uint32_t both;
        } packed;
        packed.halves[0] = from_float(low), packed.halves[1] = from_float(high);
        return packed.both;
    }
};

__global__ void __launch_bounds__(WORKERS + 32, 1)
    accumulate_items(GRID_CONSTANT Map u_map, const Element *a_SR, const Item *item_BI,
                     const int16_t *token_BIP, const int *items_B, Element *y_ND, Shape shape) {
    SHARED_MEMORY(bytes);
    Memory memory(bytes, shape.stages);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < shape.stages; stage++) {
            barrier_init(memory.full + stage, 1);
            barrier_init(memory.empty + stage, 4);
        }
        for (int group = 0; group < GROUPS; group++) barrier_init(memory.turns + group, 4);
        barrier_fence();
    }
    __syncthreads();
    Tile tile(shape);
    auto inputs = [&] {
        int64_t list = int64_t(tile.block()) * shape.limit;
        return Inputs{a_SR,
                      u_map,
                      item_BI + list,
                      token_BIP + list * PIECE,
                      items_B[tile.block()],
                      tile.column(),
                      tile.block()};
    };
    if (threadIdx.x >= WORKERS) {
        Ring ring;
        for (; tile.live(); tile.advance()) inputs().ask(memory, shape.stages, ring);
    } else {
        Group group(memory, shape.stages);
        group.clear(shape.block_tokens);
        for (; tile.live(); tile.advance()) {
            group.run(inputs());
            int first = tile.block() * shape.block_tokens;
            group.store(y_ND + int64_t(first) * shape.width,
                        smaller(shape.block_tokens, shape.tokens - first), tile.column(),
                        shape.width);
        }
    }
}

// The lists of all blocks: item_BI [B, limit] of 16 bytes, token_BIP int16 [B, limit, 64].
extern "C" const char *plan(const int *order_S, const int *start_C1, Item *item_BI,
                            int16_t *token_BIP, int *items_B, int64_t tokens, int64_t kept,
                            int64_t channels, int64_t limit, int64_t blocks, cudaStream_t stream) {
    return launch(plan_items, dim3(blocks), dim3(PLAN_THREADS), 4 * (3 * channels + 1), stream,
                  order_S, start_C1, item_BI, token_BIP, items_B, int(tokens), int(kept),
                  int(channels), int(limit));
}

// a_SR in sorted order, w_CRD, y_ND, R = 64. width: a multiple of 8; processors: blocks that can
// run at once.
extern "C" const char *accumulate(const Element *a_SR, const Element *w_CRD, const Item *item_BI,
                                  const int16_t *token_BIP, const int *items_B, Element *y_ND,
                                  int64_t tokens, int64_t channels, int64_t width,
                                  int64_t block_tokens, int64_t limit, int64_t blocks,
                                  int64_t processors, int64_t stages, cudaStream_t stream) {
    // Of 32 ranks a thread with q has the 8 from 8 q on, 16 bytes of a row of a. The products want
    // depths 2 q and 2 q + 1, and 8 more, of two products: rank 8 q + 2 i + e comes to place
    // 8 i + 2 q + e.
    Map u_map;
    int64_t line = width * 2, sizes[] = {width, 2, 4, 4, channels * RANK / 32};
    int64_t strides[] = {line, 8 * line, 2 * line, 32 * line};
    int box[] = {COLUMNS, 2, 4, 4, RANK / 32};
    const char *failure = make_map(u_map, w_CRD, 5, sizes, strides, box);
    if (failure) return failure;
    int across = divide_up(int(width), COLUMNS), tiles = across * int(blocks);
    Shape shape{int(tokens), int(width), int(block_tokens), int(limit), across, tiles, int(stages)};
    size_t shared = Memory::stage_bytes(int(stages)) + block_tokens * COLUMNS * 4;
    return launch(accumulate_items, dim3(smaller(tiles, int(processors))), dim3(WORKERS + 32),
                  shared, stream, u_map, a_SR, item_BI, token_BIP, items_B, y_ND, shape);
}
