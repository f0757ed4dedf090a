/* Rotation of groups of neighbouring channels by a Kronecker power of H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1],
[-1, 1, 1, 1]] / 2, one factor after the other: four numbers a, b, c, d become s - d, s - c, s - b, s - a, where s is half
of their sum. transforms.py adds in the same order. */

#include "vectors.h"

enum { MOST = 256 }; /* channels in a group */

/* Applies H4 to the numbers at i, i + stride, i + 2 stride and i + 3 stride, for each i; `size` numbers in all. */
INLINE void apply(float *x, int size, int stride) {
    for (int block = 0; block < size; block += 4 * stride) {
        for (int i = block; i < block + stride; i++) {
            float a = x[i], b = x[i + stride], c = x[i + 2 * stride], d = x[i + 3 * stride];
            float s = ((a + b) + (c + d)) * 0.5f;
            x[i] = s - d;
            x[i + stride] = s - c;
            x[i + 2 * stride] = s - b;
            x[i + 3 * stride] = s - a;
        }
    }
}

INLINE void rotate_group(float *x, int size) {
    apply(x, size, 1);
    apply(x, size, 4);
    if (size > 16) apply(x, size, 16);
    if (size > 64) apply(x, size, 64);
}

/* Rotates `groups` groups of `size` numbers of `type`, 16, 64 or 256, from `x` to `y`, which may be the same. */
void OF(rotate)(const void *x, void *y, int type, int64_t groups, int size, int threads) {
#pragma omp parallel for num_threads(threads) if (groups * size > 1 << 15)
    for (int64_t group = 0; group < groups; group++) {
        float row[MOST];
        int64_t at = group * size * bytes_of(type);
        read_row(row, (const char *)x + at, type, size);
        if (size == 16) rotate_group(row, 16);
        else if (size == 64) rotate_group(row, 64);
        else rotate_group(row, 256);
        write_row((char *)y + at, type, row, size);
    }
}
