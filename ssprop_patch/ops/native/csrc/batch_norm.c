/* The backward of batch norm, and of a ReLU behind it; see common.h. */

#include "common.h"

#define BY_RELU(f, ...) (relu ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 0))
#define BY_BOTH(f, ...) (relu ? BY_ORDER(f, __VA_ARGS__, 1) : BY_ORDER(f, __VA_ARGS__, 0))

/* The gradient behind a ReLU with the output r, if there is one; as in torch a nan passes it. */
INLINE T passed(T d, T r, int relu)
{
    return relu && r <= 0 ? 0 : d;
}

/* --- norm_sums: of batch norm's backward, and of |dy| ** order of what it passes on ------------

   dy = scale * (dz - shift - (x - mean) * slope), with, per channel over m positions,
   scale = weight * invstd, shift = sum(dz) / m, slope = sum(dz * (x - mean)) * invstd ** 2 / m.

   `sums` is (3, c): dz, dz * (x - mean) * invstd, |dy| ** order. With `relu` dz is the gradient of
   the output r of a ReLU behind the norm, else r is not read. With `cells`, those of dy, their sums
   go to `cell_sums`, which lies as the maps do. */

INLINE void sums_of_dz(
    const T *restrict dz, const T *restrict r, const T *restrict x, T mean, int64_t size,
    double *a, double *b, int relu)
{
    T pa = 0, pb = 0;
#pragma omp simd reduction(+ : pa, pb)
    for (int64_t j = 0; j < size; j++) {
        T d = passed(dz[j], r[j], relu);
        pa += d;
        pb += d * (x[j] - mean);
    }
    *a += pa;
    *b += pb;
}

INLINE T sum_of_dy(
    const T *restrict dz, const T *restrict r, const T *restrict x, T mean, T shift, T slope,
    int64_t size, int relu, int order)
{
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) {
        T dy = passed(dz[j], r[j], relu) - shift - (x[j] - mean) * slope;
        sum += MAGNITUDE(dy, order);
    }
    return sum;
}

/* As sum_of_dy, which also writes dy, not scaled. */
INLINE T dy_of_positions(
    const T *restrict dz, const T *restrict r, const T *restrict x, T mean, T shift, T slope,
    int64_t size, T *restrict dy, int relu, int order)
{
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) {
        dy[j] = passed(dz[j], r[j], relu) - shift - (x[j] - mean) * slope;
        sum += MAGNITUDE(dy[j], order);
    }
    return sum;
}

/* How many rows of cells cells_of_map does at a time: one, or what fits into a BLOCK. */
INLINE int64_t rows_of_cells(const CellShape *s)
{
    return max(1, BLOCK / (s->size[0] * s->length[1]));
}

/* As sum_of_dy of one map, whose sums over cells go to `out`. `work` holds what is done at a time. */
static double cells_of_map(
    const T *dz, const T *r, const T *x, T mean, T shift, T slope, T scale, const CellShape *s,
    int relu, int order, T *out, T *restrict work)
{
    int64_t width = s->length[1], a_row = s->size[0] * width, step = rows_of_cells(s) * a_row;
    int64_t whole = s->length[0] * width;
    double sum = 0;
    for (int64_t first = 0; first < whole; first += step) {
        int64_t end = min(first + step, whole);
        for (int64_t from = first; from < end; from += BLOCK) {
            T *dy = work + (from - first);
            int64_t size = min(end - from, BLOCK);
            sum += BY_BOTH(
                dy_of_positions, dz + from, r + from, x + from, mean, shift, slope, size, dy);
        }
        for (int64_t at = first; at < end; at += a_row, out += s->number[1]) {
            cells_of_rows(work + (at - first), min(a_row, end - at) / width, s, out);
            for (int64_t b = 0; b < s->number[1]; b++)
                out[b] *= scale;
        }
    }
    return sum;
}

