/* Vectors of LANES floats; NAME gives what is compiled for them a name of its own. */

#define Floats NAME(Floats)

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(Order) __attribute__((vector_size(4 * LANES)));

INLINE Floats NAME(load)(const float *from)
{
    Floats vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE void NAME(store)(float *to, Floats vector) { memcpy(to, &vector, sizeof vector); }

INLINE Floats NAME(splat)(float number) { return number - (Floats){0}; }
