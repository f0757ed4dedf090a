/* Attention in integers: exact products of 16-bit integers around a softmax in float32.

Queries and keys become integers with one scale for each token. They have so many levels that a score, a sum over the
width of a head, just fits into int32: 5792 for 64 channels. Values become integers of up to VALUE_LEVELS with one scale
for each channel and BLOCK keys, weights integers of up to WEIGHT_LEVELS for the largest weight of a row among KEYS keys;
sums over BLOCK keys fit into int32. The softmax over pieces of keys is that of Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018. */

#include "attention.h"

enum {
    ROWS = 8 * HIGH, KEYS = 512, /* rows and keys of a piece of scores, which fits in the second-level cache */
    BLOCK = 128, VALUE_LEVELS = 1023, WEIGHT_LEVELS = 16383, /* their product is less than 2 ** 31 */
};

/* Magnitudes above which products could leave the range of float32, and below which numbers count as zero. */
static const float HUGE_SCORE = 1e15f, HUGE_VALUE = 1e25f, TINY = 1e-30f;

/* A head whose keys and values are integers. */
typedef struct {
    int16_t *keys, *values; /* (key_count / COLUMNS, width / 2, COLUMNS, 2), (key_count / 2, out, 2) */
    float *key_scales, *bias, *value_scales; /* (key_count), (key_count), (key_count / BLOCK, out) */
} Head;

/* The memory that a thread uses for a piece of scores. */
typedef struct {
    float *scores, *y, *row; /* (ROWS, KEYS), (ROWS, out), (BLOCK, out) or (width) */
    int16_t *weights, *query; /* (ROWS, KEYS), (ROWS, width) */
} Work;

INLINE long width_of(const Attention *a) { return up(a->width, 2 * LANES); }
INLINE long out_of(const Attention *a) { return up(a->out, LANES); }
INLINE long keys_of(const Attention *a) { return up(a->keys, COLUMNS); }
INLINE long blocks_of(const Attention *a) { return (a->keys + BLOCK - 1) / BLOCK; }
INLINE long levels_of(const Attention *a) { return least(32767, (long)sqrt(2147483647.0 / a->width)); }

/* Sets the pointers of a head in `memory`, and returns its number of bytes. */
static long lay_out_head(const Attention *a, char *memory, Head *head) {
    char *at = memory;
    head->keys = (int16_t *)at, at += 2 * keys_of(a) * width_of(a);
    head->values = (int16_t *)at, at += 2 * up(a->keys, COLUMNS) * out_of(a);
    head->key_scales = (float *)at, at += 4 * keys_of(a);
    head->bias = (float *)at, at += 4 * keys_of(a);
    head->value_scales = (float *)at, at += 4 * blocks_of(a) * out_of(a);
    return up(at - memory, 64);
}

static long lay_out_work(const Attention *a, char *memory, Work *work) {
    char *at = memory;
    long row = BLOCK * out_of(a);
    work->scores = (float *)at, at += 4 * ROWS * KEYS;
    work->y = (float *)at, at += 4 * ROWS * out_of(a);
    work->row = (float *)at, at += 4 * (row > width_of(a) ? row : width_of(a));
    work->weights = (int16_t *)at, at += 2 * ROWS * KEYS;
    work->query = (int16_t *)at, at += 2 * ROWS * width_of(a);
    return up(at - memory, 64);
}

/* Returns whether all magnitudes are at most `limit`. */
INLINE int fits(ints magnitudes, float limit) {
    int bits;
    memcpy(&bits, &limit, sizeof bits);
    return largest_int_of(magnitudes) <= bits;
}

/* Makes integers of a row of `count` numbers, a multiple of LANES, with the scale of its largest magnitude. Returns the
   scale; NAN if a number of the row is NaN or larger than HUGE_SCORE. */
INLINE float quantize_row(int16_t *to, const float *row, long count, long levels) {
    ints largest = V(set1_epi32)(0);
    for (long c = 0; c < count; c += LANES) largest = V(max_epi32)(largest, magnitudes(V(loadu_ps)(row + c)));
    float most = largest_of(as_floats(largest)), by = most > TINY ? levels / most : 0;
    for (long c = 0; c < count; c += LANES)
        write_halves(to + c, narrowed(V(cvtps_epi32)(V(mul_ps)(V(loadu_ps)(row + c), V(set1_ps)(by)))));
    return !fits(largest, HUGE_SCORE) ? NAN : most > TINY ? most / levels : 0;
}

