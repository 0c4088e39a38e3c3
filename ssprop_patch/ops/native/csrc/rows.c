/* The backward of a convolution that has a single position, where each sample is a row of channels.
   Its matrix products are so small that calling a library for them takes longer. See common.h. */

#include "common.h"

/* Adds to `to` the products of `count` rows of `t`, those of `index` or the first, and factors. */
INLINE void add_products(
    T *restrict to, int64_t size, const T *t, const int64_t *index, const T *factors, int64_t step,
    int64_t count)
{
#define ROW(i) (t + (index ? index[i] : (i)) * size)
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const T *a = ROW(i), *b = ROW(i + 1), *c = ROW(i + 2), *d = ROW(i + 3);
        T fa = factors[i * step], fb = factors[(i + 1) * step];
        T fc = factors[(i + 2) * step], fd = factors[(i + 3) * step];
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            to[j] += (fa * a[j] + fb * b[j]) + (fc * c[j] + fd * d[j]);
    }
    for (; i < count; i++) {
        const T *a = ROW(i), fa = factors[i * step];
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            to[j] += fa * a[j];
    }
#undef ROW
}

/* dX (n, c_in), dW (c_out, c_in) and db (c_out), those that are not NULL. `dy` (n, k) has the kept
   channels only, `w` has all, `index` are the kept ones, ascending. */
int rows_backward(
    const T *dy, const T *x, const T *w, const int64_t *index, int64_t n, int64_t c_in,
    int64_t c_out, int64_t k, T *restrict dx, T *restrict dw, T *restrict db, int threads)
{
    if (!are_channels(index, k, c_out, 1))
        return BAD_INDEX;
#pragma omp parallel num_threads(threads)
    {
        if (dx) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < n; i++) {
                memset(dx + i * c_in, 0, c_in * sizeof(T));
                add_products(dx + i * c_in, c_in, w, index, dy + i * k, 1, k);
            }
        }
        if (dw) {
#pragma omp for schedule(static) nowait
            for (int64_t o = 0; o < c_out; o++)
                memset(dw + o * c_in, 0, c_in * sizeof(T));
#pragma omp barrier
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < k; j++)
                add_products(dw + index[j] * c_in, c_in, x, NULL, dy + j, k, n);
        }
    }
    if (db) {
        memset(db, 0, c_out * sizeof(T));
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < k; j++)
                db[index[j]] += dy[i * k + j];
    }
    return DONE;
}
