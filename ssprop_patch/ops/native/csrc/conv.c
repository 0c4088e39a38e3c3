/* The backward of convolutions for the kept output channels; see layout.h.

   The kernels of libraries take channels in blocks. A group that keeps one or two of its channels
   fills none, and of few channels the way into blocks and back takes as long as the arithmetic. So
   here positions are what is vectorised:

       dX[f] = sum over kept channels and taps of dY[f - shift] * w
       dW    = sum over f of dY[f] * X[f + shift] */

#include "move.h"

/* Channels whose sums are in registers at a time, POSITIONS vectors of each. */
#define CHANNELS 4
/* Terms of dX at a time, whose dY the first cache holds. */
#define TERMS 300

/* Keeps the compiler from reading a vector from memory again for each product that it is part of,
   of which there are more than a processor can read. */
#if defined(__x86_64__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector)
#endif

/* --- dX --------------------------------------------------------------------------------------- */

/* Adds `count` terms to `out`, or sets it to them if they are the first. `w` is [terms][channels]:
   the weights of each shifted plane of dY. */
INLINE void dx_of_channels(
    const T *const *restrict terms, const T *restrict w, int64_t count, int64_t f, int first,
    T *restrict out, int64_t stride, int channels)
{
    V sum[CHANNELS][POSITIONS];
    for (int c = 0; c < channels; c++)
        for (int p = 0; p < POSITIONS; p++)
            sum[c][p] = first ? (V){0} : *(const V *)(out + c * stride + f + p * LANES);
    for (int64_t t = 0; t < count; t++, w += channels) {
        const T *from = terms[t] + f;
        V dy[POSITIONS];
        for (int p = 0; p < POSITIONS; p++) {
            dy[p] = *(const V *)(from + p * LANES);
            IN_REGISTER(dy[p]);
        }
        for (int c = 0; c < channels; c++)
            for (int p = 0; p < POSITIONS; p++)
                sum[c][p] += dy[p] * w[c];
    }
    for (int c = 0; c < channels; c++)
        for (int p = 0; p < POSITIONS; p++)
            *(V *)(out + c * stride + f + p * LANES) = sum[c][p];
}

/* The weights of one group as they are read: [phases][blocks of CHANNELS inputs][terms][channels of
   the block]. Returns whether all are finite: the zeros in gaps are multiplied by them. */
static int pack(const ConvShape *s, const Layout *l, const T *w, const int64_t *index, T *packed)
{
    T zero = 0;
    for (int64_t phase = 0; phase < l->x.phases; phase++)
        for (int64_t block = 0; block < s->inputs; block += CHANNELS) {
            int64_t channels = min(s->inputs - block, CHANNELS);
            for (int64_t o = 0; o < s->kept; o++)
                for (int64_t t = 0; t < l->taps; t++)
                    if (l->phase[t] == phase)
                        for (int64_t c = 0; c < channels; c++) {
                            T value = w[(index[o] * s->inputs + block + c) * l->taps + t];
                            zero += value - value;
                            *packed++ = value;
                        }
        }
    return zero == 0;
}

static void dx_of_phase(
    const Layout *l, const Part *p, const T *const *terms, int64_t count, const T *packed, T *out)
{
    int64_t stride = l->x.phases * l->plane;
    int64_t parts = max(1, ceil_div(count, TERMS)), most = ceil_div(count, parts);
    for (int64_t part = 0, first = 0; part < parts; part++, first += most)
        for (int64_t f = 0; f < p->images * l->image; f += POSITIONS * LANES)
            for (int64_t block = 0; block < p->inputs; block += CHANNELS) {
                int64_t channels = min(p->inputs - block, CHANNELS);
                const T *w = packed + block * count + first * channels;
                const T *const *from = terms + first;
                int64_t some = min(count - first, most);
                T *to = out + block * stride;
                switch (channels) {
                case 1: dx_of_channels(from, w, some, f, !first, to, stride, 1); break;
                case 2: dx_of_channels(from, w, some, f, !first, to, stride, 2); break;
                case 3: dx_of_channels(from, w, some, f, !first, to, stride, 3); break;
                default: dx_of_channels(from, w, some, f, !first, to, stride, CHANNELS);
                }
            }
}

