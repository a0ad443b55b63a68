/* Part of _packed.c for vectors of LANES floats: numbers become codes and grids. The operations are
 * those of bits.py in the same order, so that the outcome is the same to the last bit.
 */

INLINE Floats NAME(smaller)(Floats one, Floats other)
{
#if LANES == 16
    return (Floats)_mm512_min_ps((__m512)one, (__m512)other);
#elif LANES == 8
    return (Floats)_mm256_min_ps((__m256)one, (__m256)other);
#else
    for (int i = 0; i < LANES; i++)
        one[i] = one[i] < other[i] ? one[i] : other[i];
    return one;
#endif
}

/* The least of `count` numbers, and the least of their negatives. */
INLINE void NAME(extremes)(const float *numbers, int64_t count, float *least, float *negative)
{
    float low[LANES], high[LANES];
    int64_t from = 0;
    if (count >= LANES) {
        Floats some = NAME(load)(numbers), lows = some, highs = -some;
        for (from = LANES; from + LANES <= count; from += LANES) {
            some = NAME(load)(numbers + from);
            lows = NAME(smaller)(lows, some);
            highs = NAME(smaller)(highs, -some);
        }
        NAME(store)(low, lows);
        NAME(store)(high, highs);
    } else
        for (int i = 0; i < LANES; i++)
            low[i] = numbers[0], high[i] = -numbers[0];
    for (; from < count; from++) {
        low[0] = numbers[from] < low[0] ? numbers[from] : low[0];
        high[0] = -numbers[from] < high[0] ? -numbers[from] : high[0];
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) {
            low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
            high[i] = high[i + half] < high[i] ? high[i + half] : high[i];
        }
    *least = low[0], *negative = high[0];
}

/* Tokens first..last-1, each with grids of its own. */
static void NAME(code_tokens)(const Coding *job, int64_t first, int64_t last)
{
    const int64_t width = job->width, groups = width / job->group;
    const float top = (1 << job->bits) - 1;
    float scale[WIDEST], zero[WIDEST];
    uint8_t codes[WIDEST];
    for (int64_t token = first; token < last; token++) {
        const float *numbers = job->numbers + token * width;
        for (int64_t group = 0; group < groups; group++) {
            float negative;
            NAME(extremes)(numbers + group * job->group, job->group, zero + group, &negative);
            scale[group] = (-negative - zero[group]) / top;
        }
        put_grids(job, token * 2 * groups, scale, groups);
        put_grids(job, (token * 2 + 1) * groups, zero, groups);
        for (int64_t group = 0; group < groups; group++)
            for (int64_t i = group * job->group; i < (group + 1) * job->group; i++)
                codes[i] = code(numbers[i], scale[group], zero[group], top);
        pack(codes, width, job->bits, job->codes + token * width * job->bits / 8);
    }
}

/* Runs first..last-1, each with grids for each channel. */
static void NAME(code_runs)(const Coding *job, int64_t first, int64_t last)
{
    const int64_t width = job->width;
    const float top = (1 << job->bits) - 1;
    float scale[WIDEST], zero[WIDEST];
    uint8_t codes[WIDEST];
    for (int64_t run = first; run < last; run++) {
        const int64_t start = run ? job->ends[run - 1] : 0, end = job->ends[run];
        memcpy(zero, job->numbers + start * width, width * sizeof *zero);
        memcpy(scale, zero, width * sizeof *zero);
        for (int64_t token = start + 1; token < end; token++)
            for (int64_t i = 0; i < width; i++) {
                const float number = job->numbers[token * width + i];
                zero[i] = number < zero[i] ? number : zero[i];
                scale[i] = number > scale[i] ? number : scale[i];
            }
        for (int64_t i = 0; i < width; i++)
            scale[i] = (scale[i] - zero[i]) / top;
        put_grids(job, run * 2 * width, scale, width);
        put_grids(job, (run * 2 + 1) * width, zero, width);
        for (int64_t token = start; token < end; token++) {
            for (int64_t i = 0; i < width; i++)
                codes[i] = code(job->numbers[token * width + i], scale[i], zero[i], top);
            pack(codes, width, job->bits, job->codes + token * width * job->bits / 8);
        }
    }
}
