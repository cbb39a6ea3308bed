// SPDX-License-Identifier: Apache-2.0
// Tables of what a byte of codes adds to the logits of all query rows at once, and of the weights that fall on it.
//
// A byte is the number of a centroid, or eight bits of a bit plane: which of eight channels have the bit. Either way
// there are 256 vectors of a few channels, and what they give with a query is worked out once for all entries.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "coded_call.h"

namespace {

// A number for each of N query rows.
template <int N>
struct Lanes {
  typedef float Row __attribute__((vector_size(4 * N)));
};
template <int N>
using Row = typename Lanes<N>::Row;

inline float half_number(uint16_t half) {
#ifdef __F16C__
  return _cvtsh_ss(half);
#else
  // The exponent is moved by a product, which makes numbers below the least normal one right, too.
  union { uint32_t bits; float value; } wide{uint32_t(half & 0x7fff) << 13}, bias{0x77800000}, result;
  result.value = wide.value * bias.value;
  if ((half & 0x7c00) == 0x7c00) result.bits |= 0x7f800000;
  result.bits |= uint32_t(half & 0x8000) << 16;
  return result.value;
#endif
}
inline void half_numbers(const uint16_t* from, int count, float* to) {
  int i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = half_number(from[i]);
}

// table [parts, 256] of each centroid's product with the queries [channel]; book float16 [parts, 256, channels].
template <int N, int CHANNELS>
inline void tabulate(const uint16_t* book, int parts, const Row<N>* query, Row<N>* table) {
  for (int part = 0; part < parts; ++part) {
    Row<N> own[CHANNELS];
    std::memcpy(own, query + part * CHANNELS, sizeof(own));
    for (int number = 0; number < CENTROIDS; ++number, book += CHANNELS) {
      float centroid[CHANNELS];
      half_numbers(book, CHANNELS, centroid);
      Row<N> even = own[0] * centroid[0], odd = own[1] * centroid[1];
      for (int i = 2; i < CHANNELS; i += 2) {
        even += own[i] * centroid[i];
        odd += own[i + 1] * centroid[i + 1];
      }
      *table++ = even + odd;
    }
  }
}

// Weights [parts, 256] that fell on centroids, to a sum of values [channel].
template <int N, int CHANNELS>
inline void spread(const uint16_t* book, int parts, const Row<N>* weights, Row<N>* out) {
  for (int part = 0; part < parts; ++part, out += CHANNELS) {
    Row<N> own[CHANNELS] = {};
    for (int number = 0; number < CENTROIDS; ++number, book += CHANNELS) {
      float centroid[CHANNELS];
      half_numbers(book, CHANNELS, centroid);
      const Row<N> weight = *weights++;
      for (int i = 0; i < CHANNELS; ++i) own[i] += weight * centroid[i];
    }
    for (int i = 0; i < CHANNELS; ++i) out[i] += own[i];
  }
}

// table [parts, 256] of the sum of the queries [channel] over the bits of each byte.
template <int N>
inline void tabulate_bits(int parts, const Row<N>* query, Row<N>* table) {
  for (int part = 0; part < parts; ++part, query += BYTE, table += CENTROIDS) {
    table[0] = Row<N>{};
    for (int bit = 0; bit < BYTE; ++bit)
      for (int below = 0; below < 1 << bit; ++below) table[(1 << bit) + below] = table[below] + query[bit];
  }
}

// Weights [parts, 256] that fell on bytes, to those of each bit, out [channel]. The weights are used up.
template <int N>
inline void spread_bits(int parts, Row<N>* weights, Row<N>* out) {
  for (int part = 0; part < parts; ++part, weights += CENTROIDS, out += BYTE)
    for (int bit = BYTE - 1; bit >= 0; --bit) {
      Row<N> sum = {};
      for (int below = 0; below < 1 << bit; ++below) {
        sum += weights[(1 << bit) + below];
        weights[below] += weights[(1 << bit) + below];
      }
      out[bit] += sum;
    }
}

// What the bytes of an entry add up to; PARTS of them, or `parts` where PARTS is 0.
template <int N, int PARTS>
inline Row<N> looked_up(const Row<N>* table, const uint8_t* bytes, int parts) {
  Row<N> even = {}, odd = {};
  const int count = PARTS ? PARTS : parts;
  int part = 0;
  for (; part + 2 <= count; part += 2) {
    even += table[part * CENTROIDS + bytes[part]];
    odd += table[(part + 1) * CENTROIDS + bytes[part + 1]];
  }
  if (part < count) even += table[part * CENTROIDS + bytes[part]];
  return even + odd;
}

// A weight falls on the bytes of an entry.
template <int N, int PARTS>
inline void let_fall(Row<N>* weights, const uint8_t* bytes, int parts, Row<N> weight) {
  const int count = PARTS ? PARTS : parts;
  for (int part = 0; part < count; ++part) weights[part * CENTROIDS + bytes[part]] += weight;
}

// Call work(number of bytes as a constant): 0 where it is none of those that loops are unrolled for.
template <class Work>
inline void by_parts(int parts, Work work) {
  switch (parts) {
    case 4: return work(std::integral_constant<int, 4>());
    case 8: return work(std::integral_constant<int, 8>());
    case 16: return work(std::integral_constant<int, 16>());
    default: return work(std::integral_constant<int, 0>());
  }
}

// Times the orthonormal Hadamard matrix of hadamard.py, in place: blocks of the largest power of two in `dim`.
template <int N>
inline void rotate(Row<N>* states, int dim) {
  const int block = dim & -dim;
  for (int half = 1; half < block; half *= 2)
    for (int at = 0; at < dim; at += 2 * half)
      for (int i = at; i < at + half; ++i) {
        const Row<N> first = states[i], second = states[i + half];
        states[i] = first + second;
        states[i + half] = first - second;
      }
  const float scale = 1 / std::sqrt(float(block));
  for (int i = 0; i < dim; ++i) states[i] *= scale;
}

}  // namespace
