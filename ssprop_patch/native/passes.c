/* The passes over memory of a sparse backward; each reads its tensors as seldom as it can.

   A tensor of n samples, c channels and s positions is contiguous, or (`last`) in channels_last: a
   matrix of n * s rows of c numbers. Sums are made in double. Compiled once for each type of
   number, by -DT=float and -DT=double. */

#include <stdint.h>

/* So many numbers are summed in their own type before they are added to a double. */
#define BLOCK 2048

#define MAGNITUDE(v, order) ((order) == 1 ? (T)__builtin_fabs(v) : (v) * (v))
/* With the order as a constant each loop is vectorised by itself. */
#define BY_ORDER(f, ...) ((order) == 1 ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 2))

/* --- channel_sums: of |t| ** order ------------------------------------------------------------ */

static inline T sum_of_row(const T *restrict row, int64_t size, int order)
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
                int64_t size = s - from < BLOCK ? s - from : BLOCK;
                sum += BY_ORDER(sum_of_row, row, size);
            }
        out[ch] = (T)sum;
    }
}

static inline void sums_of_columns(
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

/* `work` holds threads * c zeros. */
void channel_sums(
    const T *t, int64_t n, int64_t c, int64_t s, int last, int order,
    T *restrict out, double *restrict work, int threads)
{
    if (!last) {
        sums_of_channels(t, n, c, s, order, out, threads);
        return;
    }
    int64_t rows = n * s;
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

/* --- norm_sums: of batch norm's backward, and of |dy| ** order of what it passes on ------------

   dy = scale * (dz - shift - (x - mean) * slope), with, per channel over m positions,
   scale = weight * invstd, shift = sum(dz) / m, slope = sum(dz * (x - mean)) * invstd ** 2 / m.

   `sums` is (3, c): dz, dz * (x - mean) * invstd, |dy| ** order. */

static inline T sum_of_dy(
    const T *restrict dz, const T *restrict x, T mean, T shift, T slope, int64_t size, int order)
{
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) {
        T dy = dz[j] - shift - (x[j] - mean) * slope;
        sum += MAGNITUDE(dy, order);
    }
    return sum;
}

static void norm_of_channels(
    const T *restrict dz, const T *restrict x, const T *mean, const T *invstd, const T *weight,
    int64_t n, int64_t c, int64_t s, int order, T *restrict sums, int threads)
{
    T per_position = 1 / (T)(n * s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t ch = 0; ch < c; ch++) {
        T m = mean[ch];
        double a = 0, b = 0, y = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t from = 0; from < s; from += BLOCK) {
                const T *restrict d = dz + (i * c + ch) * s + from;
                const T *restrict v = x + (i * c + ch) * s + from;
                int64_t size = s - from < BLOCK ? s - from : BLOCK;
                T pa = 0, pb = 0;
#pragma omp simd reduction(+ : pa, pb)
                for (int64_t j = 0; j < size; j++) {
                    pa += d[j];
                    pb += d[j] * (v[j] - m);
                }
                a += pa;
                b += pb;
            }
        /* Again, while the channel is in the cache. */
        T shift = (T)a * per_position;
        T slope = (T)b * invstd[ch] * invstd[ch] * per_position;
        for (int64_t i = 0; i < n; i++)
            for (int64_t from = 0; from < s; from += BLOCK) {
                int64_t at = (i * c + ch) * s + from;
                int64_t size = s - from < BLOCK ? s - from : BLOCK;
                y += BY_ORDER(sum_of_dy, dz + at, x + at, m, shift, slope, size);
            }
        T scale = weight ? weight[ch] * invstd[ch] : invstd[ch];
        sums[ch] = (T)a;
        sums[c + ch] = (T)b * invstd[ch];
        sums[2 * c + ch] = (T)y * MAGNITUDE(scale, order);
    }
}

static void norm_of_columns(
    const T *restrict dz, const T *restrict x, const T *restrict mean,
    int64_t rows, int64_t c, double *restrict a, double *restrict b)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, dz += 4 * c, x += 4 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T d0 = dz[j], d1 = dz[c + j], d2 = dz[2 * c + j], d3 = dz[3 * c + j], m = mean[j];
            a[j] += d0 + d1 + d2 + d3;
            b[j] += d0 * (x[j] - m) + d1 * (x[c + j] - m)
                  + d2 * (x[2 * c + j] - m) + d3 * (x[3 * c + j] - m);
        }
    for (; i < rows; i++, dz += c, x += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            a[j] += dz[j];
            b[j] += dz[j] * (x[j] - mean[j]);
        }
}

