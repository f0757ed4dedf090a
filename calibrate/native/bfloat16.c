/* Attention by bfloat16 products, for targets with the bfloat16 instructions of AVX-512. */

#include "attention.h"

#ifdef __AVX512BF16__

typedef uint16_t bfloat16;

enum { ROWS = 8 * HIGH, KEYS = 1024 }; /* rows and keys of a piece of scores, which fits in the second-level cache */

INLINE __mmask16 first(long n) { return n < LANES ? (1u << n) - 1 : 0xffff; }

/* --- products --------------------------------------------------------------------------------------------------- */

/* y (HIGH, registers * LANES) = a (HIGH, 2 * pairs) @ b + (more ? y : 0).
   b has the layout (pairs, columns, 2): its rows are interleaved two by two. `largest` (HIGH, LANES), if it is not
   NULL, is updated by the maximum of each lane over the row's registers; in the last register only the lanes of `end`
   count. */
INLINE void sums(float *y, long y_row, const bfloat16 *a, long a_row, const bfloat16 *b, long b_pair, long pairs,
                 const int registers, const int more, float *largest, __mmask16 end) {
    __m512 sum[HIGH][WIDE];
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < registers; j++)
            sum[i][j] = more ? _mm512_loadu_ps(y + i * y_row + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh right[WIDE];
        for (int j = 0; j < registers; j++)
            right[j] = (__m512bh)_mm512_loadu_si512(b + k * b_pair + j * 2 * LANES);
        for (int i = 0; i < HIGH; i++) {
            int pair;
            memcpy(&pair, a + i * a_row + 2 * k, sizeof pair);
            for (int j = 0; j < registers; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)_mm512_set1_epi32(pair), right[j]);
        }
    }
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < registers; j++) _mm512_storeu_ps(y + i * y_row + j * LANES, sum[i][j]);
    if (!largest) return;
    for (int i = 0; i < HIGH; i++) {
        __m512 found = _mm512_load_ps(largest + i * LANES);
        for (int j = 0; j < registers - 1; j++) found = _mm512_max_ps(found, sum[i][j]);
        _mm512_store_ps(largest + i * LANES, _mm512_mask_max_ps(found, end, found, sum[i][registers - 1]));
    }
}

/* Computes `sums` for many rows, and for up to COLUMNS columns. */
static void product(float *y, long y_row, const bfloat16 *a, long a_row, const bfloat16 *b, long b_pair, long pairs,
                    long rows, long columns, const int more, float *largest) {
    const __mmask16 end = first((columns - 1) % LANES + 1);
    for (long i = 0; i < rows; i += HIGH, y += HIGH * y_row, a += HIGH * a_row) {
        float *found = largest ? largest + i * LANES : NULL;
        switch ((columns + LANES - 1) / LANES) {
        case 1: sums(y, y_row, a, a_row, b, b_pair, pairs, 1, more, found, end); break;
        case 2: sums(y, y_row, a, a_row, b, b_pair, pairs, 2, more, found, end); break;
        case 3: sums(y, y_row, a, a_row, b, b_pair, pairs, 3, more, found, end); break;
        default: sums(y, y_row, a, a_row, b, b_pair, pairs, WIDE, more, found, end);
        }
    }
}

/* --- attention -------------------------------------------------------------------------------------------------- */

/* The memory that a thread uses for a piece of scores. */
typedef struct {
    float *scores, *y; /* (ROWS, KEYS), (ROWS, out) */
    bfloat16 *weights, *query; /* (ROWS, KEYS), (ROWS, width) */
} Work;

INLINE long of_keys(const Attention *a) { return up(a->keys, COLUMNS) * up(a->width, 2); }
INLINE long of_values(const Attention *a) { return up(a->keys, 2) * up(a->out, LANES); }
INLINE long of_work(const Attention *a) {
    return up(4 * (ROWS * KEYS + ROWS * up(a->out, LANES)) + 2 * (ROWS * KEYS + ROWS * up(a->width, 2)), 64);
}

