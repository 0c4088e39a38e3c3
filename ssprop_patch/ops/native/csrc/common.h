/* What all C files share. A tensor of n samples, c channels and s positions is contiguous, or
   (`last`) in channels_last: a matrix of n * s rows of c numbers. Each function reads its tensors as
   seldom as it can, and makes sums in double. Every file is compiled once for each type of number,
   by -DT=float and -DT=double. */

#ifndef COMMON_H
#define COMMON_H

#include "ssprop.h"
#include <stdlib.h>
#include <string.h>

/* This many numbers are summed in their own type before they are added to a double. */
#define BLOCK 2048

#define MAGNITUDE(v, order) ((order) == 1 ? (T)__builtin_fabs(v) : (v) * (v))
/* With the order, and whether there is a ReLU, as constants each loop is vectorised by itself. */
#define BY_ORDER(f, ...) (order == 1 ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 2))
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

INLINE int64_t max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

INLINE int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Whether `index` holds channels of c, ascending if that is asked for. What reads or writes at an
   index asks this first: next to the rest it takes no time. */
INLINE int are_channels(const int64_t *index, int64_t k, int64_t c, int ascending)
{
    for (int64_t j = 0; j < k; j++)
        if (index[j] < 0 || index[j] >= c || (ascending && j && index[j] <= index[j - 1]))
            return 0;
    return 1;
}

/* Whether `index` holds as many channels of each group as `s` says, ascending. */
static inline int are_kept_channels(const int64_t *index, const ConvShape *s)
{
    int64_t size = s->depthwise ? s->c_out : s->c_out / s->groups;
    int64_t each = s->depthwise ? s->computed : s->kept;
    for (int64_t j = 0; j < s->computed * s->kept; j++)
        if (index[j] / size != j / each)
            return 0;
    return are_channels(index, s->computed * s->kept, s->c_out, 1);
}

#endif
