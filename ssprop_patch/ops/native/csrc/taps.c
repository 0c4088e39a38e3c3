/* Sums of a weight's rows over their taps, and rows whose taps are all one number; see common.h.

   A row of a weight has c numbers of `taps` taps each: side by side, or (`last`, channels_last) one
   tap of all c after the other. Tap t counts with shares[t]. */

#include "common.h"
#include "vector.h"

/* --- sum_taps ----------------------------------------------------------------------------------- */

INLINE void sums_of_taps(
    const T *restrict row, int64_t c, const T *restrict shares, T *restrict out, int64_t taps)
{
    for (int64_t i = 0; i < c; i++, row += taps) {
        T sum = 0;
        for (int64_t t = 0; t < taps; t++)
            sum += row[t] * shares[t];
        out[i] = sum;
    }
}

INLINE void sums_of_planes(
    const T *restrict row, int64_t c, const T *restrict shares, int64_t taps, T *restrict out)
{
    memset(out, 0, c * sizeof(T));
    for (int64_t t = 0; t < taps; t++, row += c)
#pragma omp simd
        for (int64_t i = 0; i < c; i++)
            out[i] += row[i] * shares[t];
}

/* Of the k rows in `index` of a weight of c_out: (k, c). */
int sum_taps(
    const T *w, const int64_t *index, int64_t k, int64_t c_out, int64_t c, int64_t taps, int last,
    const T *shares, T *out, int threads)
{
    if (!are_channels(index, k, c_out, 0))
        return BAD_INDEX;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < k; j++) {
        const T *row = w + index[j] * c * taps;
        if (last)
            sums_of_planes(row, c, shares, taps, out + j * c);
        else if (taps == 9) /* as usual: unrolled */
            sums_of_taps(row, c, shares, out + j * c, 9);
        else
            sums_of_taps(row, c, shares, out + j * c, taps);
    }
    return DONE;
}

/* --- put_taps ----------------------------------------------------------------------------------- */

/* Which number of a vector goes to each place of another. */
typedef __typeof__(_Generic((T)0, float: (int32_t)0, default: (int64_t)0)) Place;
typedef Place Places __attribute__((vector_size(BYTES), aligned(sizeof(T))));

/* Of a vector of numbers come `taps` vectors, in which each stands `taps` times: a processor has an
   instruction for that. The last numbers, fewer than a vector, and those of a compiler that has no
   word for it, are written one by one. */
static void spread_to_taps(
    const T *restrict from, int64_t c, int64_t taps, const Places *places, const V *shares,
    T *restrict row)
{
    int64_t i = 0;
#ifndef __clang__
    for (; i + LANES <= c; i += LANES) {
        V numbers = *(const V *)(from + i);
        for (int64_t t = 0; t < taps; t++, row += LANES)
            *(V *)row = __builtin_shuffle(numbers, places[t]) * shares[t];
    }
#endif
    for (; i < c; i++, row += taps)
        for (int64_t t = 0; t < taps; t++)
            row[t] = from[i] * ((const T *)shares)[t];
}

/* Writes the k rows in `index` of a weight of c_out: each tap is the number in `rows`, (k, c), times
   its share. */
int put_taps(
    const T *rows, const int64_t *index, int64_t k, int64_t c_out, int64_t c, int64_t taps,
    int last, const T *shares, T *dw, int threads)
{
    if (!are_channels(index, k, c_out, 0))
        return BAD_INDEX;
    V *vectors = NULL;
    Places *places = NULL;
    if (!last) {
        vectors = malloc(taps * sizeof(V));
        places = malloc(taps * sizeof(Places));
        if (!vectors || !places) {
            free(vectors);
            free(places);
            return NO_MEMORY;
        }
        for (int64_t i = 0; i < taps * LANES; i++) {
            vectors[i / LANES][i % LANES] = shares[i % taps];
            places[i / LANES][i % LANES] = i / taps;
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < k; j++) {
        const T *from = rows + j * c;
        T *row = dw + index[j] * c * taps;
        if (!last) {
            spread_to_taps(from, c, taps, places, vectors, row);
            continue;
        }
        for (int64_t t = 0; t < taps; t++, row += c)
#pragma omp simd
            for (int64_t i = 0; i < c; i++)
                row[i] = from[i] * shares[t];
    }
    free(vectors);
    free(places);
    return DONE;
}
