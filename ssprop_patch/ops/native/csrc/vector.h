/* Vectors as wide as the processor's registers; see common.h. */

#ifndef VECTOR_H
#define VECTOR_H

#include "common.h"

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

#endif
