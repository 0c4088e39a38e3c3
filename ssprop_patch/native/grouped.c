/* The backward of grouped convolutions for the kept output channels; see layout.h.

   Kernels for ordinary convolutions take channels in blocks. A group that keeps one or two of its
   channels fills none, so here positions are what is vectorised:

       dX[f] = sum over kept channels and taps of dY[f - shift] * w
       dW    = sum over f of dY[f] * X[f + shift] */

#include "layout.h"

/* Loaded from and stored to any address of a T. */
typedef T V __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));

/* Channels whose sums are in registers at a time, POSITIONS vectors of each. */
#define CHANNELS 4

/* --- dX --------------------------------------------------------------------------------------- */

/* `w` is [terms][channels]: the weights of each shifted plane of dY. */
INLINE void dx_of_channels(
    const T *const *restrict terms, const T *restrict w, int64_t count, int64_t f,
    T *restrict out, int64_t stride, int channels)
{
    V sum[CHANNELS][POSITIONS];
    for (int c = 0; c < channels; c++)
        for (int p = 0; p < POSITIONS; p++)
            sum[c][p] = (V){0};
    for (int64_t t = 0; t < count; t++, w += channels) {
        const T *from = terms[t] + f;
        V dy[POSITIONS];
        for (int p = 0; p < POSITIONS; p++)
            dy[p] = *(const V *)(from + p * LANES);
        for (int c = 0; c < channels; c++)
            for (int p = 0; p < POSITIONS; p++)
                sum[c][p] += dy[p] * w[c];
    }
    for (int c = 0; c < channels; c++)
        for (int p = 0; p < POSITIONS; p++)
            *(V *)(out + c * stride + f + p * LANES) = sum[c][p];
}

/* The terms of one phase: which taps of which kept channels, and the weights in blocks of
   CHANNELS inputs: [blocks][terms][channels of the block]. */
static int64_t terms_of_phase(
    const Shape *s, const Layout *l, const T *dy, const T *w, const int64_t *index, int64_t phase,
    const T **terms, T *packed)
{
    int64_t count = 0;
    for (int64_t o = 0; o < s->kept; o++)
        for (int64_t t = 0; t < l->taps; t++)
            if (l->phase[t] == phase)
                terms[count++] = dy + o * l->plane + l->margin - l->shift[t];
    for (int64_t block = 0; block < s->inputs; block += CHANNELS) {
        int64_t channels = s->inputs - block < CHANNELS ? s->inputs - block : CHANNELS;
        for (int64_t o = 0; o < s->kept; o++)
            for (int64_t t = 0; t < l->taps; t++)
                if (l->phase[t] == phase)
                    for (int64_t c = 0; c < channels; c++)
                        *packed++ = w[(index[o] * s->inputs + block + c) * l->taps + t];
    }
    return count;
}

static void dx_of_phase(
    const Shape *s, const Layout *l, const T *const *terms, int64_t count, const T *packed,
    int64_t images, T *out)
{
    int64_t stride = l->x.phases * l->plane;
    for (int64_t f = 0; f < images * l->image; f += POSITIONS * LANES) {
        const T *w = packed;
        for (int64_t block = 0; block < s->inputs; block += CHANNELS, w += count * CHANNELS) {
            T *to = out + block * stride;
            switch (s->inputs - block) {
            case 1: dx_of_channels(terms, w, count, f, to, stride, 1); break;
            case 2: dx_of_channels(terms, w, count, f, to, stride, 2); break;
            case 3: dx_of_channels(terms, w, count, f, to, stride, 3); break;
            default: dx_of_channels(terms, w, count, f, to, stride, CHANNELS);
            }
        }
    }
}

/* dX, whole. `dy` has the kept channels only, `w` has all, `index` are the kept ones, ascending.
   Returns 0 if there is no memory. */
int grouped_dx(
    const T *dy, const T *w, const int64_t *index, const Shape *s, T *dx, int threads)
{
    Layout l;
    if (!lay_out(s, &l, threads))
        return 0;
    int64_t chunks = divided_up(s->n, l.images), jobs = divided_up(s->groups, l.groups) * chunks;
    int64_t step = l.x.phases * l.plane, most = s->kept * l.taps;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        if (s->depthwise) { /* the groups that are left out */
            int64_t size = s->c_in * s->h * s->w;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s->n; i++)
                memset(dx + i * size, 0, size * sizeof(T));
        }
        T *dy_planes = calloc(l.groups * s->kept * l.plane, sizeof(T));
        T *planes = malloc(l.groups * s->inputs * step * sizeof(T));
        T *packed = malloc(s->inputs * most * sizeof(T));
        const T **terms = malloc(most * sizeof(T *));
        int64_t *at = malloc(l.groups * (s->kept + s->inputs) * sizeof(int64_t));
        if (!dy_planes || !planes || !packed || !terms || !at) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t job = 0; job < jobs; job++) {
            if (failed)
                continue;
            Part p = part(s, &l, job / chunks, job % chunks);
            put_dy(s, &l, dy, &p, at, dy_planes);
            for (int64_t g = 0; g < p.groups; g++)
                for (int64_t phase = 0; phase < l.x.phases; phase++) {
                    int64_t count = terms_of_phase(
                        s, &l, dy_planes + g * s->kept * l.plane, w,
                        index + (p.group + g) * s->kept, phase, terms, packed);
                    T *to = planes + g * s->inputs * step + phase * l.plane + l.margin;
                    dx_of_phase(s, &l, terms, count, packed, p.images, to);
                }
            take_dx(s, &l, dx, index, &p, at, planes);
        }
        free(dy_planes);
        free(planes);
        free(packed);
        free(terms);
        free(at);
    }
    free(l.phase);
    return !failed;
}

