/* Products of matrices of 16-bit integers with exact 32-bit sums. */

#include "vectors.h"

enum {
    HIGH = 6, /* rows of a tile: the sums that a product keeps in registers, (HIGH, WIDE * LANES) */
    COLUMNS = WIDE * LANES,
};

/* sum (HIGH, vectors * LANES) += a (HIGH, 2 * pairs) @ b. Two neighbours in a row of a lie side by side in memory;
   a_row and a_pair are the strides of rows and of such pairs. b has the layout (pairs, b_pair / 2, 2): its rows are
   interleaved two by two. The caller makes sure that no sum leaves the range of int32. */
INLINE void add_tile(ints sum[HIGH][WIDE], const int16_t *a, long a_row, long a_pair, const int16_t *b, long b_pair,
                     long pairs, const int vectors) {
    for (long k = 0; k < pairs; k++) {
        ints right[WIDE];
        for (int j = 0; j < vectors; j++) right[j] = read_ints(b + k * b_pair + j * 2 * LANES);
        for (int i = 0; i < HIGH; i++) {
            int pair;
            memcpy(&pair, a + i * a_row + k * a_pair, sizeof pair);
            for (int j = 0; j < vectors; j++)
                sum[i][j] = add_products(sum[i][j], V(set1_epi32)(pair), right[j]);
        }
    }
}

INLINE void clear(ints sum[HIGH][WIDE], const int vectors) {
    for (int i = 0; i < HIGH; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = V(set1_epi32)(0);
}

/* Calls `function` with its last argument, the number of vectors side by side in a tile, as a constant for the compiler.
   It is that of `columns` columns, at most WIDE. */
#define BY_VECTORS(columns, function, ...)               \
    switch (((columns) + LANES - 1) / LANES) {           \
    case 1: function(__VA_ARGS__, 1); break;             \
    case 2: function(__VA_ARGS__, WIDE < 2 ? WIDE : 2); break; \
    case 3: function(__VA_ARGS__, WIDE < 3 ? WIDE : 3); break; \
    default: function(__VA_ARGS__, WIDE);                \
    }