/* Makes integers of the keys of a head; returns whether all are in range. */
static int pack_keys(const Attention *a, const char *key, Head head, Work work) {
    const long width = width_of(a), pairs = (a->width + 1) / 2, size = bytes_of(a->type);
    int in_range = 1;
    memset(work.row, 0, sizeof *work.row * width);
    for (long j = 0; j < keys_of(a); j++) {
        int16_t *place = head.keys + (j / COLUMNS * pairs * COLUMNS + j % COLUMNS) * 2;
        head.bias[j] = j < a->keys ? 0 : -INFINITY;
        if (j < a->keys) read_row(work.row, key + j * a->at[1][2] * size, a->type, a->width);
        else memset(work.row, 0, sizeof *work.row * width);
        head.key_scales[j] = quantize_row(work.query, work.row, width, levels_of(a));
        in_range &= !isnan(head.key_scales[j]);
        for (long c = 0; c < pairs; c++) memcpy(place + c * 2 * COLUMNS, work.query + 2 * c, 4);
    }
    return in_range;
}

/* Makes integers of `some` values, at most BLOCK, of LANES channels; returns whether all are in range. The rows of
   `value` and of `to` have the stride `out`. */
INLINE int pack_channels(int16_t *to, float *scales, const float *value, long some, long out) {
    ints largest = V(set1_epi32)(0);
    for (long k = 0; k < some; k++) largest = V(max_epi32)(largest, magnitudes(V(loadu_ps)(value + k * out)));
    float most[LANES], by[LANES];
    V(storeu_ps)(most, as_floats(largest));
    for (int i = 0; i < LANES; i++) {
        by[i] = most[i] > TINY ? VALUE_LEVELS / most[i] : 0;
        scales[i] = most[i] > TINY ? most[i] / VALUE_LEVELS : 0;
    }
    for (long k = 0; k < some; k += 2) {
        ints low = V(cvtps_epi32)(V(mul_ps)(V(loadu_ps)(value + k * out), V(loadu_ps)(by)));
        ints high = V(cvtps_epi32)(V(mul_ps)(V(loadu_ps)(value + (k + 1) * out), V(loadu_ps)(by)));
        write_ints(to + k * out, in_pairs(low, high));
    }
    return fits(largest, HUGE_VALUE);
}

/* Makes integers of the values of a head; returns whether all are in range. */
static int pack_values(const Attention *a, const char *value, Head head, Work work) {
    const long out = out_of(a), size = bytes_of(a->type);
    int in_range = 1;
    memset(work.row, 0, sizeof *work.row * BLOCK * out);
    for (long start = 0; start < a->keys; start += BLOCK) {
        const long some = least(BLOCK, a->keys - start);
        for (long k = 0; k < some; k++)
            read_row(work.row + k * out, value + (start + k) * a->at[2][2] * size, a->type, a->out);
        if (some % 2) memset(work.row + some * out, 0, sizeof *work.row * out);
        for (long j = 0; j < out; j += LANES)
            in_range &= pack_channels(head.values + start * out + 2 * j, head.value_scales + start / BLOCK * out + j,
                                      work.row + j, some, out);
    }
    return in_range;
}

/* score (HIGH, vectors * LANES) = query @ keys * the scales of both + bias. */
INLINE void score_tile(float *score, const int16_t *query, const float *query_scales, long width, long pairs,
                       const int16_t *keys, const float *key_scales, const float *bias, const int vectors) {
    ints sum[HIGH][WIDE];
    clear(sum, vectors);
    add_tile(sum, query, width, 2, keys, 2 * COLUMNS, pairs, vectors);
    for (int j = 0; j < vectors; j++) {
        const floats by = V(loadu_ps)(key_scales + j * LANES), more = V(loadu_ps)(bias + j * LANES);
        for (int i = 0; i < HIGH; i++) {
            floats x = V(mul_ps)(V(cvtepi32_ps)(sum[i][j]), V(set1_ps)(query_scales[i]));
            V(storeu_ps)(score + i * KEYS + j * LANES, V(fmadd_ps)(x, by, more));
        }
    }
}

