/* The body of _packed.c for vectors of LANES floats; NAME gives its functions names of their own. */

#define Block NAME(Block)
#define AT_ONCE (LANES == 16 ? 4 : 2) /* vectors of numbers that the registers hold beside sums */

enum { NAME(ROOM) = BLOCK > WIDEST * LANES ? BLOCK : WIDEST * LANES };

/* Tokens at hand: a byte for each code, and grids of their own where runs have none. */
typedef struct {
    int64_t pitch;         /* a token's numbers, filled up to whole vectors */
    int64_t most;          /* tokens that a block has room for: whole vectors of them */
    enum Grids kind;
    int64_t step;          /* floats from a token's scales to its zeros */
    const uint8_t *codes;  /* [tokens, pitch] */
    uint8_t of[WIDEST / LANES];   /* SPLAT: the group of each vector */
    uint8_t room[NAME(ROOM)];
    float grids[2 * NAME(ROOM)];   /* [tokens, 2, step] */
} Block;

INLINE Floats NAME(widened)(const uint8_t *from)
{
#if LANES == 16
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
#elif LANES == 8
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    return (Floats){from[0], from[1], from[2], from[3]};
#endif
}

/* Sums of neighbours: those of `low`, then those of `high`. */
INLINE Floats NAME(halved)(Floats low, Floats high)
{
#if LANES == 16
    return SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14) +
           SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(low, high, 0, 2, 4, 6) + SHUFFLE(low, high, 1, 3, 5, 7);
#endif
}

static void NAME(prepare)(Block *block, const Job *job)
{
    const int64_t groups = job->width / job->group;
    block->pitch = (job->width + LANES - 1) / LANES * LANES;
    block->most = BLOCK / block->pitch / LANES * LANES;
    if (block->most == 0)
        block->most = LANES;
    block->kind = job->in_runs ? NONE : job->group % LANES == 0 ? SPLAT : SPREAD;
    block->step = block->kind == SPLAT ? groups : block->pitch;
    for (int64_t vector = 0; block->kind == SPLAT && vector < block->pitch / LANES; vector++)
        block->of[vector] = vector * LANES / job->group;
}

/* Fill the block with tokens first..last-1 of the flat array. */
static void NAME(fill)(Block *block, const Job *job, int64_t first, int64_t last)
{
    const int64_t step = block->step, groups = job->width / job->group;
    const uint8_t *codes = job->codes + first * job->width * job->bits / 8;
    if (job->bits == 8 && job->width == block->pitch)
        block->codes = codes;
    else {
        block->codes = block->room;
        unpack(codes, last - first, job->width, job->bits, block->room, block->pitch);
    }
    if (block->kind == SPLAT)
        grids(job, first * 2 * groups, (last - first) * 2 * groups, block->grids);
    for (int64_t token = 0; block->kind == SPREAD && token < 2 * (last - first); token++) {
        float own[WIDEST], *to = block->grids + token * step;
        grids(job, (2 * first + token) * groups, groups, own);
        for (int64_t at = 0; at < step; at++)
            to[at] = at < job->width ? own[at / job->group] : 0;
    }
}

/* LANES numbers of a token from the `at`th on, `group` being theirs where all have the same: codes
 * alone, where the grid is a run's. */
INLINE Floats NAME(numbers)(const Block *block, enum Grids kind, int64_t token, int64_t at,
                            int64_t group)
{
    const Floats codes = NAME(widened)(block->codes + token * block->pitch + at);
    const float *grid = block->grids + token * 2 * block->step + (kind == SPLAT ? group : at);
    if (kind == SPLAT)
        return codes * NAME(splat)(grid[0]) + NAME(splat)(grid[block->step]);
    if (kind == SPREAD)
        return codes * NAME(load)(grid) + NAME(load)(grid + block->step);
    return codes;
}

/* out[head]: products of queries [heads, pitch] with `count` tokens (at most LANES) from the
 * `first` on. A few tokens at a time share a look at the queries. */
