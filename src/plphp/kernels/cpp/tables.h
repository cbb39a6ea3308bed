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
#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "coded_call.h"
#include "vectors.h"

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
inline Row<BYTE> eight_halves(const uint16_t* from) {
#ifdef __F16C__
  return (Row<BYTE>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Row<BYTE> result;
  for (int i = 0; i < BYTE; ++i) result[i] = half_number(from[i]);
  return result;
#endif
}
// `count` is a multiple of eight.
inline void half_numbers(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += BYTE) {
    const Row<BYTE> eight = eight_halves(from + i);
    std::memcpy(to + i, &eight, sizeof(eight));
  }
}

// Two centroids at once where vectors are twice as wide as N lanes.
template <int N>
constexpr int TOGETHER = LANES == 2 * N ? 2 : 1;
template <int N>
using Rows = Row<N * TOGETHER<N>>;

// A channel of as many centroids, which lie side by side with eight numbers each: in all lanes of their rows.
template <int N, int CHANNEL, class Centroids, int... LANE>
inline Rows<N> broadcast(Centroids centroids, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(centroids, centroids, (LANE / N * BYTE + CHANNEL)...);
}

// Call work(the first of as many centroids, each of eight of their channels as rows).
template <int N, class Work, int... CHANNEL>
inline void by_centroids(const uint16_t* book, int channels, Work work, std::integer_sequence<int, CHANNEL...>) {
  constexpr std::make_integer_sequence<int, N * TOGETHER<N>> lanes;
  for (int number = 0; number < CENTROIDS; number += TOGETHER<N>) {
    const Row<BYTE> first = eight_halves(book + number * channels);
    if constexpr (TOGETHER<N> == 1) {
      const Rows<N> of_channels[] = {Rows<N>{} + first[CHANNEL]...};
      work(number, of_channels);
    } else {
      const Row<BYTE> second = eight_halves(book + (number + 1) * channels);
      const Row<2 * BYTE> both =
          __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const Rows<N> of_channels[] = {broadcast<N, CHANNEL>(both, lanes)...};
      work(number, of_channels);
    }
  }
}
constexpr std::make_integer_sequence<int, BYTE> CHANNELS_OF_BYTE;

// table [parts, 256] of each centroid's product with the queries [channel]; book float16 [parts, 256, channels].
template <int N>
inline void tabulate(const uint16_t* book, int parts, int channels, const Row<N>* query, Row<N>* table) {
  for (int part = 0; part < parts; ++part, book += CENTROIDS * channels, table += CENTROIDS)
    for (int at = 0; at < channels; at += BYTE) {
      Rows<N> own[BYTE];
      for (int i = 0; i < TOGETHER<N> * BYTE; ++i) ((Row<N>*)own)[i] = *(query + i / TOGETHER<N>);
      query += BYTE;
      by_centroids<N>(book + at, channels, [&](int number, const Rows<N>* centroids) {
        Rows<N> even = own[0] * centroids[0], odd = own[1] * centroids[1];
        for (int i = 2; i < BYTE; i += 2) {
          even += own[i] * centroids[i];
          odd += own[i + 1] * centroids[i + 1];
        }
        Rows<N>& to = *(Rows<N>*)(table + number);
        to = at ? to + (even + odd) : even + odd;
      }, CHANNELS_OF_BYTE);
    }
}

// Weights [parts, 256] that fell on centroids, to a sum of values [channel].
template <int N>
inline void spread(const uint16_t* book, int parts, int channels, const Row<N>* weights, Row<N>* out) {
  for (int part = 0; part < parts; ++part, book += CENTROIDS * channels, weights += CENTROIDS)
    for (int at = 0; at < channels; at += BYTE) {
      Rows<N> own[BYTE] = {};
      by_centroids<N>(book + at, channels, [&](int number, const Rows<N>* centroids) {
        const Rows<N> weight = *(const Rows<N>*)(weights + number);
        for (int i = 0; i < BYTE; ++i) own[i] += weight * centroids[i];
      }, CHANNELS_OF_BYTE);
      for (int i = 0; i < TOGETHER<N> * BYTE; ++i) out[i / TOGETHER<N>] += ((Row<N>*)own)[i];
      out += BYTE;
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

// The place of a byte in the table of its part: written so that a part is a constant beside the address.
template <int N>
inline Row<N>& at(Row<N>* table, int part, uint8_t byte) {
  return *(Row<N>*)((char*)table + (size_t(byte) * sizeof(Row<N>)) + size_t(part) * CENTROIDS * sizeof(Row<N>));
}

// What the bytes of an entry add up to; PARTS of them, or `parts` where PARTS is 0.
template <int N, int PARTS>
inline Row<N> looked_up(Row<N>* table, const uint8_t* bytes, int parts) {
  Row<N> even = {}, odd = {};
  const int count = PARTS ? PARTS : parts;
  int part = 0;
  for (; part + 2 <= count; part += 2) {
    even += at<N>(table, part, bytes[part]);
    odd += at<N>(table, part + 1, bytes[part + 1]);
  }
  if (part < count) even += at<N>(table, part, bytes[part]);
  return even + odd;
}

// A weight falls on the bytes of an entry.
template <int N, int PARTS>
inline void let_fall(Row<N>* weights, const uint8_t* bytes, int parts, Row<N> weight) {
  const int count = PARTS ? PARTS : parts;
  for (int part = 0; part < count; ++part) at<N>(weights, part, bytes[part]) += weight;
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
