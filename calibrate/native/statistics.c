/* Statistics of layer inputs, in one pass over the rows of a tensor.

A row is summed in float64 in GROUP lanes: lane i adds the elements i, i + GROUP, i + 2 GROUP and so on, then lane i adds
lane i + 8, then lane i + 4, i + 2 and i + 1. So a row's sums depend on the row alone: not on the other rows, on the
number of threads or on the target. The square of a float32 is exact in float64. Extremes are the same in any order. */

#include "vectors.h"

enum { GROUP = 16, PARALLEL = 1 << 17, TOGETHER = 8 }; /* lanes of a sum; values worth threads; rows read side by side */

#ifdef __AVX512F__
INLINE doubles lower(floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
INLINE doubles upper(floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#else
INLINE doubles lower(floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
INLINE doubles upper(floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
#endif
enum { STEP = GROUP / LANES, PARTS = 2 * STEP }; /* vectors of floats, and of doubles, in a group */

/* A tensor (batch, rows, columns) of `type`, with stride 1 in the last dimension; kernels.py has the same struct. */
typedef struct {
    const void *data;
    int64_t batch, rows, columns, batch_stride, row_stride;
    int32_t type, threads;
} Rows;

/* The extremes of what one thread has read; `bad` is NaN in a lane that has read a number that is not finite. There is
   one for each vector of a group, so that instructions need not wait for each other. */
typedef struct {
    floats low, high, bad;
} Ends;

typedef struct {
    doubles sums[PARTS], squares[PARTS];
} Sums;

INLINE const void *row_at(const Rows *x, int64_t row) {
    int64_t at = row / x->rows * x->batch_stride + row % x->rows * x->row_stride;
    return (const char *)x->data + at * bytes_of(x->type);
}

INLINE int threads_for(const Rows *x) { return x->batch * x->rows * x->columns < PARALLEL ? 1 : x->threads; }

INLINE void add_ends(Ends *ends, floats x, int checking) {
    ends->low = V(min_ps)(x, ends->low);
    ends->high = V(max_ps)(x, ends->high);
    if (checking) ends->bad = V(fmadd_ps)(x, V(setzero_ps)(), ends->bad);
}

INLINE int all_finite(floats bad) {
    float lanes[LANES], sum = 0.f;
    V(storeu_ps)(lanes, bad);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum == 0.f;
}

INLINE void add_group(Sums *sums, const floats *x) {
    for (int i = 0; i < STEP; i++) {
        doubles halves[2] = {lower(x[i]), upper(x[i])};
        for (int half = 0; half < 2; half++) {
            int part = 2 * i + half;
            sums->sums[part] = V(add_pd)(sums->sums[part], halves[half]);
            sums->squares[part] = V(fmadd_pd)(halves[half], halves[half], sums->squares[part]);
        }
    }
}

INLINE double total_of(const doubles *parts) {
    double lanes[GROUP];
    for (int part = 0; part < PARTS; part++) V(storeu_pd)(lanes + part * (GROUP / PARTS), parts[part]);
    for (int half = GROUP / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Reads a row: its extremes into `ends` and, where `sums` is not NULL, its sum and its sum of squares. */
INLINE void read_row_of(const void *x, int type, long n, Ends *ends, double *sum, double *square) {
    Sums sums = {0};
    floats group[STEP];
    long whole = n / GROUP * GROUP;
    for (long i = 0; i < whole; i += GROUP) {
        for (int step = 0; step < STEP; step++) {
            group[step] = read_lanes(x, type, i + step * LANES);
            add_ends(ends + step, group[step], !sum);
        }
        if (sum) add_group(&sums, group);
    }
    if (whole < n) {
        float last[GROUP] = {0}, same[GROUP];
        read_row(last, (const char *)x + whole * bytes_of(type), type, n - whole);
        for (int i = 0; i < GROUP; i++) same[i] = last[least(i, n - whole - 1)];
        for (int step = 0; step < STEP; step++) {
            group[step] = V(loadu_ps)(last + step * LANES);
            add_ends(ends + step, V(loadu_ps)(same + step * LANES), !sum);
        }
        if (sum) add_group(&sums, group);
    }
    if (sum) *sum = total_of(sums.sums), *square = total_of(sums.squares);
}

/* Reads rows into `ends`, and returns whether the squares, where they are summed, are finite: those of all finite numbers
   are, in float64. */
INLINE int read_rows(const Rows *x, int type, int64_t from, int64_t to, Ends *ends, double *sums, double *squares) {
    int finite = 1;
    if (!sums && x->row_stride == x->columns && x->batch_stride == x->rows * x->columns) { /* read as a single row */
        if (from < to) read_row_of(row_at(x, from), type, (to - from) * x->columns, ends, 0, 0);
        return finite;
    }
    for (int64_t row = from; row < to; row++) {
        if (sums) {
            read_row_of(row_at(x, row), type, x->columns, ends, sums + row, squares + row);
            finite &= isfinite(squares[row]) != 0;
        } else {
            read_row_of(row_at(x, row), type, x->columns, ends, 0, 0);
        }
    }
    return finite;
}

/* Writes the smallest and the largest number to `extremes` and, where `sums` is not NULL, the sum of each row to `sums`
   and its sum of squares to `squares`. Returns whether all numbers are finite; otherwise the results are undefined. */
int OF(row_statistics)(const Rows *x, float *extremes, double *sums, double *squares) {
    int64_t rows = x->batch * x->rows;
    float low = INFINITY, high = -INFINITY;
    int finite = 1, parts = threads_for(x);
#pragma omp parallel for num_threads(parts) reduction(min : low) reduction(max : high) reduction(& : finite)
    for (int part = 0; part < parts; part++) {
        int64_t from = rows * part / parts, to = rows * (part + 1) / parts;
        Ends ends[STEP];
        for (int i = 0; i < STEP; i++) ends[i] = (Ends){V(set1_ps)(INFINITY), V(set1_ps)(-INFINITY), V(setzero_ps)()};
        if (x->type == FLOAT32) finite &= read_rows(x, FLOAT32, from, to, ends, sums, squares);
        else if (x->type == BFLOAT16) finite &= read_rows(x, BFLOAT16, from, to, ends, sums, squares);
        else finite &= read_rows(x, FLOAT16, from, to, ends, sums, squares);
        for (int i = 0; i < STEP; i++) {
            low = fminf(low, -largest_of(V(sub_ps)(V(setzero_ps)(), ends[i].low)));
            high = fmaxf(high, largest_of(ends[i].high));
            finite &= all_finite(ends[i].bad);
        }
    }
    extremes[0] = low + 0.f; /* turns -0.0 into 0.0 */
    extremes[1] = high + 0.f;
    return finite;
}

/* Reads the columns `from` to `to` of TOGETHER rows into the extremes of these columns. */
INLINE void read_columns(const void **rows, int type, long from, long to, float *low, float *high, floats *bad) {
    for (long i = from; i < to; i += LANES) {
        Ends even = {V(loadu_ps)(low + i), V(loadu_ps)(high + i), bad[0]}, odd = {even.low, even.high, bad[1]};
        for (int row = 0; row < TOGETHER; row += 2) {
            add_ends(&even, read_lanes(rows[row], type, i), 1);
            add_ends(&odd, read_lanes(rows[row + 1], type, i), 1);
        }
        V(storeu_ps)(low + i, V(min_ps)(even.low, odd.low));
        V(storeu_ps)(high + i, V(max_ps)(even.high, odd.high));
        bad[0] = even.bad, bad[1] = odd.bad;
    }
}

INLINE void read_column(const void **rows, int type, long i, float *low, float *high, floats *bad) {
    for (int row = 0; row < TOGETHER; row++) {
        float x;
        read_row(&x, (const char *)rows[row] + i * bytes_of(type), type, 1);
        low[i] = x < low[i] ? x : low[i];
        high[i] = x > high[i] ? x : high[i];
        *bad = V(fmadd_ps)(V(set1_ps)(x), V(setzero_ps)(), *bad);
    }
}

INLINE int read_strip(const Rows *x, int type, long from, long to, float *low, float *high) {
    int64_t rows = x->batch * x->rows;
    long whole = from + (to - from) / LANES * LANES;
    floats bad[2] = {V(setzero_ps)(), V(setzero_ps)()};
    for (long i = from; i < to; i++) low[i] = INFINITY, high[i] = -INFINITY;
    for (int64_t row = 0; row < rows; row += TOGETHER) {
        const void *at[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) at[i] = row_at(x, least(row + i, rows - 1));
        read_columns(at, type, from, whole, low, high, bad);
        for (long i = whole; i < to; i++) read_column(at, type, i, low, high, bad);
    }
    for (long i = from; i < to; i++) low[i] += 0.f, high[i] += 0.f; /* turns -0.0 into 0.0 */
    return all_finite(bad[0]) && all_finite(bad[1]);
}

/* Writes the smallest and the largest number of each column. Returns whether all numbers are finite; otherwise the
   results are undefined. */
int OF(column_extremes)(const Rows *x, float *low, float *high) {
    int finite = 1, parts = threads_for(x);
    long strip = up((x->columns + parts - 1) / parts, 4 * LANES);
#pragma omp parallel for num_threads(parts) reduction(& : finite)
    for (int part = 0; part < parts; part++) {
        long from = least(part * strip, x->columns), to = least(from + strip, x->columns);
        if (x->type == FLOAT32) finite &= read_strip(x, FLOAT32, from, to, low, high);
        else if (x->type == BFLOAT16) finite &= read_strip(x, BFLOAT16, from, to, low, high);
        else finite &= read_strip(x, FLOAT16, from, to, low, high);
    }
    return finite;
}

/* Adds `count` finite numbers, exactly, to bins of integers: a number is sign * (high * 2**26 + low) * 2**(e - 1075) for
   its exponent e, from 1 to 2046. Adds sign * low to bins[2 e], and sign * high to bins[2 e + 1]. */
void OF(add_exactly)(const double *x, int64_t count, int64_t *bins) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits;
        memcpy(&bits, x + i, sizeof bits);
        int64_t exponent = bits >> 52 & 2047, mantissa = bits & ((1ull << 52) - 1), sign = bits >> 63 ? -1 : 1;
        if (exponent) mantissa |= 1ll << 52;
        else exponent = 1; /* a subnormal number, or zero */
        bins[2 * exponent] += sign * (mantissa & ((1 << 26) - 1));
        bins[2 * exponent + 1] += sign * (mantissa >> 26);
    }
}
