// Edge functions and the k largest of each row, forward and backward. A warp owns a row, a block a
// run of rows; rows are sorted by grove, and a block goes through the groves of its rows in turn.
// Constants of the build: DEGREE, SLOTS = ceil(M / 32), DTYPE of h.
// Letters: N rows, M edges, P coefficients of an edge, K <= 32 kept, G groves, J intervals.

#include "common.cuh"
#include "edge/select.cuh"
#include "edge/spline.cuh"

constexpr int COLUMNS = 32 * SLOTS;
constexpr int THREADS = 512;  // of a forward block
constexpr int FINISH_THREADS = 256, REDUCE_ROWS = 32;

struct Shape {
    int64_t rows, rows_per_block;
    int edges, grid, kept, base;
};

// The rows of this block, and the groves they belong to.
struct Run {
    int64_t first, end;

    __device__ Run(const Shape &shape, int64_t block)
        : first(smaller(shape.rows, block * shape.rows_per_block)),
          end(smaller(shape.rows, first + shape.rows_per_block)) {}

    __device__ bool empty() const { return first == end; }
    __device__ int first_grove(const int *group_N) const { return group_N ? group_N[first] : 0; }
    __device__ int last_grove(const int *group_N) const { return group_N ? group_N[end - 1] : 0; }

    // The first row from `row` on that is not of the grove; all threads of the block take part.
    __device__ int64_t end_of(int grove, int64_t row, const int *group_N) const {
        if (!group_N) return end;
        int same, threads = blockDim.x;
        do {
            int64_t mine = row + threadIdx.x;
            same = __syncthreads_count(mine < end && group_N[mine] == grove);
            row += same;
        } while (same == threads);
        return row;
    }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, bits);
    return x;
}

// The sum over the block, in a fixed order, at thread 0. scratch: a float a warp.
__device__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < blockDim.x / 32; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

// Every interval's polynomial of every edge, [J, COLUMNS]: lanes read neighbouring columns, which
// lie in different banks whatever their intervals are. Columns without an edge give 0.
__device__ void fill_table(Polynomial *table, float *staged_MP, const float *coef_MP,
                           const Grid &grid, int edges) {
    for (int i = threadIdx.x; i < edges * grid.size; i += blockDim.x) staged_MP[i] = coef_MP[i];
    __syncthreads();
    for (int i = threadIdx.x; i < grid.intervals * COLUMNS; i += blockDim.x) {
        int m = i % COLUMNS;
        table[i] = m < edges ? polynomial(staged_MP + m * grid.size, grid.size, i / COLUMNS)
                             : Polynomial{};
    }
    __syncthreads();
}

struct Row {
    Element h[SLOTS];

    __device__ Row(const Element *h_NM, int64_t row, int edges, int lane) {
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            h[s] = lane + 32 * s < edges ? h_NM[row * edges + lane + 32 * s] : from_float(0.f);
    }
};

__global__ void __launch_bounds__(THREADS, SLOTS <= 8 ? 2 : 1)
    edge_forward(const Element *h_NM, const float *coef_GMP, const float *scale_GM,
                 const float *range_G2, const int *group_N, const int64_t *given_NK,
                 float *value_NK, int64_t *index_NK, float *partial_B2, Shape shape) {
    SHARED_MEMORY(memory);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int edges = shape.edges, kept = shape.kept, size = shape.grid + DEGREE;
    auto *table = reinterpret_cast<Polynomial *>(memory);
    float *staged_MP = reinterpret_cast<float *>(table + (shape.grid + 2 * DEGREE) * COLUMNS);
    float energy = 0.f, outside = 0.f;
    Run run(shape, blockIdx.x);
    for (int64_t first = run.first, end; first < run.end; first = end) {
        int grove = group_N ? group_N[first] : 0;
        int64_t channel = int64_t(grove) * edges;
        end = run.end_of(grove, first, group_N);
        Grid grid(range_G2 + 2 * grove, shape.grid);
        fill_table(table, staged_MP, coef_GMP + channel * size, grid, edges);
        float scale[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; s++)
            scale[s] = scale_GM && lane + 32 * s < edges ? scale_GM[channel + lane + 32 * s] : 0.f;

        Row next(h_NM, smaller(first + warp, end - 1), edges, lane);
        for (int64_t row = first + warp; row < end; row += warps) {
            Row now = next;
            if (row + warps < end) next = Row(h_NM, row + warps, edges, lane);
            float e[SLOTS];
            uint32_t bits[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                int m = lane + 32 * s;
                float h = to_float(now.h[s]);
                Position at(h, grid);
                e[s] = horner(table[at.j * COLUMNS + m], at.t);
                e[s] += scale[s] * base_value(h, shape.base);
                energy += e[s] * e[s];
                outside += m < edges && grid.outside(h) ? 1.f : 0.f;
                bits[s] = __float_as_uint(e[s]) & 0x7fffffffu;
            }
            int column = 0;
            if (!given_NK)
                select_largest(bits, edges, kept, lane, column);
            else if (lane < kept)
                column = int(given_NK[row * kept + lane] - channel);
            float value = 0.f;
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                float theirs = __shfl_sync(WHOLE_WARP, e[s], column & 31);
                if (column / 32 == s) value = theirs;
            }
            if (lane < kept) {
                value_NK[row * kept + lane] = value;
                index_NK[row * kept + lane] = channel + column;
            }
        }
        __syncthreads();  // before the memory of the table is used again
    }
    float *scratch = reinterpret_cast<float *>(memory);
    energy = block_sum(energy, scratch);
    outside = block_sum(outside, scratch);
    if (threadIdx.x) return;
    partial_B2[2 * blockIdx.x] = energy;
    partial_B2[2 * blockIdx.x + 1] = outside;
}

