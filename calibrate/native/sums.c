/* Sums over the rows of an input, from exact products of 16-bit integers: what rounding methods such as GPTQ need.

The codes of an input x stand for xq = scale * steps, where steps = code - zero_point are whole numbers of a magnitude up
to STEPS. The error x - xq becomes integers of up to LEVELS with one scale for each column and BLOCK rows, so that sums
over BLOCK rows fit into int32. These sums are multiplied by their scale and added in float64. */

#include "products.h"

enum {
    BLOCK = 512, STEPS = 255, LEVELS = 16383, /* their product is less than 2 ** 31 */
    STRIPS = 16, /* strips of HIGH columns whose steps a thread multiplies with all columns, kept in its caches */
    PANEL = BLOCK * COLUMNS, GROUP = STRIPS * HIGH,
};

static const float TINY = 1e-30f; /* errors whose magnitudes are all smaller count as zero */

typedef struct {
    const float *steps, *errors; /* (rows, columns) */
    void *gram, *residual; /* (columns, columns): sums of xq xq^T, only right of the diagonal, and of xq (x - xq)^T */
    int64_t rows, columns;
    double scale;
    int32_t is_double; /* whether gram and residual are float64; otherwise they are float32 */
} Sums;

/* BLOCK rows of one input as integers, in panels of COLUMNS columns: (panels, BLOCK / 2, COLUMNS, 2), and for each column
   the number that the sums of the products of its integers with steps are multiplied by. */
typedef struct {
    int16_t *integers;
    double *factors;
} Packed;

INLINE long panels_of(const Sums *s) { return (s->columns + COLUMNS - 1) / COLUMNS; }

/* Sets the pointers in `memory` of the steps (0) and errors (1) of a block; returns the number of bytes. */
static long lay_out(const Sums *s, char *memory, Packed packed[2]) {
    char *at = memory;
    for (int i = 0; i < 2; i++) {
        packed[i].integers = (int16_t *)at, at += 2 * PANEL * panels_of(s);
        packed[i].factors = (double *)at, at += 8 * COLUMNS * panels_of(s);
    }
    return at - memory;
}

/* Reads LANES numbers, of which those from the index `count` on are zero. */
INLINE floats read_some(const float *from, long count) {
    float some[LANES] = {0};
    if (count >= LANES) return V(loadu_ps)(from);
    if (count > 0) memcpy(some, from, count * sizeof *some);
    return V(loadu_ps)(some);
}

/* Makes integers of `rows` rows, at most BLOCK, of LANES columns of which `count` exist: numbers * by, rounded. */
INLINE void pack_columns(int16_t *to, const float *from, long stride, long rows, long count, floats by) {
    for (long k = 0; k < rows; k += 2) {
        ints high = V(set1_epi32)(0), low = V(cvtps_epi32)(V(mul_ps)(read_some(from + k * stride, count), by));
        if (k + 1 < rows) high = V(cvtps_epi32)(V(mul_ps)(read_some(from + (k + 1) * stride, count), by));
        write_ints(to + k * COLUMNS, in_pairs(low, high));
    }
}

/* Makes integers of the errors, as pack_columns does, with up to LEVELS for the largest magnitude of each column. Sets
   `units` to the error that an integer of 1 stands for. */
INLINE void pack_errors(int16_t *to, double *units, const float *from, long stride, long rows, long count) {
    ints largest = V(set1_epi32)(0);
    for (long k = 0; k < rows; k++) largest = V(max_epi32)(largest, magnitudes(read_some(from + k * stride, count)));
    float most[LANES], by[LANES];
    V(storeu_ps)(most, as_floats(largest));
    for (int i = 0; i < LANES; i++) {
        by[i] = most[i] < TINY ? 0 : LEVELS / most[i];
        units[i] = most[i] < TINY ? 0 : (double)most[i] / LEVELS;
    }
    pack_columns(to, from, stride, rows, count, V(loadu_ps)(by));
}

/* Makes integers of the steps and errors in one panel of the block of `rows` rows that starts at `start`. */
static void pack_panel(const Sums *s, Packed packed[2], long start, long rows, long panel) {
    for (long j = 0; j < COLUMNS; j += LANES) {
        const long column = panel * COLUMNS + j, count = s->columns - column, from = start * s->columns + column;
        int16_t *to = packed[0].integers + panel * PANEL + 2 * j;
        double units[LANES];
        pack_columns(to, s->steps + from, s->columns, rows, count, V(set1_ps)(1));
        to = packed[1].integers + panel * PANEL + 2 * j;
        pack_errors(to, units, s->errors + from, s->columns, rows, count);
        for (int i = 0; i < LANES; i++) {
            packed[0].factors[column + i] = s->scale * s->scale;
            packed[1].factors[column + i] = s->scale * units[i];
        }
    }
}

/* Copies the packed steps of at most GROUP columns, from `first`, in strips of HIGH columns: (strips, pairs, HIGH, 2).
   Columns that do not exist become zeros. */
