/* How conv.c lays out images; move.h brings them there and back.

   Every image is flat, with gaps of zeros between its rows and behind its last just wide enough that
   a tap of the kernel is one shift of the whole: what lies right of a row lies left of the next. So
   it is with what lies below, and in depth. With a stride s the input falls into s parts ("phases")
   of every s-th row, s of every s-th column, and each tap reads one of them. There are three spatial
   dimensions; the first are 1 where a convolution has fewer. */

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
/* And one image with all kept channels of a depthwise convolution only into so many. */
#define LARGEST_IMAGE (2 << 20)

/* Input channels of a group at a time, about. */
#define SLICE 64

/* Channels at a time of a tensor in channels_last, where neighbours share a cache line. */
#define TOGETHER 16

/* What the caller gives, in this order; native/conv.py has checked that it fits together. */
typedef struct {
    int64_t n, c_in, in[3], out[3], c_out;
    /* Of the convolution itself. `depthwise`: several groups with one output channel each. */
    int64_t groups, depthwise;
    /* Groups that are computed, and the kept and the input channels of each. Of a depthwise
       convolution those are some of its groups, perhaps one: `index` says which. */
    int64_t computed, kept, inputs;
    int64_t kernel[3], stride[3], pad[3], dilation[3];
    int64_t x_last, dy_last; /* whether they are in channels_last */
} Shape;

/* X (or dX) or dY: n images of `channels` channels, in memory and in the layout, where they are in
   `phases` parts and `pad` from the edge. */
typedef struct {
    int64_t channels, last, phases;
    const int64_t *size, *stride, *pad;
} Side;

typedef struct {
    Side x, dy;
    int64_t wide[3], image; /* of a phase, with gaps: of each dimension, numbers per image */
    int64_t images, groups, inputs; /* how many at a time, the last of each group */
    int64_t blocks, chunks, slices; /* and how often: of groups, of images, of input channels */
    int by_image; /* whether threads share the images, not the channels */
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

/* How many groups, images and input channels are computed at a time. Of the images it depends on the
   number of threads only where these share them: else that changes no bit of a sum. */
static void divide(const Shape *s, Layout *l, int threads)
{
    int last = s->x_last || s->dy_last;
    int64_t together = last ? divided_up(TOGETHER, s->inputs) : 1;
    l->groups = smallest(together, divided_up(s->computed, threads));
    /* Scattered channels have their cache lines in common with those of all other groups. */
    int64_t all = s->computed * (s->kept + s->inputs * l->x.phases) * l->image;
    int fits = all * (int64_t)sizeof(T) <= LARGEST_IMAGE;
    l->by_image = s->depthwise && s->x_last && s->n >= threads && fits;
    if (l->by_image)
        l->groups = s->computed;
    l->blocks = divided_up(s->computed, l->groups);
    int64_t channels = l->groups * (s->kept + smallest(s->inputs, SLICE) * l->x.phases);
    int64_t fit = WORKING_SET / (int64_t)sizeof(T) / (channels * l->image);
    int64_t chunks = divided_up(s->n, largest(1, fit));
    l->images = divided_up(s->n, largest(chunks, l->by_image ? threads : 1));
    l->chunks = divided_up(s->n, l->images);
    /* Every thread has some, and as many as the others. */
    int64_t shares = l->blocks < threads && !l->by_image ? threads : 1;
    int64_t slices = shares * divided_up(s->inputs, shares * SLICE), unit = last ? TOGETHER : 4;
    l->inputs = smallest(divided_up(divided_up(s->inputs, slices), unit) * unit, s->inputs);
    l->slices = divided_up(s->inputs, l->inputs);
}

/* So many columns, rows and planes, in numbers. */
static int64_t distance(const Layout *l, const int64_t *steps)
{
    return (steps[0] * l->wide[1] + steps[1]) * l->wide[2] + steps[2];
}

/* Returns 0 if there is no memory. */
static int lay_out(const Shape *s, Layout *l, int threads)
{
    static const int64_t ones[3] = {1, 1, 1}, zeros[3];
    int64_t phases = s->stride[0] * s->stride[1] * s->stride[2], reach[3];
    l->x = (Side){s->c_in, s->x_last, phases, s->in, s->stride, s->pad};
    l->dy = (Side){s->computed * s->kept, s->dy_last, 1, s->out, ones, zeros};
    for (int i = 0; i < 3; i++) {
        reach[i] = (s->kernel[i] - 1) * s->dilation[i] / s->stride[i];
        /* What a tap reads behind the last row is the padding of the next image, never written. */
        l->wide[i] = largest(divided_up(s->in[i] + s->pad[i], s->stride[i]), s->out[i]);
    }
    l->image = l->wide[0] * l->wide[1] * l->wide[2];
    l->margin = distance(l, reach);
    divide(s, l, threads);
    l->plane = l->margin + l->images * l->image + l->margin + SLACK;
    l->taps = s->kernel[0] * s->kernel[1] * s->kernel[2];
    l->phase = malloc(2 * l->taps * sizeof(int64_t));
    if (!l->phase)
        return 0;
    l->shift = l->phase + l->taps;
    for (int64_t t = 0; t < l->taps; t++) {
        int64_t at[3] = {t / s->kernel[2] / s->kernel[1], t / s->kernel[2] % s->kernel[1],
                         t % s->kernel[2]};
        l->phase[t] = 0;
        for (int i = 0; i < 3; i++) {
            int64_t there = at[i] * s->dilation[i];
            l->phase[t] = l->phase[t] * s->stride[i] + there % s->stride[i];
            at[i] = there / s->stride[i];
        }
        l->shift[t] = distance(l, at);
    }
    return 1;
}

/* Whether `index` says as many channels of each group as `s` does. */
static int is_index_of(const Shape *s, const int64_t *index)
{
    int64_t size = s->depthwise ? s->c_out : s->c_out / s->groups;
    int64_t each = s->depthwise ? s->computed : s->kept;
    for (int64_t j = 0; j < s->computed * s->kept; j++)
        if (index[j] / size != j / each)
            return 0;
    return are_channels(index, s->computed * s->kept, s->c_out, 1);
}

/* The groups, the images and the input channels that are computed at a time. */
typedef struct {
    int64_t group, groups, image, images, input, inputs;
} Part;

static Part part(const Shape *s, const Layout *l, int64_t block, int64_t chunk, int64_t slice)
{
    Part p = {block * l->groups, 0, chunk * l->images, 0, slice * l->inputs, 0};
    p.groups = smallest(l->groups, s->computed - p.group);
    p.images = smallest(l->images, s->n - p.image);
    p.inputs = smallest(l->inputs, s->inputs - p.input);
    return p;
}