/* --- dW --------------------------------------------------------------------------------------- */

/* Adds to `sums`, [channels][count of all terms], the products of so many planes of dY with so many
   of X. */
INLINE void dw_of_tile(
    const T *const *restrict dy, const T *const *restrict terms, int64_t size,
    double *restrict sums, int64_t width, int channels, int count)
{
    V sum[CHANNELS][9];
    for (int o = 0; o < channels; o++)
        for (int t = 0; t < count; t++)
            sum[o][t] = (V){0};
    for (int64_t f = 0; f < size; f += LANES) {
        V d[CHANNELS];
        for (int o = 0; o < channels; o++)
            d[o] = *(const V *)(dy[o] + f);
        for (int t = 0; t < count; t++) {
            V x = *(const V *)(terms[t] + f);
            for (int o = 0; o < channels; o++)
                sum[o][t] += d[o] * x;
        }
    }
    for (int o = 0; o < channels; o++)
        for (int t = 0; t < count; t++) {
            T lanes[LANES];
            memcpy(lanes, &sum[o][t], sizeof(V));
            for (int half = LANES / 2; half; half /= 2)
                for (int i = 0; i < half; i++)
                    lanes[i] += lanes[i + half];
            sums[o * width + t] += lanes[0];
        }
}

/* As many sums as there are registers for; three in a row, as most kernels are 3 wide. */
#define TILES(channels, most)                                                                      \
    do {                                                                                           \
        for (; t + most <= width; t += most)                                                       \
            dw_of_tile(dy, terms + t, size, sums + t, width, channels, most);                      \
        for (; t + 3 <= width; t += 3)                                                             \
            dw_of_tile(dy, terms + t, size, sums + t, width, channels, 3);                         \
        for (; t < width; t++)                                                                     \
            dw_of_tile(dy, terms + t, size, sums + t, width, channels, 1);                         \
    } while (0)

static void dw_of_channels(
    const T *const *dy, const T *const *terms, int64_t size, double *sums, int64_t width,
    int64_t channels)
{
    int64_t t = 0;
    switch (channels) {
    case 1: TILES(1, 9); break;
    case 2: TILES(2, 6); break;
    case 3: TILES(3, 3); break;
    default: TILES(CHANNELS, 3);
    }
}

/* Adds the products of one group and some images to `sums`, [kept][inputs][taps]. */
static void dw_of_group(
    const Shape *s, const Layout *l, const T *dy, const T *x, int64_t images,
    const T **terms, const T **dy_terms, double *sums)
{
    int64_t width = s->inputs * l->taps;
    for (int64_t o = 0; o < s->kept; o++)
        dy_terms[o] = dy + o * l->plane + l->margin;
    for (int64_t c = 0; c < s->inputs; c++)
        for (int64_t t = 0; t < l->taps; t++) {
            int64_t plane = c * l->x.phases + l->phase[t];
            terms[c * l->taps + t] = x + plane * l->plane + l->margin + l->shift[t];
        }
    /* Up to the last number that is not in a gap. */
    int64_t size = (images - 1) * l->image + (s->out_h - 1) * l->pitch + s->out_w;
    for (int64_t o = 0; o < s->kept; o += CHANNELS)
        dw_of_channels(dy_terms + o, terms, size, sums + o * width, width, s->kept - o);
}

/* dW, whole; arguments as for grouped_dx. */
int grouped_dw(
    const T *dy, const T *x, const int64_t *index, const Shape *s, T *dw, int threads)
{
    Layout l;
    if (!lay_out(s, &l, threads))
        return 0;
    int64_t blocks = divided_up(s->groups, l.groups), chunks = divided_up(s->n, l.images);
    int64_t step = l.x.phases * l.plane, width = s->inputs * l.taps;
    int failed = 0;
    memset(dw, 0, s->c_out * width * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        T *dy_planes = calloc(l.groups * s->kept * l.plane, sizeof(T));
        T *x_planes = calloc(l.groups * s->inputs * step, sizeof(T));
        double *sums = malloc(l.groups * s->kept * width * sizeof(double));
        const T **terms = malloc((s->kept + width) * sizeof(T *)), **dy_terms = terms + width;
        int64_t *at = malloc(l.groups * (s->kept + s->inputs) * sizeof(int64_t));
        if (!dy_planes || !x_planes || !sums || !terms || !at) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            if (failed)
                continue;
            memset(sums, 0, l.groups * s->kept * width * sizeof(double));
            Part p;
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                p = part(s, &l, block, chunk);
                put_dy(s, &l, dy, &p, at, dy_planes);
                put_x(s, &l, x, index, &p, at, x_planes);
                for (int64_t g = 0; g < p.groups; g++)
                    dw_of_group(
                        s, &l, dy_planes + g * s->kept * l.plane,
                        x_planes + g * s->inputs * step, p.images, terms, dy_terms,
                        sums + g * s->kept * width);
            }
            for (int64_t o = 0; o < p.groups * s->kept; o++)
                for (int64_t t = 0; t < width; t++)
                    dw[index[p.group * s->kept + o] * width + t] = (T)sums[o * width + t];
        }
        free(dy_planes);
        free(x_planes);
        free(sums);
        free(terms);
        free(at);
    }
    free(l.phase);
    return !failed;
}