static void pack_left(const Sums *s, int16_t *left, const int16_t *steps, long first, long pairs) {
    for (long c = 0; c < GROUP; c++) {
        const long column = first + c, place = column / COLUMNS * PANEL + column % COLUMNS * 2;
        int16_t *to = left + c / HIGH * HIGH * 2 * pairs + c % HIGH * 2;
        for (long k = 0; k < pairs; k++)
            if (column < s->columns) memcpy(to + k * 2 * HIGH, steps + place + k * 2 * COLUMNS, 4);
            else memset(to + k * 2 * HIGH, 0, 4);
    }
}

/* Adds LANES / 2 sums * factors to `out`, float64 or float32, with one rounding to its type. */
INLINE void add_half(void *out, int is_double, const int32_t *sums, const double *factors) {
    const doubles by = V(loadu_pd)(factors), sum = V(cvtepi32_pd)(read_halves(sums));
    if (is_double) V(storeu_pd)(out, V(fmadd_pd)(sum, by, V(loadu_pd)(out)));
    else write_as_floats(out, V(fmadd_pd)(sum, by, read_as_doubles(out)));
}

/* out (count) += sums * factors, computed in float64; `out` is float64 or float32. */
INLINE void add_row(char *out, int is_double, const int32_t *sums, const double *factors, long count) {
    const long size = is_double ? 8 : 4, whole = count / (LANES / 2) * (LANES / 2);
    double last[LANES / 2] = {0};
    for (long j = 0; j < whole; j += LANES / 2) add_half(out + j * size, is_double, sums + j, factors + j);
    if (whole == count) return;
    memcpy(last, out + whole * size, (count - whole) * size);
    add_half(last, is_double, sums + whole, factors + whole);
    memcpy(out + whole * size, last, (count - whole) * size);
}

/* Adds the products of a strip of HIGH columns and a panel, of which (high, wide) exist, to a tile of `out`. */
INLINE void add_product(const Sums *s, char *out, const int16_t *left, const int16_t *right, const double *factors,
                        long pairs, long high, long wide, const int vectors) {
    ints sum[HIGH][WIDE];
    int32_t sums[HIGH][COLUMNS];
    const long size = s->is_double ? 8 : 4;
    clear(sum, vectors);
    add_tile(sum, left, 2, 2 * HIGH, right, 2 * COLUMNS, pairs, vectors);
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < vectors; j++) write_ints(sums[i] + j * LANES, sum[i][j]);
    for (long i = 0; i < high; i++)
        add_row(out + i * s->columns * size, s->is_double, sums[i], factors, wide);
}

/* Adds the products of GROUP columns of steps, from `first`, with all columns of `packed` to `out`; if `upper`, only with
   the panels that reach to the right of the diagonal. */
static void add_group(const Sums *s, char *out, const int16_t *left, Packed packed, long first, long pairs, int upper) {
    const long last = least(first + GROUP, s->columns), size = s->is_double ? 8 : 4;
    for (long panel = upper ? first / COLUMNS : 0; panel < panels_of(s); panel++) {
        const long column = panel * COLUMNS, wide = least(COLUMNS, s->columns - column);
        for (long row = first; row < last; row += HIGH) {
            if (upper && column + wide <= row) break;
            BY_VECTORS(wide, add_product, s, out + (row * s->columns + column) * size, left + (row - first) * 2 * pairs,
                       packed.integers + panel * PANEL, packed.factors + column, pairs, least(HIGH, last - row), wide)
        }
    }
}

/* Adds the sums of all rows to the gram matrix and the residual. Each number has the same sums whatever the number of
   threads. Returns whether there was memory for it. */
int OF(add_sums)(const Sums *s, int threads) {
    const long groups = (s->columns + GROUP - 1) / GROUP;
    Packed packed[2];
    const long packed_bytes = lay_out(s, NULL, packed);
    char *memory = aligned_alloc(64, packed_bytes + threads * 2L * GROUP * BLOCK);
    if (!memory) return 0;
    lay_out(s, memory, packed);
#pragma omp parallel num_threads(threads)
    {
        int16_t *left = (int16_t *)(memory + packed_bytes) + (long)omp_get_thread_num() * GROUP * BLOCK;
        for (long start = 0; start < s->rows; start += BLOCK) {
            const long rows = least(BLOCK, s->rows - start), pairs = (rows + 1) / 2;
#pragma omp for
            for (long panel = 0; panel < panels_of(s); panel++) pack_panel(s, packed, start, rows, panel);
#pragma omp for schedule(dynamic)
            for (long part = 0; part < 2 * groups; part++) {
                const long first = part / 2 * GROUP, upper = part % 2;
                pack_left(s, left, packed[0].integers, first, pairs);
                add_group(s, upper ? s->gram : s->residual, left, packed[!upper], first, pairs, upper);
            }
        }
    }
    free(memory);
    return 1;
}
