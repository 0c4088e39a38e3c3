/* The backward of grouped convolutions for the kept output channels, of contiguous tensors.

   Kernels for ordinary convolutions take channels in blocks. A group that keeps one or two of its
   channels fills none, so here positions are what is vectorised. Every image is laid out flat, with
   gaps of zeros between its rows wide enough that a tap of the kernel is one shift of the whole:

       dX[f] = sum over kept channels and taps of dY[f - shift] * w
       dW    = sum over f of dY[f] * X[f + shift]

   With a stride s the input falls into s * s parts ("phases") of every s-th row and column, and each
   tap reads one of them. One or two spatial dimensions; the first is 1 if there is one.

   Compiled once for each type of number, see common.h. */

#include "common.h"
#include <stdlib.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES ((int64_t)(BYTES / sizeof(T)))

/* Loaded from and stored to any address of a T. */
typedef T V __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));

/* Vectors of positions, and channels, whose sums are in registers at a time. */
#define POSITIONS 3
#define CHANNELS 4
#define SLACK (POSITIONS * LANES)

/* As many images at a time as fit into so many bytes: what a core has in its second cache. */
#define WORKING_SET (256 << 10)

/* Channels at a time of a tensor in channels_last, where neighbours share a cache line. */
#define TOGETHER 16
/* Positions that are asked for ahead there: the processor does not see where reading goes on. */
#define AHEAD 16

/* What the caller gives, in this order. */
typedef struct {
    int64_t n, c_in, h, w, out_h, out_w, c_out;
    /* Groups that are computed, and the kept and the input channels of each. Of a depthwise
       convolution that is one channel, or some of them; `index` then says which. */
    int64_t groups, kept, inputs, depthwise;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int64_t x_last, dy_last; /* whether they are in channels_last */
} Shape;

/* X (or dX) or dY: n images of `channels` channels, in memory and in the layout, where they are in
   `phases` parts and `pad` from the edge. */
typedef struct {
    int64_t channels, h, w, last, stride_h, stride_w, pad_h, pad_w, phases;
} Side;

typedef struct {
    Side x, dy;
    int64_t rows, pitch, image; /* of a phase, with gaps: rows, numbers per row, per image */
    int64_t images, groups; /* how many at a time */
    int64_t margin, plane; /* zeros before the first image, numbers per channel and phase */
    int64_t taps, *phase, *shift; /* of each tap: which phase it reads, and how far it shifts */
} Layout;

