/* Blocks of a model as `decode` in blocks.c takes them. swarm/model/kernels.py has the same, for ctypes. */
#pragma once
#include <stdint.h>

/* Weights as products.c describes them. */
struct linear {
  const void *w, *scales, *bias;
  int64_t N, K, bits;
};

struct norm {
  const uint16_t *weight; /* NULL: there is no such norm */
  float epsilon;
};

struct block {
  struct linear q, k, v, o, gate, up, down;
  struct norm norm, q_norm, k_norm, mlp_norm;
  uint16_t *keys, *values; /* of all key/value heads, in slots */
};

struct pass {
  const struct block *blocks;
  uint16_t *x;              /* [T, D] what enters the first block, and what leaves the last */
  const uint16_t *cos, *sin; /* [T, H] of the position of each token */
  const int64_t *slots;     /* [T] where each token's keys and values go */
  const int64_t *runs, *ends; /* see rows.h */
  int64_t num_blocks, T, D, N, G, H; /* tokens, features, key/value heads, query heads of each, size of a head */
  int64_t head, slot;       /* strides of keys and values */
  float scaling;
  int32_t level; /* of instructions, see product.h */
};
