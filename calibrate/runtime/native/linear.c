/* Linear layers on codes, with exact 32-bit sums. */

#include "products.h"

enum {
    DEPTH = 512, /* inputs that are multiplied at a time, so that the weight's part of a tile stays in the cache */
    FEW = 64, /* with fewer rows, the weight is read as it lies: interleaving it would take as long as the products */
};

typedef struct {
    const uint8_t *codes; /* (rows, in): codes of the input, plus 128 */
    const int8_t *weight; /* (out, in) */
    const int32_t *offset; /* (out), added to the sums; NULL: 0 */
    const float *scale; /* (out) */
    void *y; /* (rows, out) */
    int64_t rows, in, out;
    int32_t type; /* of y */
} Linear;

/* The memory that all threads share, and that of one thread. */
INLINE long row_of(const Linear *l) { return up(l->in, 2 * LANES); }
INLINE long of_rows(const Linear *l) { return up(2 * up(l->rows, HIGH) * row_of(l), 64); }
INLINE long of_thread(const Linear *l) { return up(2 * DEPTH * COLUMNS + 4 * up(l->rows, HIGH) * COLUMNS, 64); }

/* Returns the bytes of scratch memory that `linear` needs. */
long OF(linear_scratch)(const Linear *l, int threads) { return 64 + of_rows(l) + threads * of_thread(l); }

/* Writes y = (sum + offset) * scale for `some` columns, at most LANES, of row i, from column n on. */
INLINE void finish(const Linear *l, long i, long n, long some, const int32_t *sums) {
    int32_t all[LANES] = {0}, offset[LANES] = {0};
    float scale[LANES] = {0};
    if (some < LANES) {
        memcpy(all, sums, some * sizeof *sums), memcpy(scale, l->scale + n, some * sizeof *scale);
        if (l->offset) memcpy(offset, l->offset + n, some * sizeof *offset);
    }
    const int whole = some == LANES;
    ints sum = read_ints(whole ? sums : all);
    if (l->offset) sum = V(add_epi32)(sum, read_ints(whole ? l->offset + n : offset));
    floats y = V(mul_ps)(V(cvtepi32_ps)(sum), V(loadu_ps)(whole ? l->scale + n : scale));
    void *to = (char *)l->y + (i * l->out + n) * bytes_of(l->type);
    if (whole) write_lanes(to, l->type, 0, y);
    else V(storeu_ps)(scale, y), write_row(to, l->type, scale, some);
}

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

INLINE void sum_tile(int32_t *sums, const int16_t *rows, long row, const int16_t *panel, long pairs, int more,
                     const int vectors) {
    ints sum[HIGH][WIDE];
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < vectors; j++)
            sum[i][j] = more ? read_ints(sums + i * COLUMNS + j * LANES) : V(set1_epi32)(0);
    add_tile(sum, rows, row, panel, 2 * COLUMNS, pairs, vectors);
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < vectors; j++) write_ints(sums + i * COLUMNS + j * LANES, sum[i][j]);
}

/* Computes up to COLUMNS columns of y, from column n on, for many rows. */
static void many_rows(const Linear *l, const int16_t *rows, long n, int16_t *panel, int32_t *sums) {
    const long row = row_of(l), columns = least(COLUMNS, l->out - n);
    for (long from = 0; from < l->in; from += DEPTH) {
        const long some = least(DEPTH, l->in - from), pairs = (some + 1) / 2;
        interleave(panel, l, n, from, some);
        for (long i = 0; i < l->rows; i += HIGH)
            BY_VECTORS(columns, sum_tile, sums + i * COLUMNS, rows + i * row + from, row, panel, pairs, from > 0)
    }
    for (long i = 0; i < l->rows; i++)
        for (long j = 0; j < columns; j += LANES)
            finish(l, i, n + j, least(LANES, columns - j), sums + i * COLUMNS + j);
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
        int32_t sums[COLUMNS][HIGH], by_row[HIGH][COLUMNS];
        for (long j = 0; j < columns; j++) {
            dot(sums[j], rows + i * row, row, l->weight + (n + j) * l->in, l->in);
            for (int k = 0; k < HIGH; k++) by_row[k][j] = sums[j][k];
        }
        for (long k = 0; k < least(HIGH, l->rows - i); k++)
            for (long j = 0; j < columns; j += LANES) finish(l, i + k, n + j, least(LANES, columns - j), by_row[k] + j);
    }
}

/* Computes y = ((codes - 128) @ weight.T + offset) * scale. */
void OF(linear)(const Linear *l, void *scratch, int threads) {
    char *memory = (char *)up((long)scratch, 64);
    int16_t *rows = (int16_t *)memory;
    const long row = row_of(l);
#pragma omp parallel num_threads(threads)
    {
        int16_t *panel = (int16_t *)(memory + of_rows(l) + omp_get_thread_num() * of_thread(l));
#pragma omp for
        for (long i = 0; i < up(l->rows, HIGH); i++) {
            for (long k = 0; k < l->in && i < l->rows; k++) rows[i * row + k] = l->codes[i * l->in + k] - 128;
            const long from = i < l->rows ? l->in : 0;
            memset(rows + i * row + from, 0, sizeof *rows * (row - from));
        }
#pragma omp for schedule(dynamic)
        for (long n = 0; n < l->out; n += COLUMNS)
            if (l->rows < FEW) few_rows(l, rows, n);
            else many_rows(l, rows, n, panel, (int32_t *)(panel + DEPTH * COLUMNS));
    }
}
