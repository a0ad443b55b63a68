/* What the C kernels share: words of the language that compilers spell differently, and numbers of
 * 16 bits. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

enum { WIDEST = 512 }; /* numbers a token may have */
enum { FLOAT16, BFLOAT16, FLOAT32 };

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (NAME(Order)){__VA_ARGS__})
#endif

/* Whether the compiler knows tiles of bfloat16 (AMX). */
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>)
#define TILES
#endif
#endif

/* TARGET(AVX2) ... END_TARGET: functions for machines that have these instructions. */
#define AVX2 "avx2,fma"
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define TEXT(words) #words
#if defined(__clang__)
#define TARGET(names) \
    _Pragma(TEXT(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define TARGET(names) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(names)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

INLINE float as_float(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE uint32_t as_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* The number whose float16 has these bits. */
INLINE float half(uint16_t bits)
{
    const uint32_t rest = (uint32_t)(bits & 0x7fff) << 13;
    uint32_t size = as_bits(as_float(rest) * 0x1p112f); /* the exponent's bias: 127 - 15 */
    size |= rest >= 0x0f800000 ? 0x7f800000 : 0;        /* infinite, or no number */
    return as_float(size | (uint32_t)(bits & 0x8000) << 16);
}

/* Numbers of any dtype, as floats. */
INLINE void widen(const void *from, int64_t dtype, int64_t count, float *to)
{
    const uint16_t *halves = from;
    if (dtype == FLOAT32)
        memcpy(to, from, count * sizeof *to);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            to[i] = as_float((uint32_t)halves[i] << 16);
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = half(halves[i]);
}
