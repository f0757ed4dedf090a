/* Vectors of the processor for which a file is compiled, and what all kernels share.

Every file of this folder is compiled once for each target: a set of instructions, see hatch_build.py. OF(name) is the
name of a function in the target. Vectors have 512 bits where the target has AVX-512, otherwise 256 bits. All targets
compute the same numbers. Sizes and strides are numbers of elements. No function keeps state. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define JOINED(name, target) name##_##target
#define FOR_TARGET(name, target) JOINED(name, target)
#define OF(name) FOR_TARGET(name, TARGET)

/* types of the numbers in a tensor, as kernels.py numbers them */
enum { FLOAT32, BFLOAT16, FLOAT16 };

#ifdef __AVX512F__
enum { LANES = 16, WIDE = 4 }; /* 32-bit numbers in a vector; vectors side by side in a tile of sums */
typedef __m512 floats;
typedef __m512i ints;
typedef __m256i halves; /* LANES 16-bit numbers, or LANES / 2 32-bit numbers */
typedef __m512d doubles; /* LANES / 2 numbers */
#define V(function) _mm512_##function
INLINE ints read_ints(const void *from) { return _mm512_loadu_si512(from); }
INLINE void write_ints(void *to, ints x) { _mm512_storeu_si512(to, x); }
INLINE halves read_halves(const void *from) { return _mm256_loadu_si256(from); }
INLINE void write_halves(void *to, halves x) { _mm256_storeu_si256(to, x); }
INLINE doubles read_as_doubles(const float *from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
INLINE void write_as_floats(float *to, doubles x) { _mm256_storeu_ps(to, _mm512_cvtpd_ps(x)); }
/* Returns the low 16 bits of numbers that int16 holds. */
INLINE halves narrowed(ints x) { return _mm512_cvtepi32_epi16(x); }
INLINE floats floor_of(floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE floats as_floats(ints x) { return _mm512_castsi512_ps(x); }
INLINE ints as_ints(floats x) { return _mm512_castps_si512(x); }
INLINE void write_bytes(void *to, ints x) { _mm_storeu_si128(to, _mm512_cvtusepi32_epi8(x)); }
INLINE ints both(ints a, ints b) { return _mm512_and_si512(a, b); }
INLINE ints either(ints a, ints b) { return _mm512_or_si512(a, b); }
INLINE int largest_int_of(ints x) { return _mm512_reduce_max_epi32(x); }
INLINE float largest_of(floats x) { return _mm512_reduce_max_ps(x); }
INLINE int sum_of(ints x) { return _mm512_reduce_add_epi32(x); }
#else
enum { LANES = 8, WIDE = 2 };
typedef __m256 floats;
typedef __m256i ints;
typedef __m128i halves;
typedef __m256d doubles;
#define V(function) _mm256_##function
INLINE ints read_ints(const void *from) { return _mm256_loadu_si256(from); }
INLINE void write_ints(void *to, ints x) { _mm256_storeu_si256(to, x); }
INLINE halves read_halves(const void *from) { return _mm_loadu_si128(from); }
INLINE void write_halves(void *to, halves x) { _mm_storeu_si128(to, x); }
INLINE doubles read_as_doubles(const float *from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
INLINE void write_as_floats(float *to, doubles x) { _mm_storeu_ps(to, _mm256_cvtpd_ps(x)); }
INLINE halves narrowed(ints x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }
INLINE floats floor_of(floats x) { return _mm256_floor_ps(x); }
INLINE floats as_floats(ints x) { return _mm256_castsi256_ps(x); }
INLINE ints as_ints(floats x) { return _mm256_castps_si256(x); }
INLINE void write_bytes(void *to, ints x) { _mm_storel_epi64(to, _mm_packus_epi16(narrowed(x), narrowed(x))); }
INLINE ints both(ints a, ints b) { return _mm256_and_si256(a, b); }
INLINE ints either(ints a, ints b) { return _mm256_or_si256(a, b); }
INLINE int largest_int_of(ints x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
INLINE float largest_of(floats x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
INLINE int sum_of(ints x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
#endif

/* Returns sum + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] for each lane i of 16-bit numbers a and b. */
INLINE ints add_products(ints sum, ints a, ints b) {
#if defined __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#elif defined __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    /* as an intrinsic, gcc would delay the addition, and with many products in flight sums would leave the registers */
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(V(madd_epi16)(a, b)));
    return sum;
#endif
}

/* Returns the bits of the magnitudes of x. As integers they have the order of the magnitudes, and those of NaN are the
   largest. */
INLINE ints magnitudes(floats x) { return both(as_ints(x), V(set1_epi32)(0x7fffffff)); }

/* Returns pairs of 16-bit numbers: the low 16 bits of each number of `first`, followed by those of `second`. */
INLINE ints in_pairs(ints first, ints second) {
    return either(both(first, V(set1_epi32)(0xffff)), V(slli_epi32)(second, 16));
}

INLINE long up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long least(long a, long b) { return a < b ? a : b; }

/* Reads LANES numbers of `type`, from the element at index i. */
INLINE floats read_lanes(const void *from, int type, long i) {
    if (type == FLOAT32) return V(loadu_ps)((const float *)from + i);
    halves x = read_halves((const uint16_t *)from + i);
    if (type == FLOAT16) return V(cvtph_ps)(x);
    return as_floats(V(slli_epi32)(V(cvtepu16_epi32)(x), 16));
}

/* Writes LANES numbers as `type`, rounded to nearest, ties to even, to the element at index i. */
INLINE void write_lanes(void *to, int type, long i, floats x) {
    if (type == FLOAT32) {
        V(storeu_ps)((float *)to + i, x);
    } else if (type == FLOAT16) {
        write_halves((uint16_t *)to + i, V(cvtps_ph)(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
        ints bits = as_ints(x), odd = both(V(srli_epi32)(bits, 16), V(set1_epi32)(1));
        bits = V(add_epi32)(bits, V(add_epi32)(odd, V(set1_epi32)(0x7fff)));
        /* the arithmetic shift keeps the 16 bits within the range of int16, so that nothing saturates */
        write_halves((uint16_t *)to + i, narrowed(V(srai_epi32)(bits, 16)));
    }
}

/* Returns x rounded to `type`, as float32. */
INLINE floats rounded_to(floats x, int type) {
    if (type == FLOAT32) return x;
    uint16_t rounded[LANES];
    write_lanes(rounded, type, 0, x);
    return read_lanes(rounded, type, 0);
}

INLINE long bytes_of(int type) { return type == FLOAT32 ? 4 : 2; }

/* Reads a row of n numbers of `type` as float32. */
INLINE void read_row(float *to, const void *from, int type, long n) {
    long whole = n / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) V(storeu_ps)(to + i, read_lanes(from, type, i));
    if (whole == n) return;
    float last[LANES] = {0};
    memcpy(last, (const char *)from + whole * bytes_of(type), (n - whole) * bytes_of(type));
    V(storeu_ps)(last, read_lanes(last, type, 0));
    memcpy(to + whole, last, (n - whole) * sizeof *to);
}

/* Writes a row of n numbers as `type`. */
INLINE void write_row(void *to, int type, const float *from, long n) {
    long whole = n / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) write_lanes(to, type, i, V(loadu_ps)(from + i));
    if (whole == n) return;
    float last[LANES] = {0};
    memcpy(last, from + whole, (n - whole) * sizeof *from);
    write_lanes(last, type, 0, V(loadu_ps)(last));
    memcpy((char *)to + whole * bytes_of(type), last, (n - whole) * bytes_of(type));
}