static void norm_of_channels(
    const T *dz, const T *r, const T *x, const T *mean, const T *invstd, const T *weight,
    int64_t n, int64_t c, int64_t s, int relu, int order, T *restrict sums,
    const CellShape *cells, T *cell_sums, T *work, int threads)
{
    T per_position = 1 / (T)(n * s);
    int64_t each = cells ? cells->number[0] * cells->number[1] : 0;
    int64_t room = cells ? rows_of_cells(cells) * cells->size[0] * cells->length[1] : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++)
        for (int64_t ch = c * th / threads; ch < c * (th + 1) / threads; ch++) {
            T m = mean[ch], scale = weight ? weight[ch] * invstd[ch] : invstd[ch];
            double a = 0, b = 0, y = 0;
            for (int64_t i = 0; i < n; i++)
                for (int64_t from = 0; from < s; from += BLOCK) {
                    int64_t at = (i * c + ch) * s + from, size = min(s - from, BLOCK);
                    BY_RELU(sums_of_dz, dz + at, r + at, x + at, m, size, &a, &b);
                }
            /* Again, while the channel is in the cache. */
            T shift = (T)a * per_position;
            T slope = (T)b * invstd[ch] * invstd[ch] * per_position;
            for (int64_t i = 0; i < n; i++) {
                int64_t at = (i * c + ch) * s;
                if (cells) {
                    T *out = cell_sums + (i * c + ch) * each;
                    y += cells_of_map(dz + at, r + at, x + at, m, shift, slope, scale, cells,
                                      relu, order, out, work + th * room);
                    continue;
                }
                for (int64_t from = 0; from < s; from += BLOCK) {
                    int64_t here = at + from, size = min(s - from, BLOCK);
                    y += BY_BOTH(
                        sum_of_dy, dz + here, r + here, x + here, m, shift, slope, size);
                }
            }
            sums[ch] = (T)a;
            sums[c + ch] = (T)b * invstd[ch];
            sums[2 * c + ch] = (T)y * MAGNITUDE(scale, order);
        }
}

INLINE void sums_of_dz_columns(
    const T *restrict dz, const T *restrict r, const T *restrict x, const T *restrict mean,
    int64_t rows, int64_t c, double *restrict a, double *restrict b, int relu)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, dz += 4 * c, r += 4 * c, x += 4 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T d0 = passed(dz[j], r[j], relu), m = mean[j];
            T d1 = passed(dz[c + j], r[c + j], relu);
            T d2 = passed(dz[2 * c + j], r[2 * c + j], relu);
            T d3 = passed(dz[3 * c + j], r[3 * c + j], relu);
            a[j] += d0 + d1 + d2 + d3;
            b[j] += d0 * (x[j] - m) + d1 * (x[c + j] - m)
                  + d2 * (x[2 * c + j] - m) + d3 * (x[3 * c + j] - m);
        }
    for (; i < rows; i++, dz += c, r += c, x += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T d = passed(dz[j], r[j], relu);
            a[j] += d;
            b[j] += d * (x[j] - mean[j]);
        }
}

INLINE void sums_of_dy_columns(
    const T *restrict dz, const T *restrict r, const T *restrict x, const T *restrict mean,
    const T *restrict shift, const T *restrict slope, int64_t rows, int64_t c,
    double *restrict sums, int relu, int order)
{
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2, dz += 2 * c, r += 2 * c, x += 2 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy0 = passed(dz[j], r[j], relu) - shift[j] - (x[j] - mean[j]) * slope[j];
            T dy1 = passed(dz[c + j], r[c + j], relu) - shift[j] - (x[c + j] - mean[j]) * slope[j];
            sums[j] += MAGNITUDE(dy0, order) + MAGNITUDE(dy1, order);
        }
    for (; i < rows; i++, dz += c, r += c, x += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy = passed(dz[j], r[j], relu) - shift[j] - (x[j] - mean[j]) * slope[j];
            sums[j] += MAGNITUDE(dy, order);
        }
}

