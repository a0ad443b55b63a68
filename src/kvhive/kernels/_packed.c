/* Attention's two products with rows of packed numbers, on a CPU: `logits` and `mix` of
 * packed_reference.py, which says what they do. Plain C with a C ABI; native.py calls it.
 *
 * A few tokens at a time become a byte for each number, and go from there to registers. Their body,
 * _packed_rows.h, is compiled once for each set of instructions, with LANES floats in a vector.
 */

#include "_basics.h"

enum { HEADS = 8 };    /* queries that share one unpacking */
enum { TILE = 4 };     /* queries that share one look at a token */
enum { BLOCK = 4096 }; /* numbers that are unpacked at a time */
enum { WORTH = 65536 }; /* numbers that are worth one more thread */
enum Grids { NONE, SPLAT, SPREAD }; /* a run's; a token's, of whole vectors; a token's, of others */

/* Written by native.py, 8 bytes each. Strides count floats. */
typedef struct {
    int64_t lanes, threads, bits, width, group, dtype;
    int64_t in_runs;                           /* whether grids are those of runs */
    int64_t rows, heads, slots, marks, places; /* R, G, S, M, N */
    int64_t dense_row, dense_head, scores_row, scores_head;
    float *dense;                              /* [R, G, width]: queries, or the output of mix */
    float *scores;                             /* [R, G, N]: logits, or weights */
    const uint8_t *codes;                      /* [S, width * bits / 8] */
    const void *grids;                         /* [M, 2, width / group] */
    const int32_t *ends;                       /* [M] */
    const int64_t *at, *starts, *lengths;      /* [R] */
    const int64_t *run_starts, *run_counts;    /* [R] */
} Job;

/* The same for numbers that are to be packed: a grid for each token, or for each run of them. */
typedef struct {
    int64_t lanes, threads, bits, width, group, dtype;
    int64_t in_runs, tokens, runs;
    const float *numbers; /* [tokens, width] */
    const int64_t *ends;  /* [runs]: the token behind each run */
    uint8_t *codes;       /* [tokens, width * bits / 8] */
    void *grids;          /* [tokens or runs, 2, width / group] */
} Coding;

typedef uint64_t Words __attribute__((vector_size(16)));

/* The bits of the nearest float16; halves go to even. */
INLINE uint16_t as_half(float number)
{
    const uint32_t sign = as_bits(number) & 0x80000000, rest = as_bits(number) ^ sign;
    const uint32_t whole = rest > 0x7f800000 ? 0x7e00 : 0x7c00; /* no number, or infinite */
    const uint32_t small = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
    const uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    return (rest >= 0x47800000 ? whole : rest < 0x38800000 ? small : normal) | sign >> 16;
}

