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

/* --- channels that lie side by side ------------------------------------------------------------ */

/* Sums `size` numbers over the rows. */
INLINE void add_rows(const T *restrict row, Range rows, int64_t step, int64_t size, T *restrict sums)
{
    row += rows.from * step;
    if (rows.to - rows.from == 4) { /* as usual */
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            sums[j] = (row[j] + row[step + j]) + (row[2 * step + j] + row[3 * step + j]);
        return;
    }
    memset(sums, 0, size * sizeof(T));
    for (int64_t r = rows.from; r < rows.to; r++, row += step)
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            sums[j] += row[j];
}

/* `work` holds w * c numbers. */
static void sum_columns(
    const T *map, Range rows, const CellShape *s, T *restrict out, T *restrict work)
{
    int64_t c = s->c;
    add_rows(map, rows, s->length[1] * c, s->length[1] * c, work);
    for (int64_t b = 0; b < s->number[1]; b++, out += c)
        add_rows(work, inside(b, s->start[1], s->size[1], s->length[1]), c, c, out);
}

static void add_columns(const T *restrict values, Range rows, const CellShape *s, T *map)
{
    int64_t c = s->c;
    for (int64_t r = rows.from; r < rows.to; r++)
        for (int64_t b = 0; b < s->number[1]; b++) {
            Range columns = inside(b, s->start[1], s->size[1], s->length[1]);
            const T *restrict from = values + b * c;
            for (int64_t j = columns.from; j < columns.to; j++) {
                T *restrict to = map + (r * s->length[1] + j) * c;
#pragma omp simd
                for (int64_t i = 0; i < c; i++)
                    to[i] += from[i];
            }
        }
}

/* --- each channel by itself --------------------------------------------------------------------

   Rows are short and cells narrow: a few vectors of four, and a few numbers. Where their number is
   known when compiling, the loops are unrolled. */

typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));

INLINE T sum_of_cell(const T *restrict from, int64_t rows, int64_t width, int64_t size)
{
    Four sum = {0};
    T rest = 0;
    for (int64_t r = 0; r < rows; r++, from += width) {
        int64_t j = 0;
        for (; j + 4 <= size; j += 4)
            sum += *(const Four *)(from + j);
        for (; j < size; j++)
            rest += from[j];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]) + rest;
}

INLINE void add_to_cell(T value, int64_t rows, int64_t width, int64_t size, T *restrict to)
{
    Four four = {value, value, value, value};
    for (int64_t r = 0; r < rows; r++, to += width) {
        int64_t j = 0;
        for (; j + 4 <= size; j += 4)
            *(Four *)(to + j) += four;
        for (; j < size; j++)
            to[j] += value;
    }
}

/* `step` for the cells of a row that begin at the map's edge and are whole, by their usual sizes;
   then for the others. */
#define FOR_EACH_CELL(step)                                                                        \
    do {                                                                                           \
        int64_t width = s->length[1], size = s->size[1], count = rows.to - rows.from, b = 0;       \
        int64_t whole = s->start[1] ? 0 : min(s->number[1], width / size);                         \
        if (size == 4 && count == 4)                                                               \
            for (; b < whole; b++)                                                                 \
                step(b * 4, 4, 4);                                                                 \
        if (size == 5 && count == 5)                                                               \
            for (; b < whole; b++)                                                                 \
                step(b * 5, 5, 5);                                                                 \
        if (size == 4)                                                                             \
            for (; b < whole; b++)                                                                 \
                step(b * 4, count, 4);                                                             \
        for (; b < s->number[1]; b++) {                                                            \
            Range columns = inside(b, s->start[1], size, width);                                   \
            step(columns.from, count, columns.to - columns.from);                                  \
        }                                                                                          \
    } while (0)

static void sum_cells_of_map(const T *map, Range rows, const CellShape *s, T *restrict out)
{
    const T *row = map + rows.from * s->length[1];
#define SUM(from, height, wide) out[b] = sum_of_cell(row + (from), height, width, wide)
    FOR_EACH_CELL(SUM);
}

static void add_cells_to_map(const T *restrict values, Range rows, const CellShape *s, T *map)
{
    T *row = map + rows.from * s->length[1];
#define ADD(from, height, wide) add_to_cell(values[b], height, width, wide, row + (from))
    FOR_EACH_CELL(ADD);
}

void cells_of_rows(const T *rows, int64_t count, const CellShape *s, T *restrict out)
{
    sum_cells_of_map(rows, (Range){0, count}, s, out);
}

/* --- both --------------------------------------------------------------------------------------- */

/* Calls what `step` says for each row of cells; the work is divided by these, or by maps. */
#define FOR_EACH_ROW_OF_CELLS(units, of_a_unit, step)                                              \
    do {                                                                                           \
        int64_t a_map = s->length[0] * s->length[1] * s->c, a_row = s->number[1] * s->c;           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (int th = 0; th < threads; th++)                                                       \
            for (int64_t i = (units) * th / threads; i < (units) * (th + 1) / threads; i++) {      \
                int64_t first = i * (of_a_unit), map = first / s->number[0] * a_map;               \
                int64_t a = first % s->number[0], cells = first * a_row;                           \
                for (int64_t end = a + (of_a_unit); a < end; a++, cells += a_row) {                \
                    Range rows = inside(a, s->start[0], s->size[0], s->length[0]);                 \
                    step;                                                                          \
                }                                                                                  \
            }                                                                                      \
    } while (0)
#define BY_ROWS(step) FOR_EACH_ROW_OF_CELLS(s->maps * s->number[0], 1, step)
#define BY_MAPS(step) FOR_EACH_ROW_OF_CELLS(s->maps, s->number[0], step)

/* `work` holds threads * w * c numbers, if channels lie side by side. */
void sum_cells(const T *maps, const CellShape *s, T *out, T *work, int threads)
{
    int64_t line = s->length[1] * s->c;
    if (s->c > 1)
        BY_ROWS(sum_columns(maps + map, rows, s, out + cells, work + th * line));
    else
        BY_MAPS(sum_cells_of_map(maps + map, rows, s, out + cells));
}

void add_cells(const T *values, const CellShape *s, T *maps, int threads)
{
    if (s->c > 1)
        BY_ROWS(add_columns(values + cells, rows, s, maps + map));
    else
        BY_MAPS(add_cells_to_map(values + cells, rows, s, maps + map));
}
