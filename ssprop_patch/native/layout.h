/* How conv.c lays out images, and what moves them there and back.

   Every image is flat, with gaps of zeros between its rows and behind its last just wide enough that
   a tap of the kernel is one shift of the whole: what lies right of a row lies left of the next.
   With a stride s the input falls into s * s parts ("phases") of every s-th row and column, and each
   tap reads one of them. There are two spatial dimensions; the first is 1 where a convolution has
   one. */

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

/* Vectors of positions that are computed at a time: so far may be written behind the last. */
#define POSITIONS 3
#define SLACK (POSITIONS * LANES)

/* As many images at a time as fit into so many bytes: what a core has in its second cache. */
#define WORKING_SET (256 << 10)

/* Input channels of a group at a time, about. */
#define SLICE 64

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
    int64_t images, groups, inputs; /* how many at a time, the last of each group */
    int64_t blocks, chunks, slices; /* and how often: of groups, of images, of input channels */
    int64_t margin, plane; /* zeros before and behind the images, numbers per channel and phase */
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

/* Rows, or columns, of an image with its gap. */
static int64_t with_gap(int64_t size, int64_t out, int64_t reach, int64_t pad, int64_t stride)
{
    return largest(divided_up(size + pad, stride), out + largest(reach - pad / stride, 0));
}

/* How many groups, images and input channels are computed at a time. Of the images it does not
   depend on the number of threads, so that these change no bit of a sum. */
static void divide(const Shape *s, Layout *l, int threads)
{
    int last = s->x_last || s->dy_last;
    int64_t together = last ? divided_up(TOGETHER, s->inputs) : 1;
    l->groups = smallest(together, divided_up(s->groups, threads));
    l->blocks = divided_up(s->groups, l->groups);
    int64_t channels = l->groups * (s->kept + smallest(s->inputs, SLICE) * l->x.phases);
    int64_t fit = WORKING_SET / (int64_t)sizeof(T) / (channels * l->image);
    l->images = divided_up(s->n, divided_up(s->n, largest(1, fit)));
    l->chunks = divided_up(s->n, l->images);
    /* Every thread has some, and as many as the others. */
    int64_t shares = l->blocks < threads ? threads : 1;
    int64_t slices = shares * divided_up(s->inputs, shares * SLICE), unit = last ? TOGETHER : 4;
    l->inputs = smallest(divided_up(divided_up(s->inputs, slices), unit) * unit, s->inputs);
    l->slices = divided_up(s->inputs, l->inputs);
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
    l->rows = with_gap(s->h, s->out_h, reach_h, s->pad_h, s->stride_h);
    l->pitch = with_gap(s->w, s->out_w, reach_w, s->pad_w, s->stride_w);
    l->image = l->rows * l->pitch;
    l->margin = reach_h * l->pitch + reach_w;
    divide(s, l, threads);
    l->plane = l->margin + l->images * l->image + l->margin + SLACK;
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

/* The groups, the images and the input channels that are computed at a time. */
typedef struct {
    int64_t group, groups, image, images, input, inputs;
} Part;

static Part part(const Shape *s, const Layout *l, int64_t block, int64_t chunk, int64_t slice)
{
    Part p = {block * l->groups, 0, chunk * l->images, 0, slice * l->inputs, 0};
    p.groups = smallest(l->groups, s->groups - p.group);
    p.images = smallest(l->images, s->n - p.image);
    p.inputs = smallest(l->inputs, s->inputs - p.input);
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
        int64_t group = s->depthwise ? index[p->group + g] : p->group + g;
        for (int64_t c = 0; c < p->inputs; c++)
            at[g * p->inputs + c] = group * s->inputs + p->input + c;
    }
    return p->groups * p->inputs;
}

static void put_x(
    const Shape *s, const Layout *l, const T *x, const int64_t *index, const Part *p, int64_t *at,
    T *planes)
{
    int64_t count = inputs_of(s, index, p, at);
    move(&l->x, l, (T *)x, at, count, p, planes, 0);
    /* Behind the last image another chunk's may be: the last rows of taps read it. */
    if (p->images < l->images)
        for (int64_t i = 0; i < count * l->x.phases; i++) {
            T *end = planes + i * l->plane + l->margin + p->images * l->image;
            memset(end, 0, l->margin * sizeof(T));
        }
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
