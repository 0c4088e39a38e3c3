/* Gradients of two resolutions in channels_last; see two_resolutions.c, whose parameters these are. */

#include "two_resolutions.h"

/* A cell: its number, its first position, how many rows and columns of it lie in the map. */
typedef struct {
    int64_t number, at, rows, columns;
} Cell;

/* Cell b of row of cells u of all maps. */
INLINE Cell cell_at(const CellShape *s, int64_t u, int64_t b)
{
    int64_t a = u % s->number[0], map = u / s->number[0] * s->length[0];
    return (Cell){u * s->number[1] + b, (map + a * s->size[0]) * s->length[1] + b * s->size[1],
                  rows_in(s, a), columns_in(s, b)};
}

#define FOR_EACH_CELL(cell)                                                                        \
    for (int64_t u = units * th / threads; u < units * (th + 1) / threads; u++)                    \
        for (int64_t b = 0; b < s->number[1]; b++)                                                 \
            for (Cell cell = cell_at(s, u, b), *once = &cell; once; once = NULL)

#define FOR_EACH_POSITION(cell, position)                                                          \
    for (int64_t i = 0; i < (cell).rows; i++)                                                      \
        for (int64_t position = (cell).at + i * s->length[1], end = position + (cell).columns;     \
             position < end; position++)

/* Over a cell: the sums of x - mean, and how often r > 0, of each channel. */
INLINE void sum_cell(
    const T *x, const T *r, const T *restrict mean, Cell cell, const CellShape *s, int64_t c,
    T *restrict xs, T *restrict counts, int relu)
{
    memset(xs, 0, c * sizeof(T));
    memset(counts, 0, c * sizeof(T));
    FOR_EACH_POSITION(cell, position) {
        const T *restrict here = x + position * c, *restrict mask = r + position * c;
#pragma omp simd
        for (int64_t ch = 0; ch < c; ch++) {
            xs[ch] += here[ch] - mean[ch];
            if (relu)
                counts[ch] += mask[ch] > 0 ? (T)1 : (T)0;
        }
    }
}

INLINE void count_cell(const T *r, Cell cell, const CellShape *s, int64_t c, T *restrict counts)
{
    memset(counts, 0, c * sizeof(T));
    FOR_EACH_POSITION(cell, position) {
        const T *restrict mask = r + position * c;
#pragma omp simd
        for (int64_t ch = 0; ch < c; ch++)
            counts[ch] += mask[ch] > 0 ? (T)1 : (T)0;
    }
}

/* `work`: threads * 2 * c doubles; `line`: 3 * c numbers and for each thread c; `xs` as sums. */
void norm_side_by_side(
    const T *kept, const T *sums, const T *counts, const T *r, const T *x, const T *mean,
    const T *invstd, const T *weight, const int64_t *index, int64_t k, int64_t n, int64_t c,
    const CellShape *s, int relu, T *restrict dy, T *restrict out, T *restrict both, double *restrict work, T *line,
    T *xs, int threads)
{
    int64_t units = n * s->number[0];
    T per_position = 1 / (T)(n * s->length[0] * s->length[1]);
    T *scale = line, *shift = line + c, *slope = line + 2 * c;
    memset(work, 0, threads * 2 * c * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        double *restrict da = work + th * 2 * c, *restrict db = da + c;
        T *some = line + (3 + th) * c;
        FOR_EACH_CELL(cell) {
            T inside = cell.rows * cell.columns, *restrict mine = xs + cell.number * c;
            T *restrict to = out + cell.number * c;
            const T *from = sums + cell.number * c;
            const T *number = counts ? counts + cell.number * c : some;
            if (relu && !counts)
                sum_cell(x, r, mean, cell, s, c, mine, some, 1);
            else
                sum_cell(x, r, mean, cell, s, c, mine, some, 0);
#pragma omp simd
            for (int64_t ch = 0; ch < c; ch++) {
                T sum = relu ? from[ch] / inside * number[ch] : from[ch];
                to[ch] = sum;
                da[ch] += sum;
                db[ch] += sum / inside * mine[ch];
            }
        }
        for (int64_t q = 0; q < k; q++)
            da[index[q]] = db[index[q]] = 0;
        FOR_EACH_CELL(cell)
            FOR_EACH_POSITION(cell, position)
                for (int64_t q = 0; q < k; q++) {
                    int64_t ch = index[q], here = position * c + ch;
                    T dz = passed(kept[position * k + q], r[here], relu);
                    da[ch] += dz;
                    db[ch] += dz * (x[here] - mean[ch]);
                }
    }
    for (int64_t ch = 0; ch < c; ch++) {
        double a = 0, b = 0;
        for (int th = 0; th < threads; th++) {
            a += work[th * 2 * c + ch];
            b += work[th * 2 * c + c + ch];
        }
        Norm norm = {mean[ch], invstd[ch], weight ? weight[ch] * invstd[ch] : invstd[ch], 0, 0};
        settle(&norm, a, b, per_position);
        scale[ch] = norm.scale, shift[ch] = norm.shift, slope[ch] = norm.slope;
        both[ch] = (T)a, both[c + ch] = (T)b * invstd[ch];
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++)
        FOR_EACH_CELL(cell) {
            T inside = cell.rows * cell.columns, *restrict to = out + cell.number * c;
            const T *mine = xs + cell.number * c;
#pragma omp simd
            for (int64_t ch = 0; ch < c; ch++)
                to[ch] = (to[ch] - shift[ch] * inside - mine[ch] * slope[ch]) * scale[ch];
            for (int64_t q = 0; q < k; q++)
                to[index[q]] = 0;
            FOR_EACH_POSITION(cell, position)
                for (int64_t q = 0; q < k; q++) {
                    int64_t ch = index[q], here = position * c + ch;
                    T dz = passed(kept[position * k + q], r[here], relu);
                    T one = (dz - shift[ch] - (x[here] - mean[ch]) * slope[ch]) * scale[ch];
                    dy[position * k + q] = one;
                    to[ch] += one;
                }
        }
}

/* `line` holds threads * c numbers. */
void relu_side_by_side(
    const T *kept, const T *sums, const T *counts, const T *r, const int64_t *index, int64_t k, int64_t n, int64_t c,
    const CellShape *s, T *restrict dy, T *restrict out, T *line, int threads)
{
    int64_t units = n * s->number[0];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++)
        FOR_EACH_CELL(cell) {
            T inside = cell.rows * cell.columns, *restrict to = out + cell.number * c;
            const T *number = counts ? counts + cell.number * c : line + th * c;
            if (!counts)
                count_cell(r, cell, s, c, line + th * c);
#pragma omp simd
            for (int64_t ch = 0; ch < c; ch++)
                to[ch] = sums[cell.number * c + ch] / inside * number[ch];
            for (int64_t q = 0; q < k; q++)
                to[index[q]] = 0;
            FOR_EACH_POSITION(cell, position)
                for (int64_t q = 0; q < k; q++) {
                    T one = passed(kept[position * k + q], r[position * c + index[q]], 1);
                    dy[position * k + q] = one;
                    to[index[q]] += one;
                }
        }
}

void positive_side_by_side(
    const T *x, int64_t n, int64_t c, const CellShape *s, T *sums, T *counts, const T *zeros,
    int threads)
{
    int64_t units = n * s->number[0];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++)
        FOR_EACH_CELL(cell)
            sum_cell(x, x, zeros, cell, s, c, sums + cell.number * c, counts + cell.number * c, 1);
}
