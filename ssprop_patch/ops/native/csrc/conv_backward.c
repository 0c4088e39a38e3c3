/* The whole sparse backward of a convolution in one call: of a small layer, calling for the parts
   takes longer than what they do. */

#include "common.h"

/* Compiled with -DSTAMPS, conv_backward writes down how many nanoseconds its parts took, for
   benchmarks/where.py, which asks for that after each call. */
#ifdef STAMPS
#include <time.h>
enum { CHOOSING, GATHERING, WEIGHT, INPUT, ROWS, PARTS };
extern int64_t conv_backward_ns[PARTS];
int64_t conv_backward_ns[PARTS];

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

#define BEGIN_STAMPS int64_t stamp = (memset(conv_backward_ns, 0, sizeof conv_backward_ns), now())
#define STAMP(part) (conv_backward_ns[part] = now() - stamp, stamp = now())
#else
#define BEGIN_STAMPS
#define STAMP(part)
#endif

static int64_t product(const int64_t *sizes)
{
    return sizes[0] * sizes[1] * sizes[2];
}

/* Whether each sample is a row of channels, and the weight a matrix. */
static int are_rows(const ConvShape *s)
{
    int64_t pad = s->padding[0] + s->padding[1] + s->padding[2];
    return s->groups == 1 && product(s->in_size) == 1 && product(s->kernel) == 1 && !pad;
}

/* db, whole. `dy` has the kept channels only. */
int conv_db(const T *dy, const int64_t *index, const ConvShape *s, T *db)
{
    int64_t kept = s->computed * s->kept, size = product(s->out_size);
    if (!are_kept_channels(index, s))
        return BAD_INDEX;
    memset(db, 0, s->c_out * sizeof(T));
    for (int64_t j = 0; j < kept; j++) {
        double sum = 0;
        for (int64_t i = 0; i < s->n; i++)
            for (int64_t at = 0; at < size; at++)
                sum += s->dy_last ? dy[(i * size + at) * kept + j] : dy[(i * kept + j) * size + at];
        db[index[j]] = (T)sum;
    }
    return DONE;
}

/* Chooses k channels of each of `groups` by their sums of |dy| ** order, which goes to `index`, and
   writes dX, dW and db, those that are not NULL. `dy` has all channels, in the format that `s`
   says. NOT_FINITE if conv_dx or conv_dw say so: dX and dW are not to be used then. */
int conv_backward(
    const T *dy, const T *x, const T *w, const ConvShape *s, int order, int64_t groups, int64_t k,
    int64_t *index, T *dx, T *dw, T *db, int threads)
{
    int64_t size = product(s->out_size), kept = groups * k, scores = (threads + 3) * s->c_out;
    int last = s->dy_last || size == 1;
    BEGIN_STAMPS;
    double *work = malloc(scores * sizeof(double) + s->n * kept * size * sizeof(T));
    if (!work)
        return NO_MEMORY;
    T *taken = (T *)(work + scores);
    topk_channels(dy, s->n, s->c_out, size, last, order, groups, k, work, index, threads);
    STAMP(CHOOSING);
    if (last)
        take_channels(dy, index, kept, s->n * size, s->c_out, taken, threads);
    else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < s->n; i++)
            for (int64_t j = 0; j < kept; j++)
                memcpy(taken + (i * kept + j) * size, dy + (i * s->c_out + index[j]) * size,
                       size * sizeof(T));
    }
    STAMP(GATHERING);
    int done = DONE;
    if (are_rows(s)) {
        done = rows_backward(
            taken, x, w, index, s->n, s->c_in, s->c_out, kept, dx, dw, db, threads);
        STAMP(ROWS);
    } else {
        if (db)
            done = conv_db(taken, index, s, db);
        if (dw && done == DONE)
            done = conv_dw(taken, x, index, s, dw, threads);
        STAMP(WEIGHT);
        if (dx && done == DONE)
            done = conv_dx(taken, w, index, s, dx, threads);
        STAMP(INPUT);
    }
    free(work);
    return done;
}
