/* Linear layers on codes, with exact 32-bit sums. */

#include "products.h"

enum {
    DEPTH = 512, /* inputs that are multiplied at a time, so that the weight's part of a tile stays in the cache */
    PANELS = 8, /* most times COLUMNS columns that are computed together: rows are read from memory once for all of them */
    FEW = 64, /* with fewer rows, the weight is read as it lies: interleaving it would take as long as the products */
};

enum { NONE, EXACT, TANH }; /* GELU of the output: none, or by the formula that torch calls "none" or "tanh" */

typedef struct {
    const uint8_t *codes; /* (rows, in): codes of the input, plus 128 */
    const int8_t *weight; /* (out, in) */
    const int32_t *offset; /* (out), added to the sums; NULL: 0 */
    const float *scale; /* (out) */
    void *y; /* (rows, out) */
    int64_t rows, in, out;
    int32_t type, gelu; /* of y */
} Linear;

/* Returns 2 ** x for |x| <= 126, with a relative error of 1e-7: the Taylor polynomial of degree 7 about 0, on the
   distance to the nearest whole number. */
INLINE floats exp2_of(floats x) {
    floats whole = floor_of(V(add_ps)(x, V(set1_ps)(.5f))), part = V(sub_ps)(x, whole), y = V(set1_ps)(1.5252734e-5f);
    y = V(fmadd_ps)(y, part, V(set1_ps)(1.5403530e-4f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(1.3333558e-3f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(9.6181291e-3f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(5.5504109e-2f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(2.4022651e-1f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(6.9314718e-1f));
    y = V(fmadd_ps)(y, part, V(set1_ps)(1));
    return as_floats(V(add_epi32)(as_ints(y), V(slli_epi32)(V(cvtps_epi32)(whole), 23)));
}

INLINE floats clamped(floats x, float limit) {
    return V(max_ps)(V(min_ps)(x, V(set1_ps)(limit)), V(set1_ps)(-limit));
}

/* Returns x / (1 + exp(-2 u)), which is x (1 + tanh(u)) / 2, with u = sqrt(2 / pi) (x + 0.044715 x ** 3). */
INLINE floats gelu_by_tanh(floats x) {
    floats u = V(fmadd_ps)(V(mul_ps)(x, x), V(set1_ps)(0.044715f), V(set1_ps)(1));
    floats exponent = V(mul_ps)(V(mul_ps)(x, u), V(set1_ps)(-2.3022082f)); /* -2 sqrt(2 / pi) log2(e) u */
    return V(div_ps)(x, V(add_ps)(V(set1_ps)(1), exp2_of(clamped(exponent, 126))));
}

/* Returns x (1 + erf(x / sqrt(2))) / 2. The error function has an error of 1.5e-7: formula 7.1.26 of Abramowitz and
   Stegun, Handbook of Mathematical Functions, 1964. */
INLINE floats gelu_exactly(floats x) {
    const floats one = V(set1_ps)(1);
    floats z = clamped(V(mul_ps)(x, V(set1_ps)(0.70710678f)), 9);
    floats size = V(max_ps)(z, V(sub_ps)(V(set1_ps)(0), z));
    floats t = V(div_ps)(one, V(fmadd_ps)(size, V(set1_ps)(0.3275911f), one)), sum = V(set1_ps)(1.061405429f);
    sum = V(fmadd_ps)(sum, t, V(set1_ps)(-1.453152027f));
    sum = V(fmadd_ps)(sum, t, V(set1_ps)(1.421413741f));
    sum = V(fmadd_ps)(sum, t, V(set1_ps)(-0.284496736f));
    sum = V(fmadd_ps)(sum, t, V(set1_ps)(0.254829592f));
    floats tail = V(mul_ps)(V(mul_ps)(sum, t), exp2_of(V(mul_ps)(V(mul_ps)(z, z), V(set1_ps)(-1.4426950f))));
    /* half of 1 - erf(|z|) is half of `tail` */
    floats half = V(mul_ps)(V(set1_ps)(.5f), tail), positive = V(max_ps)(x, V(set1_ps)(0));
    return V(fmadd_ps)(V(sub_ps)(x, V(add_ps)(positive, positive)), half, positive);
}

/* Writes y = (sum + offset) * scale, or GELU of it, for LANES columns of row i from column n on, or fewer at the end of
   a row. */
INLINE void finish(const Linear *l, long i, long n, ints sum) {
    const long some = least(LANES, l->out - n);
    int32_t offset[LANES] = {0};
    float scale[LANES] = {0};
    if (some < LANES) {
        memcpy(scale, l->scale + n, some * sizeof *scale);
        if (l->offset) memcpy(offset, l->offset + n, some * sizeof *offset);
    }
    if (l->offset) sum = V(add_epi32)(sum, read_ints(some < LANES ? offset : l->offset + n));
    floats y = V(mul_ps)(V(cvtepi32_ps)(sum), V(loadu_ps)(some < LANES ? scale : l->scale + n));
    if (l->gelu == TANH) y = gelu_by_tanh(y);
    if (l->gelu == EXACT) y = gelu_exactly(y);
    void *to = (char *)l->y + (i * l->out + n) * bytes_of(l->type);
    if (some == LANES) write_lanes(to, l->type, 0, y);
    else V(storeu_ps)(scale, y), write_row(to, l->type, scale, some);
}

/* Returns the length of a row of codes in memory, padded with zeros. */
INLINE long row_of(const Linear *l) { return up(l->in, 2 * LANES); }

/* Interleaves `some` inputs from `from` of up to COLUMNS rows of the weight, from row n on, as add_tile reads them. */
static void interleave(int16_t *to, const Linear *l, long n, long from, long some) {
    const long columns = least(COLUMNS, l->out - n), pairs = some / 2;
    if (columns < COLUMNS) memset(to, 0, sizeof *to * up(some, 2) * COLUMNS);
    for (long j = 0; j < columns; j++) {
        const int8_t *row = l->weight + (n + j) * l->in + from;
        int16_t *at = to + 2 * j;
        for (long k = 0; k < pairs; k++) {
            int32_t pair = (uint16_t)row[2 * k] | (uint32_t)(uint16_t)row[2 * k + 1] << 16;
            memcpy(at + k * 2 * COLUMNS, &pair, sizeof pair);
        }
        if (some % 2) at[pairs * 2 * COLUMNS] = row[some - 1], at[pairs * 2 * COLUMNS + 1] = 0;
    }
}

/* Multiplies up to DEPTH inputs of HIGH rows, from row i on, with the weight of the columns from n on. Sums are kept in
   `sums`, except those of the `last` inputs of a row, which are finished. */
INLINE void sum_tile(const Linear *l, long i, long n, int32_t *sums, const int16_t *rows, const int16_t *panel,
                     long pairs, int first, int last, const int vectors) {
    ints sum[HIGH][WIDE];
    for (int k = 0; k < HIGH; k++)
        for (int j = 0; j < vectors; j++)
            sum[k][j] = first ? V(set1_epi32)(0) : read_ints(sums + k * COLUMNS + j * LANES);
    add_tile(sum, rows, row_of(l), 2, panel, 2 * COLUMNS, pairs, vectors);
    int32_t tile[HIGH * COLUMNS];
    if (last) sums = tile;
    for (int k = 0; k < HIGH; k++)
        for (int j = 0; j < vectors; j++) write_ints(sums + k * COLUMNS + j * LANES, sum[k][j]);
    for (long k = 0; last && k < least(HIGH, l->rows - i); k++)
        for (long j = 0; j < vectors; j++) finish(l, i + k, n + j * LANES, read_ints(sums + k * COLUMNS + j * LANES));
}

/* Computes up to `panels` times COLUMNS columns of y, from column n on, for many rows. */
static void many_rows(const Linear *l, const int16_t *rows, long n, long panels, int16_t *panel, int32_t *sums) {
    const long row = row_of(l), high = up(l->rows, HIGH), end = least(panels * COLUMNS, l->out - n);
    for (long from = 0; from < l->in; from += DEPTH) {
        const long some = least(DEPTH, l->in - from), pairs = (some + 1) / 2;
        for (long j = 0; j < end; j += COLUMNS) interleave(panel + j * DEPTH, l, n + j, from, some);
        for (long i = 0; i < high; i += HIGH)
            for (long j = 0; j < end; j += COLUMNS)
                BY_VECTORS(least(COLUMNS, end - j), sum_tile, l, i, n + j, sums + j * high + i * COLUMNS,
                           rows + i * row + from, panel + j * DEPTH, pairs, from == 0, from + some == l->in)
    }
}

/* Computes the sums of one output channel for HIGH rows, whose inputs are padded with zeros. */
INLINE void dot(int32_t *sums, const int16_t *rows, long row, const int8_t *weight, long in) {
    ints sum[HIGH];
    for (int i = 0; i < HIGH; i++) sum[i] = V(set1_epi32)(0);
    for (long k = 0; k < in; k += 2 * LANES) {
        int8_t last[2 * LANES] = {0};
        if (in - k < 2 * LANES) memcpy(last, weight + k, in - k);
        ints right = V(cvtepi8_epi16)(read_halves(in - k < 2 * LANES ? last : weight + k));
        for (int i = 0; i < HIGH; i++) sum[i] = add_products(sum[i], read_ints(rows + i * row + k), right);
    }
    for (int i = 0; i < HIGH; i++) sums[i] = sum_of(sum[i]);
}

/* Computes up to COLUMNS columns of y, from column n on, for few rows. */
static void few_rows(const Linear *l, const int16_t *rows, long n) {
    const long row = row_of(l), columns = least(COLUMNS, l->out - n);
    for (long i = 0; i < l->rows; i += HIGH) {
        int32_t sums[HIGH], by_row[HIGH][COLUMNS] = {0};
        for (long j = 0; j < columns; j++) {
            dot(sums, rows + i * row, row, l->weight + (n + j) * l->in, l->in);
            for (int k = 0; k < HIGH; k++) by_row[k][j] = sums[k];
        }
        for (long k = 0; k < least(HIGH, l->rows - i); k++)
            for (long j = 0; j < columns; j += LANES) finish(l, i + k, n + j, read_ints(by_row[k] + j));
    }
}

/* Computes y = ((codes - 128) @ weight.T + offset) * scale, or GELU of it. Returns whether there was memory for it. */
int OF(linear)(const Linear *l, int threads) {
    const long row = row_of(l), size = up(2 * up(l->rows, HIGH) * row, 64);
    /* as many panels together as leave each thread several parts of the work */
    const long panels = l->rows < FEW ? 1 : least(PANELS, 1 + l->out / (4 * COLUMNS * threads));
    const long of_thread = l->rows < FEW ? 0 : up(panels * COLUMNS * (2 * DEPTH + 4 * up(l->rows, HIGH)), 64);
    char *memory = aligned_alloc(64, size + threads * of_thread);
    if (!memory) return 0;
    int16_t *rows = (int16_t *)memory;
#pragma omp parallel num_threads(threads) if (l->rows * l->in * l->out > 1 << 16)
    {
        int16_t *panel = (int16_t *)(memory + size + omp_get_thread_num() * of_thread);
#pragma omp for
        for (long i = 0; i < up(l->rows, HIGH); i++) {
            for (long k = 0; k < l->in && i < l->rows; k++) rows[i * row + k] = l->codes[i * l->in + k] - 128;
            const long from = i < l->rows ? l->in : 0;
            memset(rows + i * row + from, 0, sizeof *rows * (row - from));
        }
#pragma omp for schedule(dynamic)
        for (long n = 0; n < l->out; n += panels * COLUMNS)
            if (l->rows < FEW) few_rows(l, rows, n);
            else many_rows(l, rows, n, panels, panel, (int32_t *)(panel + panels * DEPTH * COLUMNS));
    }
    free(memory);
    return 1;
}
