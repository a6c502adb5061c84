/* What rows.c offers to other files. */
#pragma once
#include "lanes.h"

#if HAS_KERNELS
struct attention {
  const uint16_t *q;            /* [T, N, G, H] */
  const uint16_t *keys, *values; /* of N heads, in slots */
  uint16_t *y;                  /* [T, N, G, V] */
  const int64_t *runs;          /* [R, 2] slots [start, end), those of the sequences one after the other */
  const int64_t *ends;          /* [T] how many runs there are up to the end of a sequence */
  long T, N, G, H, V;           /* sequences, key/value heads, query heads of each, size of a key and of a value */
  long key_head, key_slot, value_head, value_slot; /* strides */
  float scaling;
  int failed;
};

/* Rows of x, [M, D], divided by their root mean square and multiplied with the weights, all bfloat16; both products are
 * rounded, as the library does it. D is a multiple of 8. */
void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, long M, long D, float epsilon);

/* What a thread does of an attention. */
void share_attention(void *attention);
#endif
