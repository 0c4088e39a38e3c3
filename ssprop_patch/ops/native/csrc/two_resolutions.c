/* Gradients of two resolutions: the kept channels as they are, of all channels the sums over cells;
   see core/two_resolutions.py. What is dropped is a cell's mean at each of its positions.

   `kept` is (n, k, h, w) and `sums` (n, c, cells), in the format of x, which is (n, c, h, w). Of the
   sums only those of dropped channels are read; all are written. `place` says where among the kept
   each channel is, or -1; `index` the other way round. Cells begin at the first row and column. */

#include "two_resolutions.h"

/* Over some rows of a map: the sums of x - m, and how often r > 0. */
INLINE void sum_rows(
    const T *restrict x, const T *restrict r, T m, int64_t rows, int64_t width,
    T *restrict sums, T *restrict counts, int relu)
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        T sum = 0, count = 0;
        for (int64_t i = 0; i < rows; i++) {
            sum += x[i * width + j] - m;
            if (relu)
                count += r[i * width + j] > 0 ? (T)1 : (T)0;
        }
        sums[j] = sum;
        if (relu)
            counts[j] = count;
    }
}

/* With the number of rows, of which there are few, as a constant. */
#define BY_ROWS_OF_CELLS(rows, f, ...)                                                             \
    do {                                                                                           \
        switch (rows) {                                                                            \
        case 4: f(__VA_ARGS__, 4); break;                                                          \
        case 5: f(__VA_ARGS__, 5); break;                                                          \
        default: f(__VA_ARGS__, rows);                                                             \
        }                                                                                          \
    } while (0)

INLINE void sum_both(
    const T *x, const T *r, T m, int64_t width, T *sums, T *counts, int relu, int64_t rows)
{
    if (relu)
        sum_rows(x, r, m, rows, width, sums, counts, 1);
    else
        sum_rows(x, r, m, rows, width, sums, counts, 0);
}

INLINE void count_rows(const T *restrict r, int64_t width, T *restrict counts, int64_t rows)
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        T count = 0;
        for (int64_t i = 0; i < rows; i++)
            count += r[i * width + j] > 0 ? (T)1 : (T)0;
        counts[j] = count;
    }
}

INLINE void sums_of_kept(
    const T *restrict d, const T *restrict r, const T *restrict x, T m, int64_t size, double *a,
    double *b, int relu)
{
    T pa = 0, pb = 0;
#pragma omp simd reduction(+ : pa, pb)
    for (int64_t j = 0; j < size; j++) {
        T dz = passed(d[j], r[j], relu);
        pa += dz;
        pb += dz * (x[j] - m);
    }
    *a += pa;
    *b += pb;
}

INLINE void dy_of_kept(
    const T *restrict d, const T *restrict r, const T *restrict x, T m, T shift, T slope, T scale,
    int64_t size, T *restrict dy, int relu)
{
#pragma omp simd
    for (int64_t j = 0; j < size; j++)
        dy[j] = (passed(d[j], r[j], relu) - shift - (x[j] - m) * slope) * scale;
}

INLINE void mask_kept(const T *restrict d, const T *restrict r, int64_t size, T *restrict dy)
{
#pragma omp simd
    for (int64_t j = 0; j < size; j++)
        dy[j] = passed(d[j], r[j], 1);
}

static void cells_of_map(const T *map, const CellShape *s, T *out)
{
    for (int64_t a = 0; a < s->number[0]; a++)
        cells_of_rows(map + a * s->size[0] * s->length[1], rows_in(s, a), s, out + a * s->number[1]);
}