/* Packs key (keys, width) into blocks of COLUMNS keys, (width / 2, COLUMNS, 2), padded with zeros. */
static void pack_keys(bfloat16 *to, const bfloat16 *key, const Attention *a) {
    const long width = a->width, block = COLUMNS * up(width, 2);
    memset(to, 0, sizeof *to * of_keys(a));
    for (long j = 0; j < a->keys; j++, key += a->at[1][2]) {
        bfloat16 *place = to + j / COLUMNS * block + j % COLUMNS * 2;
        for (long c = 0; c < width; c += 2) memcpy(place + c * COLUMNS, key + c, c + 1 < width ? 4 : 2);
    }
}

/* Packs value (keys, out) into the layout (keys / 2, out, 2), padded with zeros. */
static void pack_values(bfloat16 *to, const bfloat16 *value, const Attention *a) {
    const long row = a->at[2][2];
    for (long k = 0; k < a->keys; k += 2, value += 2 * row)
        for (long j = 0; j < a->out; j += LANES, to += 2 * LANES) {
            __mmask16 some = first(a->out - j), next = k + 1 < a->keys ? some : 0;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, value + j));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next, value + row + j));
            _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* Returns 2 ** x for x up to 0. A polynomial of degree 4 computes 2 ** fraction with an error of 4e-6. */
INLINE __m512 power(__m512 x) {
    __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(1.3697664e-2f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.1690358e-2f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4163845e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9296590e-1f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0000037f));
    return _mm512_scalef_ps(y, x);
}

/* Scales the scores of a row and adds the mask; returns the largest score. */
INLINE float masked(float *score, long count, const float *mask, float scale) {
    __m512 largest = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
    for (long j = 0; j < count; j += LANES) {
        const __mmask16 some = first(count - j);
        __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(score + j), by, _mm512_maskz_loadu_ps(some, mask + j));
        _mm512_storeu_ps(score + j, x);
        largest = _mm512_mask_max_ps(largest, some, largest, x);
    }
    return _mm512_reduce_max_ps(largest);
}

/* Computes weight = 2 ** (score * scale - shift), rounded to bfloat16; returns the sum of the unrounded weights. */
INLINE float weigh(bfloat16 *weight, const float *score, long count, float scale, float shift) {
    const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(shift);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long j = 0; j < count; j += 2 * LANES) {
        __m512 x = power(_mm512_fmsub_ps(_mm512_loadu_ps(score + j), by, less));
        __m512 next = power(_mm512_fmsub_ps(_mm512_loadu_ps(score + j + LANES), by, less));
        sum[0] = _mm512_add_ps(sum[0], x);
        sum[1] = _mm512_add_ps(sum[1], next);
        _mm512_storeu_si512(weight + j, (__m512i)_mm512_cvtne2ps_pbh(next, x));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

/* Computes attention for some rows of one head, over pieces of KEYS keys: Milakov and Gimelshein, "Online normalizer
   calculation for softmax", 2018. */
static void attend(const Attention *a, const bfloat16 *query, const bfloat16 *keys, const bfloat16 *values,
                   const float *mask, bfloat16 *y, long rows, Work work) {
    const long width = up(a->width, 2), out = up(a->out, LANES), row = a->at[0][2];
    const float scale = mask ? 1 : a->scale;
    float largest[ROWS], total[ROWS], found[ROWS * LANES] __attribute__((aligned(64)));
    memset(work.query, 0, sizeof *work.query * ROWS * width);
    memset(work.y, 0, sizeof *work.y * ROWS * out);
    for (long i = 0; i < ROWS; i++) largest[i] = -INFINITY, total[i] = 0;
    for (long i = 0; i < rows; i++) memcpy(work.query + i * width, query + i * row, sizeof *query * a->width);
    for (long start = 0; start < a->keys; start += KEYS) {
        const long some = least(a->keys - start, KEYS);
        for (long i = 0; i < ROWS * LANES; i++) found[i] = -INFINITY;
        for (long j = 0; j < some; j += COLUMNS)
            product(work.scores + j, KEYS, work.query, width, keys + (start + j) * width, 2 * COLUMNS, width / 2, rows,
                    least(some - j, COLUMNS), 0, found);
        for (long i = 0; i < rows; i++) {
            float *score = work.scores + i * KEYS;
            float last = largest[i], now = _mm512_reduce_max_ps(_mm512_load_ps(found + i * LANES)) * scale;
            if (mask) now = masked(score, some, mask + i * a->at[3][2] + start, a->scale);
            for (long j = some; j < up(some, 2 * LANES); j++) score[j] = -INFINITY;
            largest[i] = fmaxf(last, now);
            float shift = largest[i] == -INFINITY ? 0 : largest[i], fade = exp2f(last - shift);
            total[i] = total[i] * fade + weigh(work.weights + i * KEYS, score, some, scale, shift);
            if (start && fade != 1) multiply(work.y + i * out, out, fade);
        }
        for (long j = 0; j < out; j += COLUMNS)
            product(work.y + j, out, work.weights, KEYS, values + start * out + 2 * j, 2 * out, (some + 1) / 2, rows,
                    least(out - j, COLUMNS), 1, NULL);
    }
    for (long i = 0; i < rows; i++, y += a->at[4][2]) {
        multiply(work.y + i * out, out, total[i] == 0 ? 0 : 1 / total[i]);
        for (long j = 0; j < a->out; j += LANES)
            _mm256_mask_storeu_epi16(y + j, first(a->out - j),
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(work.y + i * out + j)));
    }
}