INLINE void NAME(dots)(const Block *block, enum Grids kind, int64_t first, int64_t count,
                       const float *query, int heads, float out[TILE][LANES])
{
    const int64_t pitch = block->pitch;
    Floats parts[TILE][LANES];
    for (int64_t token = 0; token < count; token += AT_ONCE) {
        Floats sums[TILE][AT_ONCE], numbers[AT_ONCE];
        int64_t own[AT_ONCE]; /* the last token stands in for those beyond it */
        for (int i = 0; i < AT_ONCE; i++)
            own[i] = first + (token + i < count ? token + i : count - 1);
        for (int head = 0; head < heads; head++)
            for (int i = 0; i < AT_ONCE; i++)
                sums[head][i] = (Floats){0};
        for (int64_t at = 0; at < pitch; at += LANES) {
            const int64_t group = kind == SPLAT ? block->of[at / LANES] : 0;
            for (int i = 0; i < AT_ONCE; i++)
                numbers[i] = NAME(numbers)(block, kind, own[i], at, group);
            for (int head = 0; head < heads; head++)
                for (int i = 0; i < AT_ONCE; i++)
                    sums[head][i] += numbers[i] * NAME(load)(query + head * pitch + at);
        }
        for (int head = 0; head < heads; head++)
            for (int i = 0; i < AT_ONCE; i++)
                parts[head][token + i] = sums[head][i];
    }
    for (int head = 0; head < heads; head++) {
        for (int left = LANES / 2; left; left /= 2)
            for (int i = 0; i < left; i++)
                parts[head][i] = NAME(halved)(parts[head][2 * i], parts[head][2 * i + 1]);
        NAME(store)(out[head], parts[head][0]);
    }
}

/* Add `count` tokens, weighed, to `vectors` vectors of sums [heads, pitch] from the `at`th number
 * on. */
INLINE void NAME(add)(const Block *block, enum Grids kind, int64_t count, const float *weights,
                      int64_t apart, int heads, int64_t at, int vectors, float *sums)
{
    const int64_t pitch = block->pitch;
    Floats own[TILE][AT_ONCE], numbers[AT_ONCE];
    int64_t groups[AT_ONCE];
    for (int i = 0; i < vectors; i++)
        groups[i] = kind == SPLAT ? block->of[at / LANES + i] : 0;
    for (int head = 0; head < heads; head++)
        for (int i = 0; i < vectors; i++)
            own[head][i] = NAME(load)(sums + head * pitch + at + i * LANES);
    for (int64_t token = 0; token < count; token++) {
        for (int i = 0; i < vectors; i++)
            numbers[i] = NAME(numbers)(block, kind, token, at + i * LANES, groups[i]);
        for (int head = 0; head < heads; head++)
            for (int i = 0; i < vectors; i++)
                own[head][i] += NAME(splat)(weights[head * apart + token]) * numbers[i];
    }
    for (int head = 0; head < heads; head++)
        for (int i = 0; i < vectors; i++)
            NAME(store)(sums + head * pitch + at + i * LANES, own[head][i]);
}

INLINE void NAME(adds)(const Block *block, enum Grids kind, int64_t count, const float *weights,
                       int64_t apart, int heads, float *sums)
{
    const int64_t pitch = block->pitch;
    int64_t at = 0;
    for (; at + AT_ONCE * LANES <= pitch; at += AT_ONCE * LANES)
        NAME(add)(block, kind, count, weights, apart, heads, at, AT_ONCE, sums);
    for (; at < pitch; at += LANES)
        NAME(add)(block, kind, count, weights, apart, heads, at, 1, sums);
}

/* Compiled for each kind of grid and number of heads: CALL(kind, heads). */
#define CASES(kind) \
    case 4 * kind: CALL(kind, 1); break; \
    case 4 * kind + 1: CALL(kind, 2); break; \
    case 4 * kind + 2: CALL(kind, 3); break; \
    case 4 * kind + 3: CALL(kind, 4); break;
#define CHOOSE(kind, heads) \
    switch (4 * (kind) + (heads) - 1) { CASES(NONE) CASES(SPLAT) CASES(SPREAD) }

/* Tokens from `from` on that a block has room for, before `last` and of one run, which is moved on
 * to; 0: there is none left. */