/* Adds positions of c channels that lie side by side to their cell, and their magnitudes. */
INLINE void cell_of_dy_columns(
    const T *restrict dz, const T *restrict r, const T *restrict x, const T *restrict mean,
    const T *restrict shift, const T *restrict slope, int64_t rows, int64_t c,
    T *restrict cell, T *restrict magnitudes, int relu, int order)
{
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2, dz += 2 * c, r += 2 * c, x += 2 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy0 = passed(dz[j], r[j], relu) - shift[j] - (x[j] - mean[j]) * slope[j];
            T dy1 = passed(dz[c + j], r[c + j], relu) - shift[j] - (x[c + j] - mean[j]) * slope[j];
            cell[j] += dy0 + dy1;
            magnitudes[j] += MAGNITUDE(dy0, order) + MAGNITUDE(dy1, order);
        }
    for (; i < rows; i++, dz += c, r += c, x += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy = passed(dz[j], r[j], relu) - shift[j] - (x[j] - mean[j]) * slope[j];
            cell[j] += dy;
            magnitudes[j] += MAGNITUDE(dy, order);
        }
}

/* One row of cells, of channels that lie side by side; `sums` get the magnitudes. */
static void row_of_cells(
    const T *dz, const T *r, const T *x, const T *mean, const T *shift, const T *slope,
    const T *restrict scale, const CellShape *s, int64_t row, int relu, int order,
    double *restrict sums, T *restrict out, T *restrict magnitudes)
{
    int64_t c = s->c, end = min(row + s->size[0], s->length[0]);
    for (int64_t b = 0; b < s->number[1]; b++, out += c) {
        int64_t from = b * s->size[1], size = min(s->size[1], s->length[1] - from);
        memset(out, 0, c * sizeof(T));
        memset(magnitudes, 0, c * sizeof(T));
        for (int64_t i = row; i < end; i++) {
            int64_t at = (i * s->length[1] + from) * c;
            BY_BOTH(cell_of_dy_columns, dz + at, r + at, x + at, mean, shift, slope, size, c, out,
                    magnitudes);
        }
        for (int64_t j = 0; j < c; j++) {
            out[j] *= scale[j];
            sums[j] += magnitudes[j];
        }
    }
}

/* `work` holds threads * 3 * c doubles, where channels lie side by side. `lines` holds 3 * c numbers,
   and with cells for each thread c more; else, with cells, a BLOCK, or a row of cells if that is
   more. The cells begin at the first row and column. */
void norm_sums(
    const T *dz, const T *r, const T *x, const T *mean, const T *invstd, const T *weight,
    int64_t n, int64_t c, int64_t s, int last, int relu, int order, const CellShape *cells,
    T *restrict sums, T *cell_sums, double *restrict work, T *restrict lines, int threads)
{
    if (!last) {
        norm_of_channels(dz, r, x, mean, invstd, weight, n, c, s, relu, order, sums, cells,
                         cell_sums, lines, threads);
        return;
    }
    int64_t rows = n * s;
    T per_position = 1 / (T)rows, *shift = lines, *slope = lines + c, *scale = lines + 2 * c;
    memset(work, 0, threads * 3 * c * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = rows * th / threads, size = rows * (th + 1) / threads - from, at = from * c;
        double *mine = work + th * 3 * c;
        BY_RELU(sums_of_dz_columns, dz + at, r + at, x + at, mean, size, c, mine, mine + c);
    }
    for (int64_t j = 0; j < c; j++) {
        double a = 0, b = 0;
        for (int th = 0; th < threads; th++) {
            a += work[th * 3 * c + j];
            b += work[th * 3 * c + c + j];
        }
        sums[j] = (T)a;
        sums[c + j] = (T)b * invstd[j];
        shift[j] = (T)a * per_position;
        slope[j] = (T)b * invstd[j] * invstd[j] * per_position;
        scale[j] = weight ? weight[j] * invstd[j] : invstd[j];
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        double *mine = work + th * 3 * c + 2 * c;
        int64_t units = cells ? n * cells->number[0] : rows;
        int64_t from = units * th / threads, to = units * (th + 1) / threads, at = from * c;
        if (!cells) {
            BY_BOTH(sums_of_dy_columns, dz + at, r + at, x + at, mean, shift, slope, to - from, c,
                    mine);
            continue;
        }
        for (; from < to; from++) {
            int64_t map = from / cells->number[0] * s * c;
            int64_t row = from % cells->number[0] * cells->size[0];
            row_of_cells(dz + map, r + map, x + map, mean, shift, slope, scale, cells, row, relu,
                         order, mine, cell_sums + from * cells->number[1] * c,
                         lines + (3 + th) * c);
        }
    }
    for (int64_t j = 0; j < c; j++) {
        double y = 0;
        for (int th = 0; th < threads; th++)
            y += work[th * 3 * c + 2 * c + j];
        sums[2 * c + j] = (T)y * MAGNITUDE(scale[j], order);
    }
}

