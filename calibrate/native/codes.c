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

/* Computes q = codes(x) for `count` numbers of `type`. */
void OF(quantize)(const void *x, int type, uint8_t *q, int64_t count, float scale, int zero_point, int threads) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (count > 1 << 15)
    for (int64_t i = 0; i < whole; i += LANES) write_bytes(q + i, codes(read_lanes(x, type, i), scale, zero_point));
    if (whole == count) return;
    float last[LANES] = {0};
    uint8_t bytes[LANES];
    read_row(last, (const char *)x + whole * bytes_of(type), type, count - whole);
    write_bytes(bytes, codes(V(loadu_ps)(last), scale, zero_point));
    memcpy(q + whole, bytes, count - whole);
}
