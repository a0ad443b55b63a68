/* The body of _columns.c for vectors of LANES floats; NAME gives its functions names of their own.
 *
 * A token's numbers are `words` of 4 bytes: floats, or, IN_TILES, pairs of bfloat16.
 */

#include "_floats.h"
#define ACROSS (LANES == 16 ? 4 : 2) /* vectors of slots that share a look at a query's word */

INLINE Floats NAME(larger)(Floats one, Floats other) /* the other where either is no number */
{
#if LANES == 16
    return (Floats)_mm512_max_ps((__m512)one, (__m512)other);
#elif LANES == 8
    return (Floats)_mm256_max_ps((__m256)one, (__m256)other);
#else
    for (int i = 0; i < LANES; i++)
        one[i] = one[i] > other[i] ? one[i] : other[i];
    return one;
#endif
}

/* 2 to the power of `number`, which is 0 at most, within 3e-7 of it; 0 below -127. Adding
 * 1.5 * 2^23 rounds to a whole number in the lowest bits; a polynomial serves what is left. */
INLINE Floats NAME(power)(Floats number)
{
    number = NAME(larger)(NAME(splat)(-127), number);
    const Floats shifted = number + 0x1.8p23f;
    const Floats left = number - (shifted - 0x1.8p23f);
    Floats sum = left * 0.00132647272f + 0.00967151281f;
    sum = sum * left + 0.0555073374f;
    sum = sum * left + 0.240222421f;
    sum = sum * left + 0.693146978f;
    sum = sum * left + 1.0f;
    return (Floats)((NAME(Order))sum + ((NAME(Order))shifted << 23));
}

/* The largest number, or the sum of all. */
INLINE float NAME(largest)(Floats vector)
{
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)vector);
#else
    float largest = vector[0];
    for (int i = 1; i < LANES; i++)
        largest = largest > vector[i] ? largest : vector[i];
    return largest;
#endif
}

INLINE float NAME(total)(Floats vector)
{
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += vector[i];
    return total;
}