static int64_t divided_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t smallest(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t largest(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Returns 0 if there is no memory. */
static int lay_out(const Shape *s, Layout *l, int threads)
{
    int64_t phases = s->stride_h * s->stride_w;
    l->x = (Side){s->c_in, s->h, s->w, s->x_last, s->stride_h, s->stride_w, s->pad_h, s->pad_w,
                  phases};
    l->dy = (Side){s->groups * s->kept, s->out_h, s->out_w, s->dy_last, 1, 1, 0, 0, 1};
    int64_t reach_h = (s->kernel_h - 1) * s->dilation_h / s->stride_h;
    int64_t reach_w = (s->kernel_w - 1) * s->dilation_w / s->stride_w;
    l->rows = largest(s->out_h + reach_h, divided_up(s->h + s->pad_h, s->stride_h));
    l->pitch = largest(s->out_w + reach_w, divided_up(s->w + s->pad_w, s->stride_w));
    l->image = l->rows * l->pitch;
    l->margin = reach_h * l->pitch + reach_w;
    int64_t together = s->x_last || s->dy_last ? divided_up(TOGETHER, s->inputs) : 1;
    l->groups = smallest(together, divided_up(s->groups, threads));
    int64_t channels = l->groups * (s->kept + s->inputs * phases);
    int64_t fit = WORKING_SET / (int64_t)sizeof(T) / (channels * l->image);
    l->images = largest(1, smallest(fit, s->n));
    l->plane = l->margin + l->images * l->image + SLACK;
    l->taps = s->kernel_h * s->kernel_w;
    l->phase = malloc(2 * l->taps * sizeof(int64_t));
    if (!l->phase)
        return 0;
    l->shift = l->phase + l->taps;
    for (int64_t i = 0; i < l->taps; i++) {
        int64_t down = i / s->kernel_w * s->dilation_h, right = i % s->kernel_w * s->dilation_w;
        l->phase[i] = down % s->stride_h * s->stride_w + right % s->stride_w;
        l->shift[i] = down / s->stride_h * l->pitch + right / s->stride_w;
    }
    return 1;
}

/* The groups and the images that are computed at a time. */
typedef struct {
    int64_t group, groups, image, images;
} Part;

static Part part(const Shape *s, const Layout *l, int64_t block, int64_t chunk)
{
    Part p = {block * l->groups, 0, chunk * l->images, 0};
    p.groups = smallest(l->groups, s->groups - p.group);
    p.images = smallest(l->images, s->n - p.image);
    return p;
}

/* --- in and out of the layout ----------------------------------------------------------------- */

#define MOVE(number, in_layout)                                                                    \
    (out ? (void)((number) = (in_layout)) : (void)((in_layout) = (number)))

/* One row of a channel, from or to the phases that hold its columns. */
INLINE void move_row(
    T *restrict row, T *restrict phases, int64_t plane, int64_t size, int64_t pad, int64_t stride,
    int out)
{
    if (stride == 1) {
        out ? memcpy(row, phases + pad, size * sizeof(T))
            : memcpy(phases + pad, row, size * sizeof(T));
        return;
    }
    int64_t j = 0;
    if (stride == 2) { /* in pairs, which can be vectorised */
        T *restrict even = phases + (pad + 1) / 2, *restrict odd = even + plane;
        if (pad % 2 && size)
            MOVE(row[j++], phases[plane + pad / 2]);
        T *restrict from = row + j;
        int64_t pairs = (size - j) / 2;
        for (int64_t i = 0; i < pairs; i++) {
            MOVE(from[2 * i], even[i]);
            MOVE(from[2 * i + 1], odd[i]);
        }
        if (j + 2 * pairs < size)
            MOVE(from[2 * pairs], even[pairs]);
        return;
    }
    for (; j < size; j++)
        MOVE(row[j], phases[(j + pad) % stride * plane + (j + pad) / stride]);
}

/* One row of all channels, which lie side by side; `at` are the ones to move. */
INLINE void move_row_last(
    T *row, int64_t channels, const int64_t *restrict at, int64_t count, T *phases, int64_t step,
    int64_t plane, int64_t size, int64_t pad, int64_t stride, int out)
{
    int64_t right = pad % stride, column = pad / stride;
    for (int64_t j = 0; j < size; j++, row += channels) {
        T *to = phases + right * plane + column;
        __builtin_prefetch(row + AHEAD * channels + at[0], out);
        __builtin_prefetch(row + AHEAD * channels + at[count - 1], out);
        for (int64_t c = 0; c < count; c++)
            MOVE(row[at[c]], to[c * step]);
        if (++right == stride) {
            right = 0;
            column++;
        }
    }
}

/* The channels `at` of some images, into or out of the layout: [count][phases]. */
INLINE void move(
    const Side *s, const Layout *l, T *all, const int64_t *at, int64_t count, const Part *p,
    T *planes, int out)
{
    int64_t step = s->phases * l->plane;
    for (int64_t c = 0; c < (s->last ? 1 : count); c++)
        for (int64_t i = 0; i < p->images; i++) {
            int64_t channel = (p->image + i) * s->channels + (s->last ? 0 : at[c]);
            T *row = all + channel * s->h * s->w;
            T *image = planes + c * step + l->margin + i * l->image;
            int64_t down = s->pad_h % s->stride_h, from = s->pad_h / s->stride_h * l->pitch;
            for (int64_t r = 0; r < s->h; r++) {
                T *phases = image + down * s->stride_w * l->plane + from;
                if (s->last) {
                    move_row_last(
                        row, s->channels, at, count, phases, step, l->plane,
                        s->w, s->pad_w, s->stride_w, out);
                    row += s->w * s->channels;
                } else {
                    move_row(row, phases, l->plane, s->w, s->pad_w, s->stride_w, out);
                    row += s->w;
                }
                if (++down == s->stride_h) {
                    down = 0;
                    from += l->pitch;
                }
            }
        }
}

static int64_t inputs_of(const Shape *s, const int64_t *index, const Part *p, int64_t *at)
{
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t first = (s->depthwise ? index[p->group + g] : p->group + g) * s->inputs;
        for (int64_t c = 0; c < s->inputs; c++)
            at[g * s->inputs + c] = first + c;
    }
    return p->groups * s->inputs;
}

static void put_x(
    const Shape *s, const Layout *l, const T *x, const int64_t *index, const Part *p, int64_t *at,
    T *planes)
{
    move(&l->x, l, (T *)x, at, inputs_of(s, index, p, at), p, planes, 0);
}

static void take_dx(
    const Shape *s, const Layout *l, T *dx, const int64_t *index, const Part *p, int64_t *at,
    T *planes)
{
    move(&l->x, l, dx, at, inputs_of(s, index, p, at), p, planes, 1);
}

static void put_dy(
    const Shape *s, const Layout *l, const T *dy, const Part *p, int64_t *at, T *planes)
{
    int64_t count = p->groups * s->kept;
    for (int64_t o = 0; o < count; o++)
        at[o] = p->group * s->kept + o;
    move(&l->dy, l, (T *)dy, at, count, p, planes, 0);
    /* Behind the last image another group's may be: the last vector of a row of sums reads it. */
    for (int64_t o = 0; o < count; o++)
        memset(planes + o * l->plane + l->margin + p->images * l->image, 0, LANES * sizeof(T));
}

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
