/* The attention that keys receive in a step, summed over its queries, on a CPU, without attending:
 * `columns` of reference.py. Plain C with a C ABI; native_columns.py calls it.
 *
 * ROWS queries of a KV head at a time meet all slots they see: products, weights below the largest
 * so far, and, once the sum of them is known, their shares. Nothing is worked out twice, and scratch
 * is ROWS x slots a thread, beside the keys. The body, _columns_tile.h, is compiled
 * once for each set of instructions.
 */

#include "_basics.h"
#include <math.h>

enum { ROWS = 32 };                          /* queries at a time */
enum { DOWN = 4 };                           /* of which these share a look at a key's word */
enum { SPAN = 64 };                          /* slots that are multiplied at a time */
enum { BLOCK = 256 };                        /* slots that are weighed at a time */
enum { PITCH = BLOCK + 16 };                 /* between rows, lest they share a line of the cache */
enum { SCORES = ROWS * PITCH + ROWS };       /* a block: weights, and the largest product of each row */
enum { WORTH = 1 << 22 };                    /* products that are worth one more thread */

/* Written by native_columns.py, 8 bytes each. Strides count bytes. */
typedef struct {
    int64_t lanes, tiles, threads, dtype;
    int64_t causal, square, fold;
    int64_t batch, kv_heads, group, queries, slots, width; /* b, K, H / K, q, n, d */
    int64_t query_row, query_head, query_step, key_row, key_head, key_step;
    const char *query; /* [b, H, q, d] */
    const char *keys;  /* [b, K, n, d] */
    float *columns;    /* [b, K or H, n] */
    double scale;      /* of exponents of 2 */
} Step;

/* Slots from `start` on that a block works out where `last` are seen: whole spans. */
INLINE int64_t spans(int64_t start, int64_t last)
{
    const int64_t width = (last - start + SPAN - 1) / SPAN * SPAN;
    return width < BLOCK ? width : BLOCK;
}

#define IN_TILES 0
#define LANES 4
#define NAME(name) name##_4
#include "_columns_tile.h"
#undef LANES
#undef NAME

#if defined(__x86_64__)
TARGET(AVX2)
#define LANES 8
#define NAME(name) name##_8
#include "_columns_tile.h"
#undef LANES
#undef NAME
END_TARGET

TARGET(AVX512)
#define LANES 16
#define NAME(name) name##_16
#include "_columns_tile.h"
#undef NAME
END_TARGET
#undef IN_TILES

#if defined(TILES)
/* What AMX is told: eight tiles of 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} ALIKE = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

TARGET(AVX512 ",amx-tile,amx-bf16")
#define IN_TILES 1
#define NAME(name) name##_tiles
#include "_columns_tile.h"
#undef IN_TILES
#undef NAME
END_TARGET
#endif
#endif

/* The body that serves a step. */
typedef struct {
    int64_t (*words)(const Step *);
    void (*arrange)(const Step *, const char *, int64_t, int64_t, float *);
    void (*vote)(const Step *, const char *, const float *, int64_t, float *, float *, int64_t);
} Body;

#define BODY(name) (Body){words_##name, arrange_##name, vote_##name}

static Body chosen(const Step *step)
{
#if defined(TILES)
    if (step->dtype == BFLOAT16 && step->tiles)
        return BODY(tiles);
#endif
#if defined(__x86_64__)
    if (step->lanes == 16)
        return BODY(16);
    if (step->lanes == 8)
        return BODY(8);
#endif
    return BODY(4);
}

/* Floats that lie one behind the other: all keys as they are arranged, and for each of a team of
 * threads scores and columns of its own. */
typedef struct {
    int64_t team, pitch;  /* threads; slots, filled up to whole spans */
    int64_t keys, columns; /* of one KV head */
    int64_t scores, apart; /* of a thread; from a thread's to the next one's */
    float *all;
} Scratch;

/* What thread `part` of `parts` does first: its share of every KV head's keys. */
static void arrange(const Step *step, const Body *body, const Scratch *scratch, int64_t part,
                    int64_t parts)
{
    const int64_t spans = scratch->pitch / SPAN;
    for (int64_t head = 0; head < step->batch * step->kv_heads; head++)
        body->arrange(step,
                      step->keys + head / step->kv_heads * step->key_row +
                          head % step->kv_heads * step->key_head,
                      spans * part / parts * SPAN, spans * (part + 1) / parts * SPAN,
                      scratch->all + head * scratch->keys);
}

/* Then, all keys being arranged: queries, by turns, into columns of its own, `scores` apart. */
static void vote(const Step *step, const Body *body, const Scratch *scratch, int64_t part,
                 int64_t parts, float *scores)
{
    const int64_t all = step->batch * step->kv_heads;
    float *columns = scores + scratch->scores;
    memset(columns, 0, all * scratch->columns * sizeof *columns);
    for (int64_t head = 0, turn = 0; head < all; head++)
        for (int64_t first = 0; first < step->queries * step->group; first += ROWS, turn++)
            if (turn % parts == part)
                body->vote(step,
                           step->query + head / step->kv_heads * step->query_row +
                               head % step->kv_heads * step->group * step->query_head,
                           scratch->all + head * scratch->keys, first, scores,
                           columns + head * scratch->columns, scratch->pitch);
}

/* At last: its share of slots, summed in the order of threads. */
static void sum(const Step *step, const Scratch *scratch, int64_t part, int64_t parts,
                const float *columns)
{
    const int64_t from = step->slots * part / parts, to = step->slots * (part + 1) / parts;
    const int64_t heads = step->batch * step->kv_heads * (step->fold ? 1 : step->group);
    for (int64_t head = 0; head < heads; head++)
        for (int64_t slot = from; slot < to; slot++) {
            float total = 0;
            for (int64_t other = 0; other < parts; other++)
                total += columns[other * scratch->apart + head * scratch->pitch + slot];
            step->columns[head * step->slots + slot] = total;
        }
}

/* Returns 0, having done nothing, where there is no room for scratch; else 1. */
int64_t kvhive_columns(const Step *step)
{
    const Body body = chosen(step);
    const int64_t all = step->batch * step->kv_heads;
    Scratch scratch = {.team = 1, .pitch = (step->slots + SPAN - 1) / SPAN * SPAN};
#if defined(_OPENMP)
    const int64_t worth = all * step->queries * step->group * step->slots * step->width / WORTH;
    scratch.team = worth < 1 ? 1 : worth < step->threads ? worth : step->threads;
#endif
    scratch.keys = scratch.pitch * body.words(step);
    scratch.columns = (step->fold ? 1 : step->group) * scratch.pitch;
    scratch.scores = (step->slots + BLOCK - 1) / BLOCK * SCORES;
    scratch.apart = scratch.scores + all * scratch.columns;
    scratch.all =
        aligned_alloc(64, (all * scratch.keys + scratch.team * scratch.apart) * sizeof(float));
    if (!scratch.all)
        return 0;
    float *own = scratch.all + all * scratch.keys;
#if defined(_OPENMP)
#pragma omp parallel num_threads(scratch.team) if (scratch.team > 1)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        arrange(step, &body, &scratch, part, parts);
#pragma omp barrier
        vote(step, &body, &scratch, part, parts, own + part * scratch.apart);
#pragma omp barrier
        sum(step, &scratch, part, parts, own + scratch.scores);
    }
#else
    arrange(step, &body, &scratch, 0, 1);
    vote(step, &body, &scratch, 0, 1, own);
    sum(step, &scratch, 0, 1, own + scratch.scores);
#endif
    free(scratch.all);
    return 1;
}
