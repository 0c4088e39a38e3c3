/* What the passes over memory of a sparse backward have in common.

   Each reads its tensors as seldom as it can. A tensor of n samples, c channels and s positions is
   contiguous, or (`last`) in channels_last: a matrix of n * s rows of c numbers. Sums are made in
   double. Compiled once for each type of number, by -DT=float and -DT=double. */

#include <stdint.h>
#include <string.h>

/* What the functions return that can fail: the numbers of native/tensors.py. */
enum { NO_MEMORY, DONE, BAD_INDEX, NOT_FINITE };

/* So many numbers are summed in their own type before they are added to a double. */
#define BLOCK 2048

#define MAGNITUDE(v, order) ((order) == 1 ? (T)__builtin_fabs(v) : (v) * (v))
/* With the order, and whether there is a ReLU, as constants each loop is vectorised by itself. */
#define BY_ORDER(f, ...) (order == 1 ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 2))
#define INLINE static inline __attribute__((always_inline))

/* Whether `index` holds channels of c, ascending if that is asked for. What reads or writes at an
   index asks this first: it takes no time beside the rest. */
INLINE int are_channels(const int64_t *index, int64_t k, int64_t c, int ascending)
{
    for (int64_t j = 0; j < k; j++)
        if (index[j] < 0 || index[j] >= c || (ascending && j && index[j] <= index[j - 1]))
            return 0;
    return 1;
}
