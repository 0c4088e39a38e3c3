/* Sums over the cells of maps, and what spreads a number over each cell again; see common.h.

   A map has h * w positions of c numbers that lie side by side: channels in channels_last; else c is
   1, and each channel is a map of its own. Cell (a, b) begins at start + (a, b) * size. What of it
   lies outside of the map is not there. */

#include "common.h"

typedef struct {
    int64_t from, to;
} Range;

/* Returns the positions of a cell that lie in the map. */
INLINE Range inside(int64_t cell, int64_t start, int64_t size, int64_t length)
{
    int64_t from = max(0, start + cell * size), to = min(length, start + (cell + 1) * size);
    return (Range){from, max(from, to)};
}

/* The usual size of a cell, of which the loops below are unrolled. */
#define USUAL 4

/* Sums `size` numbers over the rows. */
INLINE void add_rows(const T *restrict row, Range rows, int64_t step, int64_t size, T *restrict sums)
{
    if (rows.to - rows.from == USUAL) {
        row += rows.from * step;
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            sums[j] = (row[j] + row[step + j]) + (row[2 * step + j] + row[3 * step + j]);
        return;
    }
    memset(sums, 0, size * sizeof(T));
    for (int64_t r = rows.from; r < rows.to; r++)
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            sums[j] += row[r * step + j];
}

/* Returns how many cells of the usual size lie at the beginning of a row. */
INLINE int64_t usual_cells(const CellShape *s)
{
    return s->start[1] == 0 && s->size[1] == USUAL ? min(s->number[1], s->length[1] / USUAL) : 0;
}

/* `work` holds w * c numbers. */
static void sum_a_row_of_cells(
    const T *map, Range rows, const CellShape *s, T *restrict out, T *restrict work)
{
    int64_t c = s->c;
    add_rows(map, rows, s->length[1] * c, s->length[1] * c, work);
    int64_t whole = c == 1 ? usual_cells(s) : 0;
    for (int64_t b = 0; b < whole; b++, out++, work += USUAL)
        *out = (work[0] + work[1]) + (work[2] + work[3]);
    work -= whole * USUAL;
    for (int64_t b = whole; b < s->number[1]; b++, out += c) {
        Range columns = inside(b, s->start[1], s->size[1], s->length[1]);
        if (c > 1) {
            add_rows(work, columns, c, c, out);
            continue;
        }
        T sum = 0;
        for (int64_t j = columns.from; j < columns.to; j++)
            sum += work[j];
        *out = sum;
    }
}

static void add_a_row_of_cells(
    const T *restrict values, Range rows, const CellShape *s, T *map, T *restrict work)
{
    int64_t c = s->c, size = s->length[1] * c;
    int64_t whole = c == 1 ? usual_cells(s) : 0;
    for (int64_t b = 0; b < whole; b++)
        for (int64_t j = 0; j < USUAL; j++)
            work[b * USUAL + j] = values[b];
    values += whole;
    memset(work + whole * USUAL, 0, (size - whole * USUAL) * sizeof(T));
    for (int64_t b = whole; b < s->number[1]; b++, values += c) {
        Range columns = inside(b, s->start[1], s->size[1], s->length[1]);
        for (int64_t j = columns.from; j < columns.to; j++)
            for (int64_t i = 0; i < c; i++)
                work[j * c + i] = values[i];
    }
    for (int64_t r = rows.from; r < rows.to; r++) {
        T *restrict row = map + r * size;
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            row[j] += work[j];
    }
}

/* `work` holds threads * w * c numbers. */
static void each_row_of_cells(
    const T *from, const CellShape *s, T *to, int spread, T *restrict work, int threads)
{
    int64_t a_map = s->length[0] * s->length[1] * s->c, a_row = s->number[1] * s->c;
    int64_t rows = s->maps * s->number[0];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int th = 0; th < threads; th++) {
        T *restrict own = work + th * s->length[1] * s->c;
        for (int64_t i = rows * th / threads; i < rows * (th + 1) / threads; i++) {
            int64_t map = i / s->number[0] * a_map;
            Range range = inside(i % s->number[0], s->start[0], s->size[0], s->length[0]);
            if (spread)
                add_a_row_of_cells(from + i * a_row, range, s, to + map, own);
            else
                sum_a_row_of_cells(from + map, range, s, to + i * a_row, own);
        }
    }
}

void sum_cells(const T *maps, const CellShape *s, T *out, T *work, int threads)
{
    each_row_of_cells(maps, s, out, 0, work, threads);
}

void add_cells(const T *values, const CellShape *s, T *maps, T *work, int threads)
{
    each_row_of_cells(values, s, maps, 1, work, threads);
}