// The blocks' partial sums, in a fixed order.
__global__ void finish_sums(const float *partial_B2, int blocks, float *energy, float *outside) {
    SHARED_MEMORY(memory);
    float *scratch = reinterpret_cast<float *>(memory), sum[2] = {0.f, 0.f};
    for (int block = threadIdx.x; block < blocks; block += blockDim.x)
        sum[0] += partial_B2[2 * block], sum[1] += partial_B2[2 * block + 1];
    sum[0] = block_sum(sum[0], scratch);
    sum[1] = block_sum(sum[1], scratch);
    if (threadIdx.x == 0) *energy = sum[0], *outside = sum[1];
}

// What a lane needs of its kept edge.
struct KeptEdge {
    int m = 0;
    float h = 0.f, dvalue = 0.f;

    __device__ KeptEdge(const float *dvalue_NK, const int64_t *index_NK, const Element *h_NM,
                        int64_t row, int64_t channel, const Shape &shape, int lane) {
        if (lane >= shape.kept) return;
        m = int(index_NK[row * shape.kept + lane] - channel);
        dvalue = dvalue_NK[row * shape.kept + lane];
        h = to_float(h_NM[row * shape.edges + m]);
    }
};

// dh of every row, and the block's sums of the gradients of coef and scale, [M, P + 1] a grove: a
// warp adds up its rows in its own copy, in their order (the edges of one row differ, so its lanes
// never meet), and the copies are added in the order of the warps. The sums of block b and grove g
// lie at place b + g: no two share one, for later blocks hold no earlier groves.
__global__ void __launch_bounds__(512)
    edge_backward(const float *dvalue_NK, const int64_t *index_NK, const Element *h_NM,
                  const float *coef_GMP, const float *scale_GM, const float *range_G2,
                  const int *group_N, Element *dh_NM, float *partial, Shape shape) {
    SHARED_MEMORY(memory);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int edges = shape.edges, size = shape.grid + DEGREE, sums = edges * (size + 1);
    float *all_sums = reinterpret_cast<float *>(memory);
    float *own_sums = all_sums + warp * sums, *dense = all_sums + warps * sums + warp * COLUMNS;
    Run run(shape, blockIdx.x);
    if (run.empty()) return;
    int64_t first = run.first, end;
    int last_grove = run.last_grove(group_N);
    for (int grove = run.first_grove(group_N); grove <= last_grove; grove++, first = end) {
        int64_t channel = int64_t(grove) * edges;
        end = run.end_of(grove, first, group_N);
        Grid grid(range_G2 + 2 * grove, shape.grid);
        for (int i = lane; i < sums; i += 32) own_sums[i] = 0.f;
        for (int64_t row = first + warp; row < end; row += warps) {
            KeptEdge edge(dvalue_NK, index_NK, h_NM, row, channel, shape, lane);
            for (int m = lane; m < edges; m += 32) dense[m] = 0.f;
            __syncwarp();
            if (lane < shape.kept) {
                Position at(edge.h, grid);
                int64_t number = channel + edge.m;
                auto piece = polynomial(coef_GMP + number * size, size, at.j);
                float slope = at.inside ? horner_slope(piece, at.t) * grid.per_unit : 0.f;
                if (scale_GM) slope += scale_GM[number] * base_slope(edge.h, shape.base);
                dense[edge.m] = edge.dvalue * slope;
                float *mine = own_sums + edge.m * (size + 1);
#pragma unroll
                for (int q = 0; q < POWERS; q++) {
                    int p = at.j - DEGREE + q;
                    if (p >= 0 && p < size) mine[p] += edge.dvalue * basis_at(q, at.t);
                }
                mine[size] += edge.dvalue * base_value(edge.h, shape.base);
            }
            __syncwarp();
            for (int m = lane; m < edges; m += 32) dh_NM[row * edges + m] = from_float(dense[m]);
        }
        __syncthreads();
        float *place = partial + (int64_t(blockIdx.x) + grove) * sums;
        for (int i = threadIdx.x; i < sums; i += blockDim.x) {
            float sum = 0.f;
            for (int w = 0; w < warps; w++) sum += all_sums[w * sums + i];
            place[i] = sum;
        }
        __syncthreads();
    }
}

