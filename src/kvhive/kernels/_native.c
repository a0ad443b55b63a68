/* What the library is, and what this machine can do. */

#include "_basics.h"
#if defined(TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The sources it was compiled from. */
const char *kvhive_sources(void) { return SOURCES; }

/* Floats in a vector, with the best instructions that this machine has. */
int64_t kvhive_lanes(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 8;
#endif
    return 4;
}

/* Whether it multiplies tiles of bfloat16. The system lends them to those who ask, which this does. */
int64_t kvhive_tiles(void)
{
#if defined(TILES)
    enum { ASK_FOR = 0x1023, TILE_DATA = 18 }; /* arch_prctl's */
    unsigned a, b, c, d = 0;
    const int there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & d >> 24 & 1;
    return there && kvhive_lanes() == 16 && syscall(SYS_arch_prctl, ASK_FOR, TILE_DATA) == 0;
#else
    return 0;
#endif
}