/* The bits of the nearest bfloat16; halves go to even. */
INLINE uint16_t as_brain(float number)
{
    const uint32_t bits = as_bits(number);
    return number != number ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Numbers first..first+count-1 of the grids. */
INLINE void grids(const Job *job, int64_t first, int64_t count, float *to)
{
    widen((const char *)job->grids + first * (job->dtype == FLOAT32 ? 4 : 2), job->dtype, count, to);
}

/* Of each byte, (byte >> shift & mask) << up: of a word of any type, at `from`; added to what is at
 * `to` where `up` is not 0. */
#define MOVE(Word, from, to) \
    do { \
        Word word, held; \
        memcpy(&word, from, sizeof word); \
        memcpy(&held, to, sizeof held); \
        word = (word >> shift & ((Word){0} + mask * UINT64_C(0x0101010101010101))) << up; \
        word = up ? word | held : word; \
        memcpy(to, &word, sizeof word); \
    } while (0)

/* `count` bytes; where they fill no whole words, the last of them are done once more. */
INLINE void piece(const uint8_t *from, uint8_t *to, int64_t count, int shift, int mask, int up)
{
    int64_t i = 0;
    if (count >= 16) {
        for (; i + 16 <= count; i += 16)
            MOVE(Words, from + i, to + i);
        if (i < count)
            MOVE(Words, from + count - 16, to + count - 16);
    } else if (count >= 8) {
        MOVE(uint64_t, from, to);
        if (count > 8)
            MOVE(uint64_t, from + count - 8, to + count - 8);
    } else
        for (; i < count; i++)
            to[i] = (up ? to[i] : 0) | (from[i] >> shift & mask) << up;
}

/* Codes of tokens, `pitch` bytes apart. */
INLINE void unpack_bits(const uint8_t *from, int64_t tokens, int64_t width, int bits, uint8_t *to,
                        int64_t pitch)
{
    const int low = bits == 3 ? 2 : bits, pieces = 8 / low;
    const int64_t size = width / pieces, eighth = width / 8;
    for (; tokens > 0; tokens--, from += width * bits / 8, to += pitch) {
        for (int i = 0; i < pieces; i++)
            piece(from, to + i * size, size, i * low, (1 << low) - 1, 0);
        for (int i = 0; bits == 3 && i < 8; i++)
            piece(from + size, to + i * eighth, eighth, i, 1, 2);
    }
}

/* Compiled for the widths that models have most. */
INLINE void unpack(const uint8_t *from, int64_t tokens, int64_t width, int64_t bits, uint8_t *to,
                   int64_t pitch)
{
#define UNPACK(bits) \
    case bits: \
        if (width == 64) \
            unpack_bits(from, tokens, 64, bits, to, pitch); \
        else if (width == 128) \
            unpack_bits(from, tokens, 128, bits, to, pitch); \
        else \
            unpack_bits(from, tokens, width, bits, to, pitch); \
        break;
    switch (bits) { UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(8) }
#undef UNPACK
}

/* The reverse for one token. */
INLINE void pack_bits(const uint8_t *from, int64_t width, int bits, uint8_t *to)
{
    const int low = bits == 3 ? 2 : bits, pieces = 8 / low;
    const int64_t size = width / pieces, eighth = width / 8;
    for (int i = 0; i < pieces; i++)
        piece(from + i * size, to, size, 0, (1 << low) - 1, i * low);
    for (int i = 0; bits == 3 && i < 8; i++)
        piece(from + i * eighth, to + size, eighth, 2, 1, i);
}

INLINE void pack(const uint8_t *from, int64_t width, int64_t bits, uint8_t *to)
{
#define PACK(bits) \
    case bits: \
        if (width == 64) \
            pack_bits(from, 64, bits, to); \
        else if (width == 128) \
            pack_bits(from, 128, bits, to); \
        else \
            pack_bits(from, width, bits, to); \
        break;
    switch (bits) { PACK(2) PACK(3) PACK(4) PACK(8) }
#undef PACK
}

/* Store grids as numbers first..first+count-1, and leave in `own` what they have become. */
INLINE void put_grids(const Coding *job, int64_t first, float *own, int64_t count)
{
    uint16_t *halves = (uint16_t *)job->grids + first;
    if (job->dtype == FLOAT32)
        memcpy((float *)job->grids + first, own, count * sizeof *own);
    else if (job->dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) {
            halves[i] = as_brain(own[i]);
            own[i] = as_float((uint32_t)halves[i] << 16);
        }
    else
        for (int64_t i = 0; i < count; i++) {
            halves[i] = as_half(own[i]);
            own[i] = half(halves[i]);
        }
}

/* A number's code. Adding 2^23 rounds to a whole number, halves to even, in the lowest bits. */
INLINE uint8_t code(float number, float scale, float zero, float top)
{
    float steps = (number - zero) / scale;
    steps = steps > 0 ? steps : 0; /* 0 / 0 too */
    steps = steps < top ? steps : top;
    return as_bits(steps + 0x1p23f);
}

/* Sums in eight parts, which the compiler keeps in vectors. */
INLINE float dot(const float *one, const float *other, int64_t count)
{
    float parts[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++)
            parts[j] += one[i + j] * other[i + j];
    for (; i < count; i++)
        parts[0] += one[i] * other[i];
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) +
           ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

INLINE float total(const float *numbers, int64_t count)
{
    float parts[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++)
            parts[j] += numbers[i + j];
    for (; i < count; i++)
        parts[0] += numbers[i];
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) +
           ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

#define LANES 4
#define NAME(name) name##_4
#include "_floats.h"
#include "_packed_rows.h"
#include "_packed_coding.h"
#undef Floats
#undef LANES
#undef NAME

#if defined(__x86_64__)
TARGET(AVX2)
#define LANES 8
#define NAME(name) name##_8
#include "_floats.h"
#include "_packed_rows.h"
#include "_packed_coding.h"
#undef Floats
#undef LANES
#undef NAME
END_TARGET

TARGET(AVX512)
#define LANES 16
#define NAME(name) name##_16
#include "_floats.h"
#include "_packed_rows.h"
#include "_packed_coding.h"
#undef Floats
#undef LANES
#undef NAME
END_TARGET
#endif

static void logits(const Job *job, int64_t row, int64_t top, int heads, int64_t first, int64_t last)
{
#if defined(__x86_64__)
    if (job->lanes == 16)
        return logits_16(job, row, top, heads, first, last);
    if (job->lanes == 8)
        return logits_8(job, row, top, heads, first, last);
#endif
    logits_4(job, row, top, heads, first, last);
}

static void mix(const Job *job, int64_t row, int64_t top, int heads, int64_t first, int64_t last,
                float *out, int64_t apart)
{
#if defined(__x86_64__)
    if (job->lanes == 16)
        return mix_16(job, row, top, heads, first, last, out, apart);
    if (job->lanes == 8)
        return mix_8(job, row, top, heads, first, last, out, apart);
#endif
    mix_4(job, row, top, heads, first, last, out, apart);
}

/* The part of each row that is a thread's. */
static void logits_part(const Job *job, int64_t part, int64_t parts)
{
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t first = job->lengths[row] * part / parts;
        const int64_t last = job->lengths[row] * (part + 1) / parts;
        for (int64_t top = 0; top < job->heads; top += HEADS)
            logits(job, row, top, job->heads - top < HEADS ? job->heads - top : HEADS, first, last);
    }
}