/* y (HIGH, vectors * LANES) += weights @ values * scales * factors, one scale a column and one factor a row. */
INLINE void output_tile(float *y, long out, const int16_t *weights, const int16_t *values, const float *scales,
                        const float *factors, long pairs, const int vectors) {
    ints sum[HIGH][WIDE];
    clear(sum, vectors);
    add_tile(sum, weights, KEYS, 2, values, 2 * out, pairs, vectors);
    for (int j = 0; j < vectors; j++) {
        const floats by = V(loadu_ps)(scales + j * LANES);
        for (int i = 0; i < HIGH; i++) {
            float *at = y + i * out + j * LANES;
            floats x = V(mul_ps)(V(cvtepi32_ps)(sum[i][j]), by);
            V(storeu_ps)(at, V(fmadd_ps)(x, V(set1_ps)(factors[i]), V(loadu_ps)(at)));
        }
    }
}

/* Adds the mask, (count) or NULL, to a row of scores; returns the largest score. */
INLINE float masked(float *score, long count, const float *mask) {
    floats largest = V(set1_ps)(-INFINITY);
    long whole = count / LANES * LANES;
    for (long j = 0; mask && j < whole; j += LANES)
        V(storeu_ps)(score + j, V(add_ps)(V(loadu_ps)(score + j), V(loadu_ps)(mask + j)));
    for (long j = whole; mask && j < count; j++) score[j] += mask[j];
    for (long j = 0; j < count; j += LANES) largest = V(max_ps)(largest, V(loadu_ps)(score + j));
    return largest_of(largest);
}

/* Computes the weights WEIGHT_LEVELS * 2 ** (score - largest), rounded; returns their sum. `count` is a multiple of
   LANES. A polynomial of degree 4 computes 2 ** fraction with an error of 4e-6. */
INLINE float weigh(int16_t *weight, const float *score, long count, float largest) {
    const floats less = V(set1_ps)(largest - 13.99991194f); /* the logarithm of WEIGHT_LEVELS to base 2 */
    ints sum = V(set1_epi32)(0);
    for (long j = 0; j < count; j += LANES) {
        floats x = V(max_ps)(V(sub_ps)(V(loadu_ps)(score + j), less), V(set1_ps)(-2)); /* 2 ** -2 is rounded to 0 */
        floats whole = floor_of(x), part = V(sub_ps)(x, whole), y = V(set1_ps)(1.3697664e-2f);
        y = V(fmadd_ps)(y, part, V(set1_ps)(5.1690358e-2f));
        y = V(fmadd_ps)(y, part, V(set1_ps)(2.4163845e-1f));
        y = V(fmadd_ps)(y, part, V(set1_ps)(6.9296590e-1f));
        y = V(fmadd_ps)(y, part, V(set1_ps)(1.0000037f));
        ints exponent = V(slli_epi32)(V(cvtps_epi32)(whole), 23);
        ints rounded = V(cvtps_epi32)(as_floats(V(add_epi32)(as_ints(y), exponent)));
        sum = V(add_epi32)(sum, rounded);
        write_halves(weight + j, narrowed(rounded));
    }
    return (float)sum_of(sum);
}

/* Makes integers of `rows` queries, and their scales, which make scores to base 2 of the products with keys; returns
   whether all are in range. */
static int pack_query(const Attention *a, const char *query, long rows, float *scales, Work work) {
    const long width = width_of(a);
    int in_range = 1;
    memset(work.row, 0, sizeof *work.row * width);
    for (long i = 0; i < rows; i++) {
        read_row(work.row, query + i * a->at[0][2] * bytes_of(a->type), a->type, a->width);
        float scale = quantize_row(work.query + i * width, work.row, width, levels_of(a));
        in_range &= !isnan(scale);
        scales[i] = scale * a->scale;
    }
    for (long i = rows; i < up(rows, HIGH); i++) {
        memset(work.query + i * width, 0, sizeof *work.query * width);
        scales[i] = 0;
    }
    return in_range;
}

/* Adds the products of weights with values, for the keys from `start`, to work.y. */
static void add_outputs(const Attention *a, Head head, long start, long some, long rows, const float *factors,
                        Work work) {
    const long out = out_of(a);
    for (long k = 0; k < some; k += BLOCK) {
        const int16_t *values = head.values + (start + k) * out;
        const float *scales = head.value_scales + (start + k) / BLOCK * out;
        const long pairs = (least(BLOCK, some - k) + 1) / 2;
        for (long j = 0; j < out; j += COLUMNS)
            for (long i = 0; i < rows; i += HIGH)
                BY_VECTORS(out - j, output_tile, work.y + i * out + j, out, work.weights + i * KEYS + k, values + 2 * j,
                           scales + j, factors + i, pairs)
    }
}