/* Computes y = softmax(query @ key.T * scale + mask) @ value. Rows whose keys are all masked become zeros.
   Returns whether there was memory for it. */
int OF(bfloat16_attention)(const Attention *a, int threads) {
    const long all = a->batch * a->heads, blocks = (a->rows + ROWS - 1) / ROWS, group = together(a, threads);
    const long keys = of_keys(a), head = keys + of_values(a);
    bfloat16 *packed = aligned_alloc(64, up(2 * group * head, 64) + threads * of_work(a));
    if (!packed) return 0;
    char *works = (char *)packed + up(2 * group * head, 64);
#pragma omp parallel num_threads(threads)
    for (long start = 0; start < all; start += group) {
        const long end = least(start + group, all);
#pragma omp for
        for (long at = start; at < end; at++) {
            long b = at / a->heads, h = at % a->heads;
            pack_keys(packed + (at - start) * head, (const bfloat16 *)a->key + b * a->at[1][0] + h * a->at[1][1], a);
            pack_values(packed + (at - start) * head + keys,
                        (const bfloat16 *)a->value + b * a->at[2][0] + h * a->at[2][1], a);
        }
#pragma omp for schedule(dynamic)
        for (long piece = start * blocks; piece < end * blocks; piece++) {
            long at = piece / blocks, row = piece % blocks * ROWS, b = at / a->heads, h = at % a->heads;
            const bfloat16 *ours = packed + (at - start) * head;
            float *floats = (float *)(works + omp_get_thread_num() * of_work(a));
            bfloat16 *halves = (bfloat16 *)(floats + ROWS * (KEYS + up(a->out, LANES)));
            Work work = {floats, floats + ROWS * KEYS, halves, halves + ROWS * KEYS};
#define AT(i) (b * a->at[i][0] + h * a->at[i][1] + row * a->at[i][2])
            attend(a, (const bfloat16 *)a->query + AT(0), ours, ours + keys, a->mask ? a->mask + AT(3) : NULL,
                   (bfloat16 *)a->y + AT(4), least(a->rows - row, ROWS), work);
        }
    }
    free(packed);
    return 1;
}

#endif
