/* Sums over channels, the choice of the largest, and what takes and puts them; see common.h. */

#include "common.h"

/* --- channel_sums: of |t| ** order ------------------------------------------------------------ */

INLINE T sum_of_row(const T *restrict row, int64_t size, int order)
{
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++)
        sum += MAGNITUDE(row[j], order);
    return sum;
}

static void sums_of_channels(
    const T *restrict t, int64_t n, int64_t c, int64_t s, int order, T *restrict out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t ch = 0; ch < c; ch++) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t from = 0; from < s; from += BLOCK) {
                const T *row = t + (i * c + ch) * s + from;
                int64_t size = min(s - from, BLOCK);
                sum += BY_ORDER(sum_of_row, row, size);
            }
        out[ch] = (T)sum;
    }
}

INLINE void sums_of_columns(
    const T *restrict t, int64_t rows, int64_t c, double *restrict sums, int order)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, t += 4 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T v0 = t[j], v1 = t[c + j], v2 = t[2 * c + j], v3 = t[3 * c + j];
            sums[j] += MAGNITUDE(v0, order) + MAGNITUDE(v1, order)
                     + MAGNITUDE(v2, order) + MAGNITUDE(v3, order);
        }
    for (; i < rows; i++, t += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++)
            sums[j] += MAGNITUDE(t[j], order);
}

/* `work` holds threads * c doubles, for `last` only. */
void channel_sums(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order,
    T *restrict out, double *restrict work, int threads)
{
    if (!last) {
        sums_of_channels(t, n, c, s, order, out, threads);
        return;
    }
    int64_t rows = n * s;
    memset(work, 0, threads * c * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = rows * th / threads, size = rows * (th + 1) / threads - from;
        BY_ORDER(sums_of_columns, t + from * c, size, c, work + th * c);
    }
    for (int64_t j = 0; j < c; j++) {
        double sum = 0;
        for (int th = 0; th < threads; th++)
            sum += work[th * c + j];
        out[j] = (T)sum;
    }
}

/* --- topk: the indices of the k largest scores of each group, ascending --------------------- */

/* Returns the k-th largest of n numbers, which it reorders. */
static T kth_largest(T *v, int64_t n, int64_t k)
{
    int64_t from = 0, to = n - 1, at = k - 1;
    while (from < to) {
        T pivot = v[from + (to - from) / 2];
        int64_t i = from, j = to;
        while (i <= j) {
            while (v[i] > pivot)
                i++;
            while (v[j] < pivot)
                j--;
            if (i <= j) {
                T other = v[i];
                v[i++] = v[j];
                v[j--] = other;
            }
        }
        if (at <= j)
            to = j;
        else if (at >= i)
            from = i;
        else
            break;
    }
    return v[at];
}

/* A nan counts as larger than all numbers; of equals the first are taken. `work` holds `size`
   numbers. */
void topk_indices(
    const T *scores, int64_t groups, int64_t size, int64_t k, T *restrict work,
    int64_t *restrict index)
{
    for (int64_t g = 0; g < groups; g++, scores += size) {
        int64_t numbers = 0;
        for (int64_t j = 0; j < size; j++)
            if (scores[j] == scores[j])
                work[numbers++] = scores[j];
        int64_t nans = min(size - numbers, k), rest = k - nans;
        T least = rest ? kth_largest(work, numbers, rest) : (T)__builtin_inf();
        int64_t equals = rest;
        for (int64_t j = 0; j < size; j++)
            equals -= scores[j] > least;
        for (int64_t j = 0; j < size; j++) {
            T score = scores[j];
            if (score > least || (score == least && equals-- > 0)
                || (score != score && nans-- > 0))
                *index++ = g * size + j;
        }
    }
}

/* Of the channels of t, by their channel_sums. `work` holds 2 * c + threads * c doubles. */
void topk_channels(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order, int64_t groups, int64_t k,
    double *restrict work, int64_t *restrict index, int threads)
{
    T *sums = (T *)(work + threads * c);
    channel_sums(t, n, c, s, last, order, sums, work, threads);
    topk_indices(sums, groups, c / groups, k, sums + c, index);
}

/* --- take_channels: t[:, index], in channels_last ---------------------------------------------- */

int take_channels(
    const T *restrict t, const int64_t *index, int64_t k, int64_t rows, int64_t c,
    T *restrict out, int threads)
{
    if (!are_channels(index, k, c, 0))
        return BAD_INDEX;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < k; j++)
            out[i * k + j] = t[i * c + index[j]];
    return DONE;
}

/* --- put_rows: zeros, with `rows` in the places `index`, ascending --------------------------- */

int put_rows(
    const T *rows, const int64_t *index, int64_t k, int64_t c, int64_t size, T *out, int threads)
{
    if (!are_channels(index, k, c, 1))
        return BAD_INDEX;
    if (!size)
        return DONE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = c * th / threads, to = c * (th + 1) / threads, j = 0;
        while (j < k && index[j] < from)
            j++;
        for (int64_t i = from; i < to; i++)
            if (j < k && index[j] == i)
                memcpy(out + i * size, rows + j++ * size, size * sizeof(T));
            else
                memset(out + i * size, 0, size * sizeof(T));
    }
    return DONE;
}

/* --- put_sums: the same, of the sum of n times `rows` ----------------------------------------- */

#define PIECE 256

int put_sums(
    const T *rows, int64_t n, const int64_t *index, int64_t k, int64_t c, int64_t size, T *out,
    int threads)
{
    if (!are_channels(index, k, c, 1))
        return BAD_INDEX;
    if (!size)
        return DONE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = c * th / threads, to = c * (th + 1) / threads, j = 0;
        while (j < k && index[j] < from)
            j++;
        for (int64_t i = from; i < to; i++) {
            if (j == k || index[j] != i) {
                memset(out + i * size, 0, size * sizeof(T));
                continue;
            }
            for (int64_t at = 0; at < size; at += PIECE) {
                int64_t count = min(size - at, PIECE);
                double sums[PIECE] = {0};
                for (int64_t m = 0; m < n; m++) {
                    const T *row = rows + (m * k + j) * size + at;
#pragma omp simd
                    for (int64_t e = 0; e < count; e++)
                        sums[e] += row[e];
                }
                for (int64_t e = 0; e < count; e++)
                    out[i * size + at + e] = (T)sums[e];
            }
            j++;
        }
    }
    return DONE;
}
