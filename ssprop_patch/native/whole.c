/* The whole sparse backward of a convolution in one call: of a small layer, calling for the parts
   takes longer than what they do. */

#include "layout.h"

/* Of channels.c, rows.c and conv.c. */
void largest_channels(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order, int64_t groups, int64_t k,
    double *work, int64_t *index, int threads);
int take_channels(
    const T *t, const int64_t *index, int64_t k, int64_t rows, int64_t c, T *out, int threads);
int rows_backward(
    const T *dy, const T *x, const T *w, const int64_t *index, int64_t n, int64_t c_in,
    int64_t c_out, int64_t k, T *dx, T *dw, T *db, int threads);
int conv_dx(const T *dy, const T *w, const int64_t *index, const Shape *s, T *dx, int threads);
int conv_dw(const T *dy, const T *x, const int64_t *index, const Shape *s, T *dw, int threads);

static int64_t product(const int64_t *sizes)
{
    return sizes[0] * sizes[1] * sizes[2];
}

/* Whether each sample is a row of channels, and the weight a matrix. */
static int are_rows(const Shape *s)
{
    int64_t pad = s->pad[0] + s->pad[1] + s->pad[2];
    return s->groups == 1 && product(s->in) == 1 && product(s->kernel) == 1 && !pad;
}

/* db, whole. `dy` has the kept channels only. */
int conv_db(const T *dy, const int64_t *index, const Shape *s, T *db)
{
    int64_t kept = s->computed * s->kept, size = product(s->out);
    if (!is_index_of(s, index))
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
   writes dX, dW and db, those that are not NULL. `dy` has all channels, in the format that `s` says.
   NOT_FINITE if conv_dx or conv_dw say so: dX and dW are not to be used then. */
int conv_backward(
    const T *dy, const T *x, const T *w, const Shape *s, int order, int64_t groups, int64_t k,
    int64_t *index, T *dx, T *dw, T *db, int threads)
{
    int64_t size = product(s->out), kept = groups * k, scores = (threads + 3) * s->c_out;
    int last = s->dy_last || size == 1;
    double *work = malloc(scores * sizeof(double) + s->n * kept * size * sizeof(T));
    if (!work)
        return NO_MEMORY;
    T *taken = (T *)(work + scores);
    largest_channels(dy, s->n, s->c_out, size, last, order, groups, k, work, index, threads);
    if (last)
        take_channels(dy, index, kept, s->n * size, s->c_out, taken, threads);
    else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < s->n; i++)
            for (int64_t j = 0; j < kept; j++)
                memcpy(taken + (i * kept + j) * size, dy + (i * s->c_out + index[j]) * size,
                       size * sizeof(T));
    }
    int done = DONE;
    if (are_rows(s))
        done = rows_backward(taken, x, w, index, s->n, s->c_in, s->c_out, kept, dx, dw, db, threads);
    else {
        if (db)
            done = conv_db(taken, index, s, db);
        if (dw && done == DONE)
            done = conv_dw(taken, x, index, s, dw, threads);
        if (dx && done == DONE)
            done = conv_dx(taken, w, index, s, dx, threads);
    }
    free(work);
    return done;
}