static void mix_part(const Job *job, int64_t part, int64_t parts, float *out, int64_t out_row,
                     int64_t out_head)
{
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t first = job->lengths[row] * part / parts;
        const int64_t last = job->lengths[row] * (part + 1) / parts;
        for (int64_t top = 0; top < job->heads; top += HEADS)
            mix(job, row, top, job->heads - top < HEADS ? job->heads - top : HEADS, first, last,
                out + row * out_row + top * out_head, out_head);
    }
}

/* Whether all that a job names lies inside its arrays. */
static int inside(const Job *job)
{
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t start = job->starts[row], length = job->lengths[row], at = job->at[row];
        if (length == 0)
            continue;
        if (length < 0 || start < 0 || start > job->slots - length || at < 0 ||
            at > job->places - length)
            return 0;
        if (!job->in_runs)
            continue;
        const int64_t run = job->run_starts[row], count = job->run_counts[row];
        if (count < 1 || run < 0 || run > job->marks - count || job->ends[run + count - 1] < length)
            return 0;
    }
    return job->width % job->group == 0 && (job->in_runs || job->marks >= job->slots);
}

#if defined(_OPENMP)
/* Threads that the work is worth. */
static int threads(const Job *job)
{
    int64_t worth = 0;
    for (int64_t row = 0; row < job->rows; row++)
        worth += job->lengths[row] * job->width;
    worth /= WORTH;
    return worth < 1 ? 1 : worth < job->threads ? worth : job->threads;
}
#endif

/* Both return 0, having done nothing, where rows reach beyond their arrays; else 1. */
int64_t kvhive_logits(const Job *job)
{
    if (!inside(job))
        return 0;
#if defined(_OPENMP)
    const int team = threads(job);
#pragma omp parallel num_threads(team) if (team > 1)
    logits_part(job, omp_get_thread_num(), omp_get_num_threads());
#else
    logits_part(job, 0, 1);
#endif
    return 1;
}

int64_t kvhive_mix(const Job *job)
{
    if (!inside(job))
        return 0;
#if defined(_OPENMP)
    const int team = threads(job);
    const int64_t size = job->rows * job->heads * job->width;
    float *others = team > 1 ? calloc((team - 1) * size, sizeof *others) : NULL;
    if (others) {
#pragma omp parallel num_threads(team)
        {
            const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
            if (part == 0)
                mix_part(job, part, parts, job->dense, job->dense_row, job->dense_head);
            else
                mix_part(job, part, parts, others + (part - 1) * size, job->heads * job->width,
                         job->width);
        }
        const float *from = others;
        for (int part = 1; part < team; part++)
            for (int64_t row = 0; row < job->rows; row++)
                for (int64_t head = 0; head < job->heads; head++, from += job->width)
                    for (int64_t i = 0; i < job->width; i++)
                        job->dense[row * job->dense_row + head * job->dense_head + i] += from[i];
        free(others);
        return 1;
    }
#endif
    mix_part(job, 0, 1, job->dense, job->dense_row, job->dense_head);
    return 1;
}

static void code_part(const Coding *job, int64_t part, int64_t parts)
{
    const int64_t count = job->in_runs ? job->runs : job->tokens;
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
#if defined(__x86_64__)
    if (job->lanes == 16)
        return job->in_runs ? code_runs_16(job, first, last) : code_tokens_16(job, first, last);
    if (job->lanes == 8)
        return job->in_runs ? code_runs_8(job, first, last) : code_tokens_8(job, first, last);
#endif
    job->in_runs ? code_runs_4(job, first, last) : code_tokens_4(job, first, last);
}

/* Returns 0, having done nothing, where groups do not fill a token or runs do not fill all tokens;
 * else 1. */
int64_t kvhive_code(const Coding *job)
{
    if (job->width % job->group)
        return 0;
    int64_t end = 0;
    for (int64_t run = 0; job->in_runs && run < job->runs; end = job->ends[run++])
        if (job->ends[run] <= end)
            return 0;
    if (job->in_runs && end != job->tokens)
        return 0;
#if defined(_OPENMP)
    const int64_t worth = job->tokens * job->width / WORTH;
    const int team = worth < 1 ? 1 : worth < job->threads ? worth : job->threads;
#pragma omp parallel num_threads(team) if (team > 1)
    code_part(job, omp_get_thread_num(), omp_get_num_threads());
#else
    code_part(job, 0, 1);
#endif
    return 1;
}