/* Computes attention for some rows of one head, over pieces of KEYS keys; returns whether all numbers are in range. */
static int attend(const Attention *a, Head head, const char *query, const float *mask, char *y, long rows, Work work) {
    const long width = width_of(a), out = out_of(a), pairs = (a->width + 1) / 2;
    float largest[ROWS], total[ROWS], factors[ROWS] = {0}, scales[ROWS];
    memset(work.y, 0, sizeof *work.y * ROWS * out);
    for (long i = 0; i < ROWS; i++) largest[i] = -INFINITY, total[i] = 0;
    if (!pack_query(a, query, rows, scales, work)) return 0;
    for (long start = 0; start < a->keys; start += KEYS) {
        const long some = least(a->keys - start, KEYS), count = up(some, LANES);
        for (long j = 0; j < count; j += COLUMNS)
            for (long i = 0; i < rows; i += HIGH)
                BY_VECTORS(count - j, score_tile, work.scores + i * KEYS + j, work.query + i * width, scales + i, width,
                           pairs, head.keys + (start + j) * 2 * pairs, head.key_scales + start + j,
                           head.bias + start + j)
        for (long i = 0; i < rows; i++) {
            float *score = work.scores + i * KEYS;
            float now = masked(score, mask ? some : count, mask ? mask + i * a->at[3][2] + start : NULL);
            if (now == -INFINITY) {
                memset(work.weights + i * KEYS, 0, sizeof *work.weights * count);
                factors[i] = 0;
                continue;
            }
            float last = largest[i], most = fmaxf(last, now), fade = exp2f(last - most);
            factors[i] = exp2f(now - most);
            largest[i] = most;
            total[i] = total[i] * fade + factors[i] * weigh(work.weights + i * KEYS, score, count, now);
            if (start && fade != 1) multiply(work.y + i * out, out, fade);
        }
        add_outputs(a, head, start, some, rows, factors, work);
    }
    for (long i = 0; i < rows; i++) {
        multiply(work.y + i * out, out, total[i] == 0 ? 0 : 1 / total[i]);
        write_row(y + i * a->at[4][2] * bytes_of(a->type), a->type, work.y + i * out, a->out);
    }
    return 1;
}

/* Computes y = softmax(query @ key.T * scale + mask) @ value. Rows whose keys are all masked become zeros. Returns
   whether y is valid: not if a number is NaN, infinite or too large for the range of the products, nor if memory ran
   out. */
int OF(attention)(const Attention *a, int threads) {
    const long all = a->batch * a->heads, rows = (a->rows + ROWS - 1) / ROWS, group = together(a, threads);
    const long size = bytes_of(a->type);
    Head any_head;
    Work any_work;
    const long head_bytes = lay_out_head(a, NULL, &any_head), work_bytes = lay_out_work(a, NULL, &any_work);
    char *memory = aligned_alloc(64, group * head_bytes + threads * work_bytes);
    if (!memory) return 0;
    int in_range = 1;
#pragma omp parallel num_threads(threads) reduction(&& : in_range)
    {
        Work work;
        lay_out_work(a, memory + group * head_bytes + omp_get_thread_num() * work_bytes, &work);
        for (long start = 0; start < all; start += group) {
            const long end = least(start + group, all);
#pragma omp for schedule(dynamic)
            for (long part = 2 * start; part < 2 * end; part++) {
                const long at = part / 2, b = at / a->heads, h = at % a->heads, input = 1 + part % 2;
                const char *from = (const char *)(input == 1 ? a->key : a->value);
                Head head;
                lay_out_head(a, memory + (at - start) * head_bytes, &head);
                from += (b * a->at[input][0] + h * a->at[input][1]) * size;
                in_range = (input == 1 ? pack_keys(a, from, head, work) : pack_values(a, from, head, work)) && in_range;
            }
#pragma omp for schedule(dynamic)
            for (long piece = start * rows; piece < end * rows; piece++) {
                const long at = piece / rows, row = piece % rows * ROWS, b = at / a->heads, h = at % a->heads;
                Head head;
                lay_out_head(a, memory + (at - start) * head_bytes, &head);
#define AT(i) (b * a->at[i][0] + h * a->at[i][1] + row * a->at[i][2])
                in_range = attend(a, head, (const char *)a->query + AT(0) * size, a->mask ? a->mask + AT(3) : NULL,
                                  (char *)a->y + AT(4) * size, least(a->rows - row, ROWS), work) && in_range;
            }
        }
    }
    free(memory);
    return in_range;
}
