/* What two_resolutions.c and two_side_by_side.c share. */

#ifndef TWO_RESOLUTIONS_H
#define TWO_RESOLUTIONS_H

#include "common.h"

#define BY_RELU(f, ...) (relu ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 0))

/* The gradient behind a ReLU with the output r; as in torch a nan passes it. */
INLINE T passed(T d, T r, int relu)
{
    return relu && r <= 0 ? 0 : d;
}

/* Positions of row a of cells, and of cell (a, b). */
INLINE int64_t rows_in(const CellShape *s, int64_t a)
{
    return min(s->size[0], s->length[0] - a * s->size[0]);
}

INLINE int64_t columns_in(const CellShape *s, int64_t b)
{
    return min(s->size[1], s->length[1] - b * s->size[1]);
}

/* What a kept or a dropped channel passes on, (x - mean) * slope and a shift taken off. */
typedef struct {
    T mean, invstd, scale, shift, slope;
} Norm;

INLINE void settle(Norm *norm, double a, double b, T per_position)
{
    norm->shift = (T)a * per_position;
    norm->slope = (T)b * norm->invstd * norm->invstd * per_position;
}

/* The functions of two_resolutions.c for channels that lie side by side. */

void norm_side_by_side(
    const T *kept, const T *sums, const T *counts, const T *r, const T *x, const T *mean,
    const T *invstd, const T *weight, const int64_t *index, int64_t k, int64_t n, int64_t c,
    const CellShape *s, int relu, T *restrict dy, T *restrict out, T *restrict both,
    double *restrict work, T *line, T *xs, int threads);

void relu_side_by_side(
    const T *kept, const T *sums, const T *counts, const T *r, const int64_t *index, int64_t k,
    int64_t n, int64_t c, const CellShape *s, T *restrict dy, T *restrict out, T *line, int threads);

void positive_side_by_side(
    const T *x, int64_t n, int64_t c, const CellShape *s, T *sums, T *counts, const T *zeros,
    int threads);

#endif