/* --- norm_input_grad: dy of the k channels in `index` ------------------------------------------ */

INLINE void dy_of_row(
    const T *restrict dz, const T *restrict r, const T *restrict x, const T *restrict mean,
    const T *restrict shift, const T *restrict slope, const T *restrict scale,
    int64_t c, T *restrict dy, int relu)
{
#pragma omp simd
    for (int64_t j = 0; j < c; j++)
        dy[j] = (passed(dz[j], r[j], relu) - shift[j] - (x[j] - mean[j]) * slope[j]) * scale[j];
}

INLINE void positions_of_channel(
    const T *restrict dz, const T *restrict r, const T *restrict x,
    T mean, T shift, T slope, T scale, int64_t s, T *restrict dy, int relu)
{
#pragma omp simd
    for (int64_t p = 0; p < s; p++)
        dy[p] = (passed(dz[p], r[p], relu) - shift - (x[p] - mean) * slope) * scale;
}

/* `lines` holds (3 + threads) * c numbers; `relu` and `r` as above. */
int norm_input_grad(
    const T *dz, const T *r, const T *x, const T *mean, const T *invstd, const T *weight,
    const T *sum_dz, const T *sum_dz_xhat, const int64_t *index,
    int64_t k, int64_t n, int64_t c, int64_t s, int last, int relu, T *dy, T *lines, int threads)
{
    if (!are_channels(index, k, c, 0))
        return BAD_INDEX;
    T per_position = 1 / (T)(n * s);
    T *shift = lines, *slope = lines + c, *scale = lines + 2 * c;
    for (int64_t j = 0; j < c; j++) {
        shift[j] = sum_dz[j] * per_position;
        slope[j] = sum_dz_xhat[j] * invstd[j] * per_position;
        scale[j] = weight ? weight[j] * invstd[j] : invstd[j];
    }
    if (last) {
        int64_t rows = n * s;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int th = 0; th < threads; th++) {
            /* A row is as quickly computed whole: its cache lines are read anyway. */
            T *row = lines + (3 + th) * c;
            for (int64_t i = rows * th / threads; i < rows * (th + 1) / threads; i++) {
                int64_t at = i * c;
                BY_RELU(dy_of_row, dz + at, r + at, x + at, mean, shift, slope, scale, c, row);
                for (int64_t j = 0; j < k; j++)
                    dy[i * k + j] = row[index[j]];
            }
        }
        return DONE;
    }
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++) {
            int64_t ch = index[j], at = (i * c + ch) * s;
            BY_RELU(positions_of_channel, dz + at, r + at, x + at,
                    mean[ch], shift[ch], slope[ch], scale[ch], s, dy + (i * k + j) * s);
        }
    return DONE;
}