// The gradients of coef [M, P] and scale [M] of grove blockIdx.y: its blocks' sums in their order,
// REDUCE_ROWS interleaved runs of blocks at a time.
__global__ void edge_reduce(const float *partial, const int *group_N, float *dcoef_GMP,
                            float *dscale_GM, int blocks, Shape shape) {
    SHARED_MEMORY(memory);
    float *scratch = reinterpret_cast<float *>(memory);
    int size = shape.grid + DEGREE, sums = shape.edges * (size + 1);
    int i = blockIdx.x * 32 + threadIdx.x, grove = blockIdx.y;
    float sum = 0.f;
    for (int block = threadIdx.y; i < sums && block < blocks; block += REDUCE_ROWS) {
        Run run(shape, block);
        if (!run.empty() && run.first_grove(group_N) <= grove && grove <= run.last_grove(group_N))
            sum += partial[(int64_t(block) + grove) * sums + i];
    }
    scratch[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || i >= sums) return;
    for (int y = 1; y < REDUCE_ROWS; y++) sum += scratch[y * 32 + threadIdx.x];
    int64_t number = int64_t(grove) * shape.edges + i / (size + 1);
    int p = i % (size + 1);
    if (p < size)
        dcoef_GMP[number * size + p] = sum;
    else if (dscale_GM)
        dscale_GM[number] = sum;
}

static Shape make_shape(int64_t rows, int64_t blocks, int64_t edges, int64_t grid, int64_t kept,
                        int64_t base) {
    return {rows, divide_up(rows, blocks), int(edges), int(grid), int(kept), int(base)};
}

// Bytes of shared memory of a forward block, and of a backward warp.
extern "C" int64_t edge_forward_shared(int64_t edges, int64_t grid) {
    return (grid + 2 * DEGREE) * COLUMNS * sizeof(Polynomial) + edges * (grid + DEGREE) * 4;
}
extern "C" int64_t edge_backward_shared(int64_t edges, int64_t grid) {
    return (edges * (grid + DEGREE + 1) + COLUMNS) * 4;
}

extern "C" const char *edge_topk_forward(const Element *h, const float *coef, const float *scale,
                                         const float *range, const int *group,
                                         const int64_t *given, float *value, int64_t *index,
                                         float *partial, float *energy, float *outside,
                                         int64_t rows, int64_t blocks, int64_t edges, int64_t grid,
                                         int64_t kept, int64_t base, cudaStream_t stream) {
    Shape shape = make_shape(rows, blocks, edges, grid, kept, base);
    size_t shared = larger<size_t>(edge_forward_shared(edges, grid), THREADS / 32 * 4);
    const char *failure =
        launch(edge_forward, dim3(blocks), dim3(THREADS), shared, stream, h, coef, scale, range,
               group, given, value, index, partial, shape);
    if (failure) return failure;
    return launch(finish_sums, dim3(1), dim3(FINISH_THREADS), FINISH_THREADS / 32 * 4, stream,
                  partial, int(blocks), energy, outside);
}

extern "C" const char *edge_topk_backward(const float *dvalue, const int64_t *index,
                                          const Element *h, const float *coef, const float *scale,
                                          const float *range, const int *group, Element *dh,
                                          float *partial, float *dcoef, float *dscale, int64_t rows,
                                          int64_t blocks, int64_t warps, int64_t groves,
                                          int64_t edges, int64_t grid, int64_t kept, int64_t base,
                                          cudaStream_t stream) {
    Shape shape = make_shape(rows, blocks, edges, grid, kept, base);
    const char *failure = launch(edge_backward, dim3(blocks), dim3(32 * warps),
                                 warps * edge_backward_shared(edges, grid), stream, dvalue, index,
                                 h, coef, scale, range, group, dh, partial, shape);
    if (failure) return failure;
    dim3 tiles(divide_up<int64_t>(edges * (grid + DEGREE + 1), 32), groves);
    return launch(edge_reduce, tiles, dim3(32, REDUCE_ROWS), 32 * REDUCE_ROWS * 4, stream, partial,
                  group, dcoef, dscale, int(blocks), shape);
}
