// The k largest of a row of magnitudes spread over a warp; lane i holds columns i + 32 * slot.
// The order is that of kalmagrove.nn.routing.largest: descending by the bits of |E|, of equal ones
// the lower column first. SLOTS, columns a lane, is a constant of the build.
#pragma once

#include "common.cuh"

constexpr int row_mask() {
    int mask = 31;
    while (mask < 32 * SLOTS - 1) mask = 2 * mask + 1;
    return mask;
}
constexpr uint32_t COLUMN = row_mask();  // the bits of a column number

// Every lane's keys, descending: an insertion sort whose comparisons do not depend on the keys.
__device__ __forceinline__ void sort_descending(uint32_t (&key)[SLOTS]) {
#pragma unroll
    for (int i = 1; i < SLOTS; i++)
#pragma unroll
        for (int j = i; j > 0; j--) {
            uint32_t a = key[j - 1], b = key[j];
            key[j - 1] = larger(a, b), key[j] = smaller(a, b);
        }
}

// One key of 32 bits holds the upper bits of |E| and the column, so a round is one warp maximum.
// Lane r receives the column of place r. False if two of the first kept + 1 keys agree in all bits
// they hold of |E|: then their order is not known.
__device__ __forceinline__ bool select_by_key(const uint32_t (&bits)[SLOTS], int edges, int kept,
                                              int lane, int &column) {
    uint32_t key[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        uint32_t m = lane + 32 * s;
        key[s] = m < edges ? (bits[s] & ~COLUMN) | (COLUMN - m) : 0;
    }
    sort_descending(key);
    uint32_t last = ~0u;  // no magnitude has the sign bit
    bool known = true;
    for (int place = 0; place < smaller(kept + 1, edges); place++) {
        uint32_t best = __reduce_max_sync(WHOLE_WARP, key[0]);
        known &= (best ^ last) > COLUMN;
        last = best;
        if (lane == place) column = COLUMN - (best & COLUMN);
        if (key[0] == best) {
#pragma unroll
            for (int s = 0; s + 1 < SLOTS; s++) key[s] = key[s + 1];
            key[SLOTS - 1] = 0;
        }
    }
    return known;
}

// The same by all bits: two warp operations a place.
__device__ inline void select_exactly(const uint32_t (&bits)[SLOTS], int edges, int kept, int lane,
                                      int &column) {
    uint32_t taken = 0;
    for (int place = 0; place < kept; place++) {
        uint32_t top = 0, mine = ~0u;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            uint32_t m = lane + 32 * s;
            bool better = m < edges && !(taken >> s & 1) && bits[s] + 1 > top;
            if (better) top = bits[s] + 1, mine = m;
        }
        uint32_t best = __reduce_max_sync(WHOLE_WARP, top);
        uint32_t winner = __reduce_min_sync(WHOLE_WARP, top == best ? mine : ~0u);
        if (lane == place) column = winner;
        if (winner % 32 == lane) taken |= 1u << (winner / 32);
    }
}

__device__ __forceinline__ void select_largest(const uint32_t (&bits)[SLOTS], int edges, int kept,
                                               int lane, int &column) {
    if (!select_by_key(bits, edges, kept, lane, column))
        select_exactly(bits, edges, kept, lane, column);
}
