/* The arguments of the attention kernels, and what they share. */

#include "products.h"

typedef struct {
    const void *query, *key, *value;
    const float *mask; /* added to the scores to base 2; NULL for no mask */
    void *y;
    int64_t at[5][3]; /* strides of batch, head and row of query, key, value, mask, y; rows are contiguous */
    int64_t batch, heads, rows, keys, width, out;
    float scale; /* makes scores to base 2 of the products; not negative */
    int32_t type; /* of query, key, value and y */
} Attention;

/* Returns the number of heads that are packed at a time. */
INLINE long together(const Attention *a, int threads) { return least(a->batch * a->heads, 4L * threads); }

INLINE void multiply(float *y, long count, float by) {
    for (long j = 0; j < count; j += LANES) V(storeu_ps)(y + j, V(mul_ps)(V(loadu_ps)(y + j), V(set1_ps)(by)));
}