/* dX of one group, some of its inputs and some images. */
static void dx_of_group(
    const ConvShape *s, const Layout *l, const Part *p, const T *dy, const T *packed,
    const T **terms, T *planes)
{
    for (int64_t phase = 0; phase < l->x.phases; phase++) {
        int64_t count = 0;
        for (int64_t o = 0; o < s->kept; o++)
            for (int64_t t = 0; t < l->taps; t++)
                if (l->phase[t] == phase)
                    terms[count++] = dy + o * l->plane + l->margin - l->shift[t];
        T *to = planes + phase * l->plane + l->margin;
        dx_of_phase(l, p, terms, count, packed + p->input * count, to);
        packed += s->inputs * count;
    }
}

/* dX, whole. `dy` has the kept channels only, `w` has all, `index` are the kept ones, ascending.
   NOT_FINITE, and no dX, if a weight is that. */
int conv_dx(
    const T *dy, const T *w, const int64_t *index, const ConvShape *s, T *dx, int threads)
{
    Layout l;
    if (!are_kept_channels(index, s))
        return BAD_INDEX;
    if (!lay_out(s, &l, threads))
        return NO_MEMORY;
    int64_t jobs = l.blocks * l.chunks * l.slices;
    int64_t step = l.x.phases * l.plane, most = s->kept * l.taps, group = s->inputs * most;
    T *packed = malloc(s->computed * group * sizeof(T));
    int failed = !packed, not_finite = 0;
#pragma omp parallel num_threads(threads)
    {
        T *dy_planes = calloc(l.groups * s->kept * l.plane, sizeof(T));
        T *planes = malloc(l.groups * l.inputs * step * sizeof(T));
        const T **terms = malloc(most * sizeof(T *));
        int64_t *at = malloc(l.groups * (s->kept + l.inputs) * sizeof(int64_t)), there = -1;
        if (!dy_planes || !planes || !terms || !at) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (s->depthwise && !l.by_image) { /* the groups that are left out */
            int64_t size = s->c_in * s->in_size[0] * s->in_size[1] * s->in_size[2];
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s->n; i++)
                memset(dx + i * size, 0, size * sizeof(T));
        }
#pragma omp for schedule(static)
        for (int64_t g = 0; g < s->computed; g++)
            if (!failed && !pack(s, &l, w, index + g * s->kept, packed + g * group)) {
#pragma omp atomic write
                not_finite = 1;
            }
#pragma omp for schedule(static)
        for (int64_t job = 0; job < jobs; job++) {
            if (failed || not_finite)
                continue;
            int64_t place = job / l.slices; /* of all slices the same dY */
            Part p = part(s, &l, place / l.chunks, place % l.chunks, job % l.slices);
            if (there != place)
                put_dy(s, &l, dy, &p, at, dy_planes);
            there = place;
            for (int64_t g = 0; g < p.groups; g++)
                dx_of_group(
                    s, &l, &p, dy_planes + g * s->kept * l.plane,
                    packed + (p.group + g) * group, terms, planes + g * p.inputs * step);
            take_dx(s, &l, dx, index, &p, at, planes);
        }
        free(dy_planes);
        free(planes);
        free(terms);
        free(at);
    }
    free(packed);
    free(l.phase);
    return failed ? NO_MEMORY : not_finite ? NOT_FINITE : DONE;
}

/* --- dW --------------------------------------------------------------------------------------- */

/* Adds to `sums`, [channels][count of all terms], the products of some planes of dY with some of
   X. */
