/* Says which targets this processor can run. This file is compiled for every processor. */

#include <string.h>

/* the SHA-256 digest of this folder, by which kernels.py sees whether the library is up to date */
const char *source = SOURCE;

int runs(const char *target) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    if (!strcmp(target, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(target, "avx512_vnni")) return avx512;
    if (!strcmp(target, "avx_vnni")) return avx2 && __builtin_cpu_supports("avxvnni");
    return !strcmp(target, "avx2") && avx2;
}