/* `line` holds 2 * w + (n + 1) * cells numbers. */
static void norm_of_dropped(
    const T *sums, const T *counts, const T *r, const T *x, Norm *norm, int64_t n, int64_t step,
    int64_t sum_step, const CellShape *s, int relu, T per_position, T *out, double *a, double *b,
    T *line)
{
    int64_t width = s->length[1], wide = s->number[1], each = s->number[0] * wide;
    T *columns = line, *counted = line + width, *some = counted + width, *xs = some + each;
    int counting = relu && !counts;
    for (int64_t i = 0; i < n; i++, xs += each) {
        const T *map = x + i * step, *mask = r + i * step, *from = sums + i * sum_step;
        const T *number = counting ? some : counts + i * sum_step;
        T *to = out + i * sum_step;
        for (int64_t q = 0; q < s->number[0]; q++) {
            int64_t rows = rows_in(s, q), at = q * s->size[0] * width;
            BY_ROWS_OF_CELLS(
                rows, sum_both, map + at, mask + at, norm->mean, width, columns, counted, counting);
            cells_of_rows(columns, 1, s, xs + q * wide);
            if (counting)
                cells_of_rows(counted, 1, s, some + q * wide);
            for (int64_t p = 0; p < wide; p++) {
                int64_t cell = q * wide + p;
                T inside = rows * columns_in(s, p), sum = from[cell];
                if (relu)
                    sum = sum / inside * number[cell];
                to[cell] = sum;
                *a += sum;
                *b += sum / inside * xs[cell];
            }
        }
    }
    settle(norm, *a, *b, per_position);
    xs -= n * each;
    for (int64_t i = 0; i < n; i++, xs += each)
        for (int64_t q = 0; q < s->number[0]; q++)
            for (int64_t p = 0; p < wide; p++) {
                T *to = out + i * sum_step + q * wide + p;
                T inside = rows_in(s, q) * columns_in(s, p);
                *to = (*to - norm->shift * inside - xs[q * wide + p] * norm->slope) * norm->scale;
            }
}

static void norm_of_kept(
    const T *kept, const T *r, const T *x, Norm *norm, int64_t n, int64_t step, int64_t kept_step,
    int64_t sum_step, const CellShape *s, int relu, T per_position, T *dy, T *out, double *a,
    double *b)
{
    int64_t size = s->length[0] * s->length[1];
    for (int64_t i = 0; i < n; i++)
        for (int64_t from = 0; from < size; from += BLOCK) {
            int64_t at = i * step + from, some = min(size - from, BLOCK);
            BY_RELU(sums_of_kept, kept + i * kept_step + from, r + at, x + at, norm->mean, some, a, b);
        }
    settle(norm, *a, *b, per_position);
    for (int64_t i = 0; i < n; i++) {
        T *to = dy + i * kept_step;
        BY_RELU(
            dy_of_kept, kept + i * kept_step, r + i * step, x + i * step, norm->mean, norm->shift,
            norm->slope, norm->scale, size, to);
        cells_of_map(to, s, out + i * sum_step);
    }
}

/* --- in both formats ----------------------------------------------------------------------------- */

/* The gradient of the input of batch norm in training mode: `dy` of the kept channels and `out`, the
   sums of all; `both` is (2, c), the gradients of its bias and weight. With `relu`, kept and sums are
   those of a ReLU behind it, whose output is r; `counts`, if given, says how often r > 0 in each cell
   of dropped channels, as positive_cells does. `line` holds threads * (2 * w + (n + 1) * cells)
   numbers; of channels side by side, `work`, `line` and `xs` as above. */
