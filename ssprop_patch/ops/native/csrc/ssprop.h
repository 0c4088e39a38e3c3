/* The functions of ssprop_patch's two libraries: what native/build.py calls, and what one file calls
   in another. Each C file includes this, by way of common.h, so that the compiler compares every
   definition with its declaration. T is the type of number, float or double. */

#ifndef SSPROP_H
#define SSPROP_H

#include <stdint.h>

/* What the functions return that can fail: the numbers of native/tensors.py. */
enum { NO_MEMORY, DONE, BAD_INDEX, NOT_FINITE };

/* The shape of a convolution, with three spatial dimensions: the first ones have size 1 where there
   are fewer. native/conv_shape.py has the same fields, and has checked that they fit together. */
typedef struct {
    int64_t n, c_in, in_size[3], out_size[3], c_out;
    /* Of the convolution itself. `depthwise`: several groups with one output channel each. */
    int64_t groups, depthwise;
    /* Groups that are computed, and the kept and the input channels of each. Of a depthwise
       convolution those are some of its groups, perhaps one: `index` says which. */
    int64_t computed, kept, inputs;
    int64_t kernel[3], stride[3], padding[3], dilation[3];
    int64_t x_last, dy_last; /* whether they are in channels_last */
} ConvShape;

_Static_assert(sizeof(ConvShape) == 28 * sizeof(int64_t), "ConvShape has gaps");

/* Maps and how they are divided into cells, see cells.c; native/cells.py has the same fields. */
typedef struct {
    int64_t maps, c, length[2], start[2], size[2], number[2];
} CellShape;

_Static_assert(sizeof(CellShape) == 10 * sizeof(int64_t), "CellShape has gaps");

/* --- channel_ops.c ---------------------------------------------------------------------------- */

void channel_sums(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order,
    T *restrict out, double *restrict work, int threads);

void topk_indices(
    const T *scores, int64_t groups, int64_t size, int64_t k, T *restrict work,
    int64_t *restrict index);

void topk_channels(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order, int64_t groups, int64_t k,
    double *restrict work, int64_t *restrict index, int threads);

int take_channels(
    const T *restrict t, const int64_t *index, int64_t k, int64_t rows, int64_t c,
    T *restrict out, int threads);

int put_rows(
    const T *rows, const int64_t *index, int64_t k, int64_t c, int64_t size, T *out, int threads);

int put_sums(
    const T *rows, int64_t n, const int64_t *index, int64_t k, int64_t c, int64_t size, T *out,
    int threads);

/* --- batch_norm.c ----------------------------------------------------------------------------- */

void norm_sums(
    const T *dz, const T *r, const T *x, const T *mean, const T *invstd, const T *weight,
    int64_t n, int64_t c, int64_t s, int last, int relu, int order, const CellShape *cells,
    T *restrict sums, T *cell_sums, double *restrict work, T *restrict lines, int threads);

int norm_input_grad(
    const T *dz, const T *r, const T *x, const T *mean, const T *invstd, const T *weight,
    const T *sum_dz, const T *sum_dz_xhat, const int64_t *index,
    int64_t k, int64_t n, int64_t c, int64_t s, int last, int relu, T *dy, T *lines, int threads);

/* --- two_resolutions.c ------------------------------------------------------------------------ */

int two_norm(
    const T *kept, const T *sums, const T *counts, const T *r, const T *x, const T *mean, const T *invstd,
    const T *weight, const int64_t *index, const int64_t *place, int64_t k, int64_t n, int64_t c,
    const CellShape *s, int last, int relu, T *dy, T *out, T *both, double *work, T *line, T *xs,
    int threads);

int two_relu(
    const T *kept, const T *sums, const T *counts, const T *r, const int64_t *index,
    const int64_t *place, int64_t k, int64_t n, int64_t c, const CellShape *s, int last, T *dy,
    T *out, T *line, int threads);

int positive_cells(
    const T *x, int64_t n, int64_t c, const CellShape *s, int last, T *sums, T *counts, T *line,
    int threads);

/* --- cells.c ---------------------------------------------------------------------------------- */

void sum_cells(const T *maps, const CellShape *s, T *out, T *work, int threads);

/* The sums of a row of cells that has `count` rows; c is 1. */
void cells_of_rows(const T *rows, int64_t count, const CellShape *s, T *restrict out);

void add_cells(const T *values, const CellShape *s, T *maps, int threads);

/* --- taps.c ----------------------------------------------------------------------------------- */

int sum_taps(
    const T *w, const int64_t *index, int64_t k, int64_t c_out, int64_t c, int64_t taps, int last,
    const T *shares, T *out, int threads);

int put_taps(
    const T *rows, const int64_t *index, int64_t k, int64_t c_out, int64_t c, int64_t taps,
    int last, const T *shares, T *dw, int threads);

/* --- rows.c ----------------------------------------------------------------------------------- */

int rows_backward(
    const T *dy, const T *x, const T *w, const int64_t *index, int64_t n, int64_t c_in,
    int64_t c_out, int64_t k, T *restrict dx, T *restrict dw, T *restrict db, int threads);

/* --- conv.c ----------------------------------------------------------------------------------- */

int conv_dx(
    const T *dy, const T *w, const int64_t *index, const ConvShape *s, T *dx, int threads);

int conv_dw(
    const T *dy, const T *x, const int64_t *index, const ConvShape *s, T *dw, int threads);

/* --- conv_backward.c -------------------------------------------------------------------------- */

int conv_db(const T *dy, const int64_t *index, const ConvShape *s, T *db);

int conv_backward(
    const T *dy, const T *x, const T *w, const ConvShape *s, int order, int64_t groups, int64_t k,
    int64_t *index, T *dx, T *dw, T *db, int threads);

#endif