/* Numbers of two vectors in turns: their first halves, or their second ones. */
INLINE Floats NAME(woven)(Floats one, Floats other, int second)
{
#if LANES == 16
    return second ? SHUFFLE(one, other, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                  : SHUFFLE(one, other, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LANES == 8
    return second ? SHUFFLE(one, other, 4, 12, 5, 13, 6, 14, 7, 15)
                  : SHUFFLE(one, other, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return second ? SHUFFLE(one, other, 2, 6, 3, 7) : SHUFFLE(one, other, 0, 4, 1, 5);
#endif
}

/* Words of a token, filled up with zeros to whole vectors. */
INLINE int64_t NAME(words)(const Step *step)
{
    const int64_t words = IN_TILES ? (step->width + 1) / 2 : step->width;
    return (words + LANES - 1) / LANES * LANES;
}

INLINE void NAME(read)(const Step *step, const char *token, float *to)
{
    memset(to, 0, NAME(words)(step) * sizeof *to);
    if (IN_TILES)
        memcpy(to, token, step->width * 2);
    else
        widen(token, step->dtype, step->width, to);
}

/* Tokens first..last-1 of `keys`, whole vectors of them: word by word, those of LANES tokens side by
 * side. Beyond the last token there are zeros. */
static void NAME(arrange)(const Step *step, const char *keys, int64_t first, int64_t last, float *to)
{
    const int64_t words = NAME(words)(step);
    float from[LANES][WIDEST];
    for (int64_t token = first; token < last; token += LANES) {
        for (int i = 0; i < LANES; i++)
            if (token + i < step->slots)
                NAME(read)(step, keys + (token + i) * step->key_step, from[i]);
            else
                memset(from[i], 0, words * sizeof(float));
        for (int64_t word = 0; word < words; word += LANES) {
            Floats some[LANES], turned[LANES];
            for (int i = 0; i < LANES; i++)
                some[i] = NAME(load)(from[i] + word);
            for (int done = 1; done < LANES; done *= 2) { /* each time two halves interleave */
                for (int i = 0; i < LANES; i++)
                    turned[i] = NAME(woven)(some[i / 2], some[i / 2 + LANES / 2], i % 2);
                memcpy(some, turned, sizeof some);
            }
            for (int i = 0; i < LANES; i++)
                NAME(store)(to + token * words + (word + i) * LANES, some[i]);
        }
    }
}

/* out[row][slot]: products of `rows` queries with SPAN tokens that were arranged. */
#if IN_TILES
INLINE void NAME(multiply)(const float *query, const float *keys, int64_t words, int rows, float *out)
{
    const int pitch = PITCH * sizeof *out;
    for (int row = 0; row < rows; row += 16) { /* a tile: 16 rows of 16 words */
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t word = 0; word < words; word += 16) {
            const float *some = keys + word * 16;
            _tile_loadd(4, query + row * words + word, words * sizeof *query);
            _tile_loadd(5, some, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, some + 16 * words, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, some + 32 * words, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, some + 48 * words, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, out + row * PITCH, pitch);
        _tile_stored(1, out + row * PITCH + 16, pitch);
        _tile_stored(2, out + row * PITCH + 32, pitch);
        _tile_stored(3, out + row * PITCH + 48, pitch);
    }
}
#else
INLINE void NAME(multiply)(const float *query, const float *keys, int64_t words, int rows, float *out)
{
    for (int slot = 0; slot < SPAN; slot += ACROSS * LANES)
        for (int row = 0; row < rows; row += DOWN) {
            const float *own = query + row * words, *some = keys + slot * words;
            Floats sums[DOWN][ACROSS], numbers[ACROSS];
            for (int i = 0; i < DOWN; i++)
                for (int j = 0; j < ACROSS; j++)
                    sums[i][j] = (Floats){0};
            for (int64_t word = 0; word < words; word++) {
                for (int j = 0; j < ACROSS; j++)
                    numbers[j] = NAME(load)(some + (j * words + word) * LANES);
                for (int i = 0; i < DOWN; i++)
                    for (int j = 0; j < ACROSS; j++)
                        sums[i][j] += NAME(splat)(own[i * words + word]) * numbers[j];
            }
            for (int i = 0; i < DOWN; i++)
                for (int j = 0; j < ACROSS; j++)
                    NAME(store)(out + (row + i) * PITCH + slot + j * LANES, sums[i][j]);
        }
}
#endif

/* A query's products with `width` slots, of which it sees the first `seen`, become 2 to the power of
 * what they lie below the largest so far, times `scale`; `sum` is of these, for all slots so far. */
INLINE void NAME(weigh)(float *products, int64_t width, int64_t seen, float scale, float *largest,
                        Floats *sum)
{
    for (int64_t slot = seen > 0 ? seen : 0; slot < width; slot++)
        products[slot] = -INFINITY;
    Floats tops[ACROSS];
    for (int i = 0; i < ACROSS; i++)
        tops[i] = NAME(splat)(*largest);
    for (int64_t slot = 0; slot < width; slot += ACROSS * LANES)
        for (int i = 0; i < ACROSS; i++)
            tops[i] = NAME(larger)(NAME(load)(products + slot + i * LANES), tops[i]);
    for (int i = 1; i < ACROSS; i++)
        tops[0] = NAME(larger)(tops[i], tops[0]);
    const float top = NAME(largest)(tops[0]);
    if (top > *largest)
        *sum *= NAME(power)(NAME(splat)((*largest - top) * scale));
    *largest = top;
    Floats parts = *sum;
    for (int64_t slot = 0; slot < width; slot += LANES) {
        const Floats weights = NAME(power)((NAME(load)(products + slot) - top) * scale);
        NAME(store)(products + slot, weights);
        parts += weights;
    }
    *sum = parts;
}

/* Add to `columns` the weights [rows, PITCH] of every `apart`th row from `first` on, times its
 * factor; their squares where `square`. */
INLINE void NAME(add)(const float *weights, const float *factors, int first, int rows, int apart,
                      int64_t width, int square, float *columns)
{
    for (int64_t slot = 0; slot < width; slot += ACROSS * LANES) {
        Floats sums[ACROSS];
        for (int j = 0; j < ACROSS; j++)
            sums[j] = (Floats){0};
        for (int row = first; row < rows; row += apart)
            for (int j = 0; j < ACROSS; j++) {
                const Floats own = NAME(load)(weights + row * PITCH + slot + j * LANES);
                const Floats share = own * NAME(splat)(factors[row]);
                sums[j] += square ? share * share : share;
            }
        for (int j = 0; j < ACROSS; j++)
            NAME(store)(columns + slot + j * LANES,
                        NAME(load)(columns + slot + j * LANES) + sums[j]);
    }
}

/* Add to `columns` [group or 1, pitch] what ROWS queries of a KV head give: the `first` and those
 * behind it, where the heads of a group take turns. `scores` has room for all of their products. */
static void NAME(vote)(const Step *step, const char *queries, const float *keys, int64_t first,
                       float *scores, float *columns, int64_t pitch)
{
    const int64_t words = NAME(words)(step), group = step->group;
    const int64_t left = step->queries * group - first;
    const int rows = left < ROWS ? left : ROWS, apart = step->fold ? 1 : group;
    const float scale = step->scale;
    _Alignas(64) float query[ROWS * WIDEST];
    float largest[ROWS], factors[ROWS], inverse[ROWS];
    int64_t seen[ROWS];
    Floats sums[ROWS];
    for (int row = 0; row < ROWS; row++) {
        const int64_t head = (first + row) % group, at = (first + row) / group;
        if (row < rows)
            NAME(read)(step, queries + head * step->query_head + at * step->query_step,
                       query + row * words);
        else
            memset(query + row * words, 0, words * sizeof *query);
        seen[row] = step->causal ? step->slots - step->queries + at + 1 : step->slots;
        largest[row] = -INFINITY;
        sums[row] = (Floats){0};
    }
#if IN_TILES
    _tile_loadconfig(&ALIKE);
#endif
    for (int64_t start = 0; start < seen[rows - 1]; start += BLOCK) {
        float *own = scores + start / BLOCK * SCORES;
        const int64_t width = spans(start, seen[rows - 1]);
        for (int64_t slot = 0; slot < width; slot += SPAN)
            NAME(multiply)(query, keys + (start + slot) * words, words, rows, own + slot);
        for (int row = 0; row < rows; row++) {
            NAME(weigh)(own + row * PITCH, width, seen[row] - start, scale, largest + row, sums + row);
            own[ROWS * PITCH + row] = largest[row];
        }
    }
#if IN_TILES
    _tile_release();
#endif
    for (int row = 0; row < ROWS; row++)
        inverse[row] = row < rows ? 1 / NAME(total)(sums[row]) : 0;
    for (int64_t start = 0; start < seen[rows - 1]; start += BLOCK) {
        const float *own = scores + start / BLOCK * SCORES, *then = own + ROWS * PITCH;
        for (int row = 0; row < rows; row += LANES)
            NAME(store)(factors + row,
                        NAME(power)((NAME(load)(then + row) - NAME(load)(largest + row)) * scale) *
                            NAME(load)(inverse + row));
        const int64_t width = spans(start, seen[rows - 1]);
        for (int head = 0; head < apart; head++) {
            const int top = (head + group - first % group) % group % apart;
            float *to = columns + head * pitch + start;
            if (step->square)
                NAME(add)(own, factors, top, rows, apart, width, 1, to);
            else
                NAME(add)(own, factors, top, rows, apart, width, 0, to);
        }
    }
}

#undef Floats
#undef ACROSS