static inline void sums_of_dy_columns(
    const T *restrict dz, const T *restrict x, const T *restrict mean, const T *restrict shift,
    const T *restrict slope, int64_t rows, int64_t c, double *restrict sums, int order)
{
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2, dz += 2 * c, x += 2 * c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy0 = dz[j] - shift[j] - (x[j] - mean[j]) * slope[j];
            T dy1 = dz[c + j] - shift[j] - (x[c + j] - mean[j]) * slope[j];
            sums[j] += MAGNITUDE(dy0, order) + MAGNITUDE(dy1, order);
        }
    for (; i < rows; i++, dz += c, x += c)
#pragma omp simd
        for (int64_t j = 0; j < c; j++) {
            T dy = dz[j] - shift[j] - (x[j] - mean[j]) * slope[j];
            sums[j] += MAGNITUDE(dy, order);
        }
}

/* `work` holds threads * 3 * c zeros, `lines` 2 * c numbers. */
void norm_sums(
    const T *dz, const T *x, const T *mean, const T *invstd, const T *weight,
    int64_t n, int64_t c, int64_t s, int last, int order,
    T *restrict sums, double *restrict work, T *restrict lines, int threads)
{
    if (!last) {
        norm_of_channels(dz, x, mean, invstd, weight, n, c, s, order, sums, threads);
        return;
    }
    int64_t rows = n * s;
    T per_position = 1 / (T)rows, *shift = lines, *slope = lines + c;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = rows * th / threads, size = rows * (th + 1) / threads - from;
        double *mine = work + th * 3 * c;
        norm_of_columns(dz + from * c, x + from * c, mean, size, c, mine, mine + c);
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
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        int64_t from = rows * th / threads, size = rows * (th + 1) / threads - from;
        const T *d = dz + from * c, *v = x + from * c;
        double *mine = work + th * 3 * c + 2 * c;
        BY_ORDER(sums_of_dy_columns, d, v, mean, shift, slope, size, c, mine);
    }
    for (int64_t j = 0; j < c; j++) {
        T scale = weight ? weight[j] * invstd[j] : invstd[j];
        double y = 0;
        for (int th = 0; th < threads; th++)
            y += work[th * 3 * c + 2 * c + j];
        sums[2 * c + j] = (T)y * MAGNITUDE(scale, order);
    }
}

/* --- norm_input_grad: dy of the k channels in `index` ------------------------------------------ */

/* `lines` holds 4 * k numbers. */
void norm_input_grad(
    const T *restrict dz, const T *restrict x, const T *mean, const T *invstd, const T *weight,
    const T *sum_dz, const T *sum_dz_xhat, const int64_t *index,
    int64_t k, int64_t n, int64_t c, int64_t s, int last,
    T *restrict dy, T *restrict lines, int threads)
{
    T per_position = 1 / (T)(n * s);
    T *restrict means = lines, *restrict shifts = lines + k;
    T *restrict slopes = lines + 2 * k, *restrict scales = lines + 3 * k;
    for (int64_t j = 0; j < k; j++) {
        int64_t ch = index[j];
        means[j] = mean[ch];
        shifts[j] = sum_dz[ch] * per_position;
        slopes[j] = sum_dz_xhat[ch] * invstd[ch] * per_position;
        scales[j] = weight ? weight[ch] * invstd[ch] : invstd[ch];
    }
    if (last) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < n * s; i++) {
            const T *restrict d = dz + i * c, *restrict v = x + i * c;
            for (int64_t j = 0; j < k; j++) {
                int64_t ch = index[j];
                dy[i * k + j] = (d[ch] - shifts[j] - (v[ch] - means[j]) * slopes[j]) * scales[j];
            }
        }
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++) {
            const T *restrict d = dz + (i * c + index[j]) * s, *restrict v = x + (d - dz);
            T m = means[j], shift = shifts[j], slope = slopes[j], scale = scales[j];
            T *restrict out = dy + (i * k + j) * s;
#pragma omp simd
            for (int64_t p = 0; p < s; p++)
                out[p] = (d[p] - shift - (v[p] - m) * slope) * scale;
        }
}

/* --- take_channels: t[:, index], in channels_last ---------------------------------------------- */

void take_channels(
    const T *restrict t, const int64_t *index, int64_t k, int64_t rows, int64_t c,
    T *restrict out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < k; j++)
            out[i * k + j] = t[i * c + index[j]];
}
