/* Quantization of inputs. */

#include "vectors.h"

/* Returns clamp(round(x / scale + zero_point) + 128, 0, 255), where NaN becomes 255.

   The quotient is rounded to float32, then the sum, as in the reference. The 128 that make the code unsigned are added
   after rounding to a whole number: added before, they would change how the sum is rounded. */
INLINE ints codes(floats x, float scale, int zero_point) {
    const floats far = V(set1_ps)(1024.f), near = V(set1_ps)(-1024.f); /* both are outside of the range of codes */
    x = V(add_ps)(V(div_ps)(x, V(set1_ps)(scale)), V(set1_ps)((float)zero_point));
    x = V(max_ps)(V(min_ps)(x, far), near);
    ints code = V(add_epi32)(V(cvtps_epi32)(x), V(set1_epi32)(128));
    return V(min_epi32)(V(max_epi32)(code, V(set1_epi32)(0)), V(set1_epi32)(255));
}

/* Computes q = codes(x) for `count` numbers of `type`, each multiplied by its factor first if `factors` is not NULL. */
INLINE void quantize_part(const void *x, int type, uint8_t *q, const float *factors, int64_t count, float scale,
                          int zero_point) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats lanes = read_lanes(x, type, i);
        if (factors) lanes = rounded_to(V(mul_ps)(lanes, V(loadu_ps)(factors + i)), type);
        write_bytes(q + i, codes(lanes, scale, zero_point));
    }
    if (i == count) return;
    float last[LANES] = {0}, multiply[LANES] = {0};
    uint8_t bytes[LANES];
    read_row(last, (const char *)x + i * bytes_of(type), type, count - i);
    floats lanes = V(loadu_ps)(last);
    if (factors) {
        memcpy(multiply, factors + i, (count - i) * sizeof *factors);
        lanes = rounded_to(V(mul_ps)(lanes, V(loadu_ps)(multiply)), type);
    }
    write_bytes(bytes, codes(lanes, scale, zero_point));
    memcpy(q + i, bytes, count - i);
}

/* Computes q = codes(x) for `rows` rows of `columns` numbers of `type`. If `factors` is not NULL, column i of x is first
   multiplied by factors[i], and the product is rounded to `type`. */
void OF(quantize)(const void *x, int type, uint8_t *q, const float *factors, int64_t rows, int64_t columns, float scale,
                  int zero_point, int threads) {
    int64_t part = factors ? columns : 1 << 13, count = rows * columns; /* numbers that are quantized together */
#pragma omp parallel for num_threads(threads) if (count > 1 << 15)
    for (int64_t start = 0; start < count; start += part) {
        const void *from = (const char *)x + start * bytes_of(type);
        quantize_part(from, type, q + start, factors, least(part, count - start), scale, zero_point);
    }
}
