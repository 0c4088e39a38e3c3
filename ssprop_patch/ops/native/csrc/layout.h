/* How conv.c lays out images; move.h brings them there and back.

   Every image is flat, with gaps of zeros between its rows and behind its last just wide enough
   that a tap of the kernel is one shift of the whole: what lies right of a row lies left of the
   next. It is the same with what lies below, and in depth. With a stride s the input falls into s
   parts ("phases") of every s-th row, s of every s-th column, and each tap reads one of them. */

#ifndef LAYOUT_H
#define LAYOUT_H

#include "vector.h"

/* Vectors of positions that are computed at a time: that far behind the last one may be
   written. */
#define POSITIONS 3
#define SLACK (POSITIONS * LANES)

/* Bytes that the images of one turn may take: what a core has in its second cache. */
#define WORKING_SET (256 << 10)
/* The same of one image with all kept channels of a depthwise convolution. */
#define LARGEST_IMAGE (2 << 20)

/* Input channels of a group at a time, about. */
#define SLICE 64

/* Channels at a time of a tensor in channels_last, where neighbours share a cache line. */
#define TOGETHER 16

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

/* How many groups, images and input channels are computed at a time. The number of images depends on
   that of the threads only where these share the images: else that changes no bit of a sum. */
static inline void divide(const ConvShape *s, Layout *l, int threads)
{
    int last = s->x_last || s->dy_last;
    int64_t together = last ? ceil_div(TOGETHER, s->inputs) : 1;
    l->groups = min(together, ceil_div(s->computed, threads));
    /* Scattered channels have their cache lines in common with those of all other groups. */
    int64_t all = s->computed * (s->kept + s->inputs * l->x.phases) * l->image;
    int fits = all * (int64_t)sizeof(T) <= LARGEST_IMAGE;
    l->by_image = s->depthwise && s->x_last && s->n >= threads && fits;
    if (l->by_image)
        l->groups = s->computed;
    l->blocks = ceil_div(s->computed, l->groups);
    int64_t channels = l->groups * (s->kept + min(s->inputs, SLICE) * l->x.phases);
    int64_t fit = WORKING_SET / (int64_t)sizeof(T) / (channels * l->image);
    int64_t chunks = ceil_div(s->n, max(1, fit));
    l->images = ceil_div(s->n, max(chunks, l->by_image ? threads : 1));
    l->chunks = ceil_div(s->n, l->images);
    /* Every thread has some, and as many as the others. */
    int64_t shares = l->blocks < threads && !l->by_image ? threads : 1;
    int64_t slices = shares * ceil_div(s->inputs, shares * SLICE), unit = last ? TOGETHER : 4;
    l->inputs = min(ceil_div(ceil_div(s->inputs, slices), unit) * unit, s->inputs);
    l->slices = ceil_div(s->inputs, l->inputs);
}

/* How many numbers lie between two positions that are these planes, rows and columns apart. */
static inline int64_t distance(const Layout *l, const int64_t *steps)
{
    return (steps[0] * l->wide[1] + steps[1]) * l->wide[2] + steps[2];
}

/* Returns 0 if there is no memory. */
static inline int lay_out(const ConvShape *s, Layout *l, int threads)
{
    static const int64_t ones[3] = {1, 1, 1}, zeros[3];
    int64_t phases = s->stride[0] * s->stride[1] * s->stride[2], reach[3];
    l->x = (Side){s->c_in, s->x_last, phases, s->in_size, s->stride, s->padding};
    l->dy = (Side){s->computed * s->kept, s->dy_last, 1, s->out_size, ones, zeros};
    for (int i = 0; i < 3; i++) {
        reach[i] = (s->kernel[i] - 1) * s->dilation[i] / s->stride[i];
        /* What a tap reads behind the last row is the padding of the next image, never written. */
        l->wide[i] = max(ceil_div(s->in_size[i] + s->padding[i], s->stride[i]), s->out_size[i]);
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

/* The groups, the images and the input channels that are computed at a time. */
typedef struct {
    int64_t group, groups, image, images, input, inputs;
} Part;

static inline Part part(
    const ConvShape *s, const Layout *l, int64_t block, int64_t chunk, int64_t slice)
{
    Part p = {block * l->groups, 0, chunk * l->images, 0, slice * l->inputs, 0};
    p.groups = min(l->groups, s->computed - p.group);
    p.images = min(l->images, s->n - p.image);
    p.inputs = min(l->inputs, s->inputs - p.input);
    return p;
}

#endif
