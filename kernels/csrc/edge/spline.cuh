// The arithmetic of one edge function, as in edge/reference.py: a B-spline on a uniform grid, one
// polynomial an interval, plus scale * base(h). DEGREE is a constant of the build.
// Letters: M edges, P = grid + DEGREE coefficients of an edge, J = grid + 2 * DEGREE intervals.
#pragma once

#include "common.cuh"

constexpr int POWERS = DEGREE + 1;
enum Base { NONE = 0, SILU = 1, IDENTITY = 2 };

// Row q: the powers of t in [0, 1) of the q-th basis function that is not zero on an interval, from
// N_n(x) = x/n N_{n-1}(x) + (n+1-x)/n N_{n-1}(x-1).
struct Pieces {
    double at[POWERS][POWERS] = {};
};

__host__ __device__ constexpr Pieces make_pieces() {
    Pieces now;
    now.at[0][0] = 1;
    for (int n = 1; n <= DEGREE; n++) {
        Pieces next;
        for (int s = 0; s <= n; s++)
            for (int power = 0; power < n; power++) {
                double up = s < n ? now.at[s][power] : 0, down = s > 0 ? now.at[s - 1][power] : 0;
                next.at[s][power] += (s * up + (n + 1 - s) * down) / n;
                next.at[s][power + 1] += (up - down) / n;
            }
        now = next;
    }
    Pieces rows;
    for (int q = 0; q <= DEGREE; q++)
        for (int power = 0; power <= DEGREE; power++) rows.at[q][power] = now.at[DEGREE - q][power];
    return rows;
}

// One interval's polynomial; of degree 1 and 3 one load from shared memory.
struct alignas(POWERS == 4 ? 16 : POWERS == 2 ? 8 : 4) Polynomial {
    float power[POWERS];
};

// Interval j of an edge overlaps the coefficients j - DEGREE + q; those outside 0..P-1 are 0.
__device__ __forceinline__ Polynomial polynomial(const float *coef_P, int size, int j) {
    constexpr Pieces pieces = make_pieces();
    Polynomial result = {};
#pragma unroll
    for (int q = 0; q < POWERS; q++) {
        int p = j - DEGREE + q;
        float coef = p >= 0 && p < size ? coef_P[p] : 0.f;
#pragma unroll
        for (int power = 0; power < POWERS; power++)
            result.power[power] += coef * float(pieces.at[q][power]);
    }
    return result;
}

__device__ __forceinline__ float horner(const Polynomial &polynomial, float t) {
    float value = polynomial.power[DEGREE];
#pragma unroll
    for (int power = DEGREE - 1; power >= 0; power--) value = value * t + polynomial.power[power];
    return value;
}

__device__ __forceinline__ float horner_slope(const Polynomial &polynomial, float t) {
    float slope = DEGREE * polynomial.power[DEGREE];
#pragma unroll
    for (int power = DEGREE - 1; power > 0; power--)
        slope = slope * t + power * polynomial.power[power];
    return slope;
}

// The q-th basis function that is not zero on an interval, at t.
__device__ __forceinline__ float basis_at(int q, float t) {
    constexpr Pieces pieces = make_pieces();
    float value = float(pieces.at[q][DEGREE]);
#pragma unroll
    for (int power = DEGREE - 1; power >= 0; power--)
        value = value * t + float(pieces.at[q][power]);
    return value;
}

// The range of a grove and its uniform grid.
struct Grid {
    float low, high, per_unit;
    int intervals, size;  // J, P

    __device__ Grid(const float *range, int grid)
        : low(range[0]), high(range[1]), per_unit(float(grid) / (range[1] - range[0])),
          intervals(grid + 2 * DEGREE), size(grid + DEGREE) {}

    __device__ bool outside(float h) const { return h < low || h > high; }
};

// Where h stands: in interval j at t; beyond the outermost intervals the value stays at their ends.
struct Position {
    int j;
    float t;
    bool inside;  // of the outermost intervals; beyond them the slope is 0

    __device__ Position(float h, const Grid &grid) {
        float u = (h - grid.low) * grid.per_unit, end = float(grid.intervals - DEGREE);
        inside = u >= float(-DEGREE) && u <= end;
        u = clamp_keeping_nan(u, float(-DEGREE), end) + float(DEGREE);
        j = larger(0, smaller(int(u), grid.intervals - 1));
        t = u - float(j);
    }
};

__device__ __forceinline__ float base_value(float h, int base) {
    return base == SILU ? __fdividef(h, 1.f + __expf(-h)) : base == IDENTITY ? h : 0.f;
}

__device__ __forceinline__ float base_slope(float h, int base) {
    float sigmoid = __fdividef(1.f, 1.f + __expf(-h));
    return base == SILU ? sigmoid * (1.f + h * (1.f - sigmoid)) : base == IDENTITY ? 1.f : 0.f;
}