int two_norm(
    const T *kept, const T *sums, const T *counts, const T *r, const T *x, const T *mean,
    const T *invstd, const T *weight, const int64_t *index, const int64_t *place, int64_t k, int64_t n, int64_t c,
    const CellShape *s, int last, int relu, T *dy, T *out, T *both, double *work, T *line, T *xs,
    int threads)
{
    if (!are_channels(index, k, c, 1))
        return BAD_INDEX;
    if (last) {
        norm_side_by_side(kept, sums, counts, r, x, mean, invstd, weight, index, k, n, c, s, relu, dy, out,
                          both, work, line, xs, threads);
        return DONE;
    }
    int64_t size = s->length[0] * s->length[1], each = s->number[0] * s->number[1];
    T per_position = 1 / (T)(n * size);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++)
        for (int64_t ch = c * th / threads; ch < c * (th + 1) / threads; ch++) {
            Norm norm = {mean[ch], invstd[ch], weight ? weight[ch] * invstd[ch] : invstd[ch], 0, 0};
            double a = 0, b = 0;
            int64_t at = ch * size, to = ch * each, slot = place[ch];
            if (slot >= 0)
                norm_of_kept(kept + slot * size, r + at, x + at, &norm, n, c * size, k * size,
                             c * each, s, relu, per_position, dy + slot * size, out + to, &a, &b);
            else
                norm_of_dropped(sums + to, counts ? counts + to : NULL, r + at, x + at, &norm, n, c * size, c * each, s, relu,
                                per_position, out + to, &a, &b,
                                line + th * (2 * s->length[1] + (n + 1) * each));
            both[ch] = (T)a, both[c + ch] = (T)b * invstd[ch];
        }
    return DONE;
}

/* The gradient of the input of a ReLU with the output r: `dy` of the kept channels and `out`, the
   sums of all. `line` holds threads * (w + cells of a row) numbers, or threads * c of channels side
   by side. */
int two_relu(
    const T *kept, const T *sums, const T *counts, const T *r, const int64_t *index, const int64_t *place, int64_t k,
    int64_t n, int64_t c, const CellShape *s, int last, T *dy, T *out, T *line, int threads)
{
    if (!are_channels(index, k, c, 1))
        return BAD_INDEX;
    if (last) {
        relu_side_by_side(kept, sums, counts, r, index, k, n, c, s, dy, out, line, threads);
        return DONE;
    }
    int64_t size = s->length[0] * s->length[1], each = s->number[0] * s->number[1];
    int64_t wide = s->number[1], width = s->length[1];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        T *columns = line + th * (width + wide), *some = columns + width;
        for (int64_t u = n * c * th / threads; u < n * c * (th + 1) / threads; u++) {
            int64_t slot = place[u % c], at = (u / c * k + slot) * size;
            const T *mask = r + u * size, *from = sums + u * each;
            const T *number = counts ? counts + u * each : some;
            T *to = out + u * each;
            if (slot >= 0) {
                mask_kept(kept + at, mask, size, dy + at);
                cells_of_map(dy + at, s, to);
                continue;
            }
            for (int64_t a = 0; a < s->number[0]; a++, from += wide, to += wide) {
                int64_t rows = rows_in(s, a), first = a * s->size[0] * width;
                if (!counts) {
                    BY_ROWS_OF_CELLS(rows, count_rows, mask + first, width, columns);
                    cells_of_rows(columns, 1, s, some);
                }
                for (int64_t b = 0; b < wide; b++)
                    to[b] = from[b] / (rows * columns_in(s, b)) * number[b];
                number += counts ? wide : 0;
            }
        }
    }
    return DONE;
}

/* Over the cells of x: its sums, and how often it is above zero. `line` holds threads * 2 * w numbers,
   or c zeros of channels side by side. */
int positive_cells(
    const T *x, int64_t n, int64_t c, const CellShape *s, int last, T *sums, T *counts, T *line,
    int threads)
{
    if (last) {
        positive_side_by_side(x, n, c, s, sums, counts, line, threads);
        return DONE;
    }
    int64_t size = s->length[0] * s->length[1], each = s->number[0] * s->number[1];
    int64_t width = s->length[1];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        T *columns = line + th * 2 * width;
        for (int64_t u = n * c * th / threads; u < n * c * (th + 1) / threads; u++)
            for (int64_t a = 0; a < s->number[0]; a++) {
                int64_t at = u * size + a * s->size[0] * width, to = u * each + a * s->number[1];
                BY_ROWS_OF_CELLS(rows_in(s, a), sum_both, x + at, x + at, 0, width, columns,
                                 columns + width, 1);
                cells_of_rows(columns, 1, s, sums + to);
                cells_of_rows(columns + width, 1, s, counts + to);
            }
    }
    return DONE;
}
