/* Moves images into the layout of layout.h and out of it. */

#ifndef MOVE_H
#define MOVE_H

#include "layout.h"

/* Positions that are asked for ahead where channels lie side by side: the processor does not see
   where reading goes on. */
#define AHEAD 16
#define PREFETCH(address, to_write)                                                                \
    ((to_write) ? __builtin_prefetch(address, 1) : __builtin_prefetch(address, 0))

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

/* Four numbers at any address. */
typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef __typeof__(__builtin_choose_expr(sizeof(T) == 4, (int32_t)0, (int64_t)0)) Place;
typedef Place Places __attribute__((vector_size(4 * sizeof(T))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

/* to[i][j] = from[j][i] of four rows of four. */
INLINE void transpose(const T *from, int64_t from_row, T *to, int64_t to_row)
{
    Four a = *(const Four *)from, b = *(const Four *)(from + from_row);
    Four c = *(const Four *)(from + 2 * from_row), d = *(const Four *)(from + 3 * from_row);
    Four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    *(Four *)to = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(Four *)(to + to_row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
    *(Four *)(to + 2 * to_row) = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(Four *)(to + 3 * to_row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
}

/* Some channels at some positions of a row in which all channels lie side by side. */
INLINE void move_one_by_one(
    T *row, int64_t channels, const int64_t *restrict at, int64_t count, T *phases, int64_t step,
    int64_t plane, int64_t from, int64_t size, int64_t pad, int64_t stride, int out)
{
    int64_t right = (from + pad) % stride, column = (from + pad) / stride;
    row += from * channels;
    for (int64_t j = from; j < size; j++, row += channels) {
        T *to = phases + right * plane + column;
        PREFETCH(row + AHEAD * channels + at[0], out);
        PREFETCH(row + AHEAD * channels + at[count - 1], out);
        for (int64_t c = 0; c < count; c++)
            MOVE(row[at[c]], to[c * step]);
        if (++right == stride) {
            right = 0;
            column++;
        }
    }
}

/* As above, of neighbouring channels: four of them at four positions of a phase at a time. */
INLINE void move_fours(
    T *row, int64_t channels, const int64_t *restrict at, int64_t count, T *phases, int64_t step,
    int64_t plane, int64_t size, int64_t pad, int64_t stride, int out)
{
    int64_t fours = count / 4 * 4, whole = size / (4 * stride) * stride;
    for (int64_t j = 0; j < whole; j++) { /* the first of four positions */
        int64_t first = j / stride * 4 * stride + j % stride;
        T *from = row + first * channels + at[0];
        T *to = phases + (first + pad) % stride * plane + (first + pad) / stride;
        for (int64_t i = 0; i < 4; i++) {
            PREFETCH(from + (AHEAD + i * stride) * channels, out);
            PREFETCH(from + (AHEAD + i * stride) * channels + count - 1, out);
        }
        for (int64_t c = 0; c < fours; c += 4)
            out ? transpose(to + c * step, step, from + c, channels * stride)
                : transpose(from + c, channels * stride, to + c * step, step);
        for (int64_t c = fours; c < count; c++)
            for (int64_t i = 0; i < 4; i++)
                MOVE(from[i * stride * channels + c], to[c * step + i]);
    }
    move_one_by_one(
        row, channels, at, count, phases, step, plane, 4 * whole, size, pad, stride, out);
}

/* One row of all channels, which lie side by side; `at` are the ones to move. */
INLINE void move_row_last(
    T *row, int64_t channels, const int64_t *at, int64_t count, T *phases, int64_t step,
    int64_t plane, int64_t size, int64_t pad, int64_t stride, int out)
{
    if (count >= 4 && at[count - 1] - at[0] == count - 1)
        move_fours(row, channels, at, count, phases, step, plane, size, pad, stride, out);
    else
        move_one_by_one(row, channels, at, count, phases, step, plane, 0, size, pad, stride, out);
}

/* The channels `at` of some images, into or out of the layout: [count][phases]. */
INLINE void move(
    const Side *s, const Layout *l, T *all, const int64_t *at, int64_t count, const Part *p,
    T *planes, int out)
{
    int64_t step = s->phases * l->plane, numbers = s->size[0] * s->size[1] * s->size[2];
    int64_t deep = s->stride[0], down = s->stride[1], right = s->stride[2];
    for (int64_t c = 0; c < (s->last ? 1 : count); c++)
        for (int64_t i = 0; i < p->images; i++) {
            int64_t channel = (p->image + i) * s->channels + (s->last ? 0 : at[c]);
            T *row = all + channel * numbers;
            T *image = planes + c * step + l->margin + i * l->image;
            for (int64_t z = s->pad[0]; z < s->pad[0] + s->size[0]; z++) {
                int64_t place[3] = {z / deep, s->pad[1] / down, 0};
                int64_t phase = z % deep * down, below = s->pad[1] % down;
                for (int64_t y = 0; y < s->size[1]; y++) {
                    T *phases = image + (phase + below) * right * l->plane + distance(l, place);
                    if (s->last) {
                        if (out && l->by_image) /* the channels that are left out */
                            memset(row, 0, s->size[2] * s->channels * sizeof(T));
                        move_row_last(
                            row, s->channels, at, count, phases, step, l->plane,
                            s->size[2], s->pad[2], right, out);
                        row += s->size[2] * s->channels;
                    } else {
                        move_row(row, phases, l->plane, s->size[2], s->pad[2], right, out);
                        row += s->size[2];
                    }
                    if (++below == down) {
                        below = 0;
                        place[1]++;
                    }
                }
            }
        }
}

/* The input channels of a part, into `at`; returns how many. */
static inline int64_t inputs_of(
    const ConvShape *s, const int64_t *index, const Part *p, int64_t *at)
{
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t group = s->depthwise ? index[p->group + g] : p->group + g;
        for (int64_t c = 0; c < p->inputs; c++)
            at[g * p->inputs + c] = group * s->inputs + p->input + c;
    }
    return p->groups * p->inputs;
}

static inline void put_x(
    const ConvShape *s, const Layout *l, const T *x, const int64_t *index, const Part *p,
    int64_t *at, T *planes)
{
    move(&l->x, l, (T *)x, at, inputs_of(s, index, p, at), p, planes, 0);
}

static inline void take_dx(
    const ConvShape *s, const Layout *l, T *dx, const int64_t *index, const Part *p, int64_t *at,
    T *planes)
{
    move(&l->x, l, dx, at, inputs_of(s, index, p, at), p, planes, 1);
}

static inline void put_dy(
    const ConvShape *s, const Layout *l, const T *dy, const Part *p, int64_t *at, T *planes)
{
    int64_t count = p->groups * s->kept;
    for (int64_t o = 0; o < count; o++)
        at[o] = p->group * s->kept + o;
    move(&l->dy, l, (T *)dy, at, count, p, planes, 0);
    /* Behind the last image another group's may be: the last vector of a row of sums reads it. */
    for (int64_t o = 0; o < count; o++)
        memset(planes + o * l->plane + l->margin + p->images * l->image, 0, LANES * sizeof(T));
}

#endif