INLINE int64_t NAME(next)(const Block *block, const Job *job, int64_t row, int64_t from,
                          int64_t last, int64_t *run)
{
    int64_t end = from + block->most < last ? from + block->most : last;
    if (!job->in_runs)
        return end - from;
    const int64_t stop = job->run_starts[row] + job->run_counts[row];
    while (*run < stop && job->ends[*run] <= from)
        ++*run;
    if (*run == stop)
        return 0;
    return (job->ends[*run] < end ? job->ends[*run] : end) - from;
}

/* Logits of tokens first..last-1 of a row with `heads` (at most HEADS) queries. */
static void NAME(logits)(const Job *job, int64_t row, int64_t top, int heads, int64_t first,
                         int64_t last)
{
    Block block;
    NAME(prepare)(&block, job);
    const int64_t pitch = block.pitch, width = job->width;
    const float *queries = job->dense + row * job->dense_row + top * job->dense_head;
    float *scores = job->scores + row * job->scores_row + top * job->scores_head + job->at[row];
    float query[HEADS * WIDEST], base[HEADS] = {0}, grid[2 * WIDEST], out[TILE][LANES];
    for (int head = 0; head < heads; head++)
        for (int64_t at = 0; at < pitch; at++)
            query[head * pitch + at] = at < width ? queries[head * job->dense_head + at] : 0;
    int64_t run = job->in_runs ? job->run_starts[row] : 0, folded = -1;
    for (int64_t count; (count = NAME(next)(&block, job, row, first, last, &run)); first += count) {
        NAME(fill)(&block, job, job->starts[row] + first, job->starts[row] + first + count);
        if (job->in_runs && run != folded) {
            grids(job, run * 2 * width, 2 * width, grid);
            for (int head = 0; head < heads; head++) {
                const float *own = queries + head * job->dense_head;
                for (int64_t at = 0; at < width; at++)
                    query[head * pitch + at] = own[at] * grid[at];
                base[head] = dot(own, grid + width, width);
            }
            folded = run;
        }
        for (int64_t token = 0; token < count; token += LANES) {
            const int64_t some = count - token < LANES ? count - token : LANES;
            for (int head = 0; head < heads; head += TILE) {
                const int few = heads - head < TILE ? heads - head : TILE;
#define CALL(kind, number) \
    NAME(dots)(&block, kind, token, some, query + head * pitch, number, out)
                CHOOSE(block.kind, few)
#undef CALL
                for (int i = 0; i < few; i++)
                    for (int64_t j = 0; j < some; j++)
                        scores[(head + i) * job->scores_head + first + token + j] =
                            out[i][j] + base[head + i];
            }
        }
    }
}

/* Add tokens first..last-1 of a row, weighed, to out[head * apart + at]. */
static void NAME(mix)(const Job *job, int64_t row, int64_t top, int heads, int64_t first,
                      int64_t last, float *out, int64_t apart)
{
    Block block;
    NAME(prepare)(&block, job);
    const int64_t pitch = block.pitch, width = job->width;
    const float *weights = job->scores + row * job->scores_row + top * job->scores_head + job->at[row];
    float sums[HEADS * WIDEST], grid[2 * WIDEST];
    int64_t run = job->in_runs ? job->run_starts[row] : 0;
    for (int64_t count; (count = NAME(next)(&block, job, row, first, last, &run)); first += count) {
        NAME(fill)(&block, job, job->starts[row] + first, job->starts[row] + first + count);
        memset(sums, 0, heads * pitch * sizeof *sums);
        for (int head = 0; head < heads; head += TILE) {
            const int few = heads - head < TILE ? heads - head : TILE;
#define CALL(kind, number) \
    NAME(adds)(&block, kind, count, weights + head * job->scores_head + first, job->scores_head, \
               number, sums + head * pitch)
            CHOOSE(block.kind, few)
#undef CALL
        }
        if (job->in_runs)
            grids(job, run * 2 * width, 2 * width, grid);
        for (int head = 0; head < heads; head++) {
            const float *own = sums + head * pitch;
            float *to = out + head * apart;
            if (!job->in_runs) {
                for (int64_t at = 0; at < width; at++)
                    to[at] += own[at];
                continue;
            }
            const float whole = total(weights + head * job->scores_head + first, count);
            for (int64_t at = 0; at < width; at++)
                to[at] += own[at] * grid[at] + whole * grid[width + at];
        }
    }
}

#undef Block
#undef AT_ONCE
#undef CASES
#undef CHOOSE