INLINE void dw_of_tile(
    const T *const *restrict dy, const T *const *restrict terms, int64_t size,
    double *restrict sums, int64_t width, int channels, int count)
{
    V sum[3][9];
    for (int o = 0; o < channels; o++)
        for (int t = 0; t < count; t++)
            sum[o][t] = (V){0};
    for (int64_t f = 0; f < size; f += LANES) {
        V d[3];
        for (int o = 0; o < channels; o++) {
            d[o] = *(const V *)(dy[o] + f);
            IN_REGISTER(d[o]);
        }
        for (int t = 0; t < count; t++) {
            V x = *(const V *)(terms[t] + f);
            IN_REGISTER(x);
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

/* As many sums as there are registers for. */
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
    default: TILES(3, 4);
    }
}

/* Adds the products of one group and some images to `sums`, [kept][inputs][taps]. */
static void dw_of_group(
    const ConvShape *s, const Layout *l, const Part *p, const T *dy, const T *x,
    const T **terms, const T **dy_terms, double *sums)
{
    int64_t width = p->inputs * l->taps;
    for (int64_t o = 0; o < s->kept; o++)
        dy_terms[o] = dy + o * l->plane + l->margin;
    for (int64_t c = 0; c < p->inputs; c++)
        for (int64_t t = 0; t < l->taps; t++) {
            int64_t plane = c * l->x.phases + l->phase[t];
            terms[c * l->taps + t] = x + plane * l->plane + l->margin + l->shift[t];
        }
    /* Up to the last number that is not in a gap. */
    int64_t end[3] = {s->out_size[0] - 1, s->out_size[1] - 1, s->out_size[2]};
    int64_t size = (p->images - 1) * l->image + distance(l, end);
    for (int64_t o = 0, channels; o < s->kept; o += channels) {
        channels = s->kept - o == 3 || s->kept - o > 4 ? 3 : min(s->kept - o, 2);
        dw_of_channels(dy_terms + o, terms, size, sums + o * width, width, channels);
    }
}

/* Writes the sums of some groups and inputs to their places. Returns whether there is no nan: a
   number in X or dY that is not finite makes one with a zero in a gap, too. */
static int put_dw(
    const ConvShape *s, const Layout *l, const Part *p, const int64_t *index, const double *sums,
    T *dw)
{
    int64_t width = p->inputs * l->taps;
    int nans = 0;
    for (int64_t o = 0; o < p->groups * s->kept; o++) {
        int64_t row = index[p->group * s->kept + o] * s->inputs + p->input;
        for (int64_t t = 0; t < width; t++) {
            double sum = sums[o * width + t];
            nans |= sum != sum;
            dw[row * l->taps + t] = (T)sum;
        }
    }
    return !nans;
}

/* dW, whole; arguments as for conv_dx. NOT_FINITE if there is a nan in it, see put_dw. */
int conv_dw(
    const T *dy, const T *x, const int64_t *index, const ConvShape *s, T *dw, int threads)
{
    Layout l;
    if (!are_kept_channels(index, s))
        return BAD_INDEX;
    if (!lay_out(s, &l, threads))
        return NO_MEMORY;
    /* Where threads share the images, each chunk has sums of its own, added up in the end. */
    int64_t parts = l.by_image ? l.chunks : 1, jobs = l.blocks * l.slices * parts;
    int64_t step = l.x.phases * l.plane, most = l.inputs * l.taps;
    int64_t size = l.groups * s->kept * most;
    double *shared = l.by_image ? malloc(parts * size * sizeof(double)) : NULL;
    int failed = l.by_image && !shared, not_finite = 0;
    memset(dw, 0, s->c_out * s->inputs * l.taps * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        T *dy_planes = calloc(l.groups * s->kept * l.plane, sizeof(T));
        T *x_planes = calloc(l.groups * l.inputs * step, sizeof(T));
        double *own = malloc(size * sizeof(double));
        const T **terms = malloc((s->kept + most) * sizeof(T *)), **dy_terms = terms + most;
        int64_t *at = malloc(l.groups * (s->kept + l.inputs) * sizeof(int64_t));
        if (!dy_planes || !x_planes || !own || !terms || !at) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t job = 0; job < jobs; job++) {
            if (failed)
                continue;
            double *sums = l.by_image ? shared + job * size : own;
            memset(sums, 0, size * sizeof(double));
            int64_t place = job / parts, first = job % parts;
            int64_t last = parts > 1 ? first + 1 : l.chunks;
            Part p;
            for (int64_t chunk = first; chunk < last; chunk++) {
                p = part(s, &l, place / l.slices, chunk, place % l.slices);
                put_dy(s, &l, dy, &p, at, dy_planes);
                put_x(s, &l, x, index, &p, at, x_planes);
                for (int64_t g = 0; g < p.groups; g++)
                    dw_of_group(
                        s, &l, &p, dy_planes + g * s->kept * l.plane,
                        x_planes + g * p.inputs * step, terms, dy_terms,
                        sums + g * s->kept * p.inputs * l.taps);
            }
            if (!l.by_image && !put_dw(s, &l, &p, index, sums, dw)) {
#pragma omp atomic write
                not_finite = 1;
            }
        }
        free(dy_planes);
        free(x_planes);
        free(own);
        free(terms);
        free(at);
    }
    if (l.by_image && !failed) {
        for (int64_t i = size; i < parts * size; i++)
            shared[i % size] += shared[i];
        Part all = part(s, &l, 0, 0, 0);
        not_finite = !put_dw(s, &l, &all, index, shared, dw);
    }
    free(shared);
    free(l.phase);
    return failed ? NO_MEMORY : not_finite ? NOT_FINITE : DONE;
}
