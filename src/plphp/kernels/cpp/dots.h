// SPDX-License-Identifier: Apache-2.0
// Values by AVX-512's products of pairs of bf16: two entries are decoded side by side, in registers, and weighed for
// several query rows at once. Weights and centroids are rounded to bf16, as weights are for AMX; codes of bit planes are
// exact in it.
#pragma once
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__BMI2__)
#define PLPHP_DOTS
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "coded_call.h"
#include "tables.h"

namespace {

#ifdef PLPHP_DOTS
constexpr int PAIRS = 128;  // pairs of entries that are made ready at once: 64 take longer, and 512 no less

// Some pairs of entries.
template <int N>
struct Pairs {
  static constexpr int ROWS = std::max(N, 8);
  alignas(64) uint32_t weights[PAIRS][ROWS];  // two bf16 in a word
  int64_t offsets[PAIRS][2];  // of their bytes: in all streams of a side an entry has as many
  int count;
};

// Those from entry `first` on, weights times their scales where there are any; a last entry alone is paired with itself,
// at no weight.
template <int N>
inline void pair_up(const Row<N>* weights, int first, int count, const uint16_t* scales, const Bytes& order,
                    Pairs<N>& to) {
  to.count = std::min(PAIRS, (count - first + 1) / 2);
  for (int pair = 0; pair < to.count; ++pair) {
    Row<N> own[2] = {};
    for (int i = 0; i < 2; ++i) {
      const int entry = first + 2 * pair + i;
      const int64_t place = order.entry(std::min(entry, count - 1));
      to.offsets[pair][i] = place * order.parts;
      if (entry >= count) continue;
      own[i] = weights[entry];
      if (scales) own[i] *= half_number(scales[place]);
    }
    for (int lane = 0; lane < N; lane += 8) {
      __m256 low, high;
      std::memcpy(&low, (float*)&own[0] + lane, N < 8 ? sizeof(own[0]) : sizeof(low));
      std::memcpy(&high, (float*)&own[1] + lane, N < 8 ? sizeof(own[1]) : sizeof(high));
      const __m256i first_of = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(low)),
                    second_of = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(high));
      _mm256_store_si256((__m256i*)&to.weights[pair][lane],
                         _mm256_or_si256(first_of, _mm256_slli_epi32(second_of, 16)));
    }
  }
}

// Channels of centroids, of LAYERS codebooks that are added up.
template <int COUNT>
struct OfBooks {
  static constexpr int LAYERS = COUNT, VECTORS = 2;
  const uint16_t* books[COUNT];  // bf16 [parts, 256, 8]
  Bytes bytes[COUNT];

  // VECTORS times sixteen channels from `channel` on, of two entries, number by number.
  template <int VECTORS>
  void decode(int layer, int channel, const int64_t* offsets, __m512i (&to)[VECTORS]) const {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const uint8_t* own = bytes[layer].stream + channel / BYTE + offsets[0];
    const uint8_t* next = bytes[layer].stream + channel / BYTE + offsets[1];
    const __m128i* book = (const __m128i*)books[layer] + channel / BYTE * CENTROIDS;
    for (int i = 0; i < VECTORS; ++i, book += 2 * CENTROIDS)
      to[i] = _mm512_permutex2var_epi16(sixteen(book, own + 2 * i), order, sixteen(book, next + 2 * i));
  }

 private:
  static __m512i sixteen(const __m128i* book, const uint8_t* own) {
    return _mm512_castsi256_si512(
        _mm256_inserti128_si256(_mm256_castsi128_si256(book[own[0]]), book[CENTROIDS + own[1]], 1));
  }
};

// What bit planes stand for: the distance of the codes from their middle.
template <int PLANES>
struct OfPlanes {
  static constexpr int LAYERS = 1, VECTORS = 4;
  Bytes bytes[PLANES];
  __m512i numbers;  // of each code, in bf16

  explicit OfPlanes(const Bytes* from) {
    std::copy(from, from + PLANES, bytes);
    alignas(64) uint16_t own[32] = {};
    for (int code = 0; code < 1 << PLANES; ++code) {
      const float number = float(code) - (float(1 << (PLANES - 1)) - 0.5f);
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      own[code] = uint16_t(bits >> 16);  // exact
    }
    numbers = _mm512_load_si512(own);
  }

  template <int VECTORS>
  void decode(int, int channel, const int64_t* offsets, __m512i (&to)[VECTORS]) const {
    for (int i = 0; i < VECTORS; i += 2) {
      __m512i low = _mm512_setzero_si512(), high = low;
      for (int plane = 0; plane < PLANES; ++plane) {
        uint32_t own[2];
        std::memcpy(&own[0], bytes[plane].stream + channel / BYTE + offsets[0] + 2 * i, 4);
        std::memcpy(&own[1], bytes[plane].stream + channel / BYTE + offsets[1] + 2 * i, 4);
        const uint64_t both = _pdep_u64(own[0], 0x5555555555555555) | _pdep_u64(own[1], 0xaaaaaaaaaaaaaaaa);
        const __m512i bit = _mm512_set1_epi16(1 << (PLANES - 1 - plane));
        low = _mm512_or_si512(low, _mm512_maskz_mov_epi16(__mmask32(both), bit));
        high = _mm512_or_si512(high, _mm512_maskz_mov_epi16(__mmask32(both >> 32), bit));
      }
      to[i] = _mm512_permutexvar_epi16(low, numbers);
      to[i + 1] = _mm512_permutexvar_epi16(high, numbers);
    }
  }
};

// Pairs are added to sums [rows, width], for ROWS rows from `row` on.
template <int ROWS, int VECTORS, int N, class Values>
inline void add_pairs(const Values& given, const Pairs<N>& pairs, int channel, int row, float* sums, int width) {
  const Values values = given;  // in registers
  __m512 own[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) own[i][j] = _mm512_loadu_ps(sums + (row + i) * width + channel + 16 * j);
  for (int pair = 0; pair < pairs.count; ++pair)
    for (int layer = 0; layer < Values::LAYERS; ++layer) {
      __m512i decoded[VECTORS];
      values.template decode<VECTORS>(layer, channel, pairs.offsets[pair], decoded);
      for (int i = 0; i < ROWS; ++i) {
        const __m512i weight = _mm512_set1_epi32(int(pairs.weights[pair][row + i]));
        for (int j = 0; j < VECTORS; ++j)
          own[i][j] = _mm512_dpbf16_ps(own[i][j], (__m512bh)weight, (__m512bh)decoded[j]);
      }
    }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(sums + (row + i) * width + channel + 16 * j, own[i][j]);
}

template <int VECTORS, int N, class Values>
inline void add_rows(const Values& values, const Pairs<N>& pairs, int channel, int rows, float* sums, int width) {
  for (int row = 0; row < rows;) {
    const int left = rows - row;
    const auto add = [&](auto constant) {
      add_pairs<constant, VECTORS>(values, pairs, channel, row, sums, width);
      row += constant;
    };
    // Seven rows of four vectors are what fits into registers, and eight of two.
    if (left >= 8 && VECTORS == 2) add(std::integral_constant<int, 8>());
    else if (left == 7 || left > 8) add(std::integral_constant<int, 7>());
    else if (left >= 4) add(std::integral_constant<int, 4>());
    else add(std::integral_constant<int, 1>());
  }
}

// Values of `count` entries, weighed, are added to sums [rows, width]; width is a multiple of 32.
template <int N, class Values>
inline void add_dots(const Values& values, const Row<N>* own, int count, const uint16_t* scales, int rows, float* sums,
                     int width) {
  Pairs<N> pairs;
  for (int first = 0; first < count; first += 2 * PAIRS) {
    pair_up<N>(own, first, count, scales, values.bytes[0], pairs);
    constexpr int SIXTEENS = Values::VECTORS;
    int channel = 0;
    for (; channel + 16 * SIXTEENS <= width; channel += 16 * SIXTEENS)
      add_rows<SIXTEENS>(values, pairs, channel, rows, sums, width);
    if (channel < width) add_rows<2>(values, pairs, channel, rows, sums, width);
  }
}
#endif

// The values of a unit, as far as they are decoded so and not by what falls on their bytes.
template <int N>
class Dots {
  const Call& call;
  const int width;
  const bool able;
  int kv_head = -1;          // its codebooks are rounded
  uint16_t* books[2] = {};   // bf16 [parts, 256, 8], where one is used
  float *sums, *rotated, *codes;  // [N, width]

 public:
  Dots(const Call& call, bool rounds)
      : call(call), width(int(call.value_dim)), able(rounds && call.value_dim % 32 == 0) {}

  bool can([[maybe_unused]] const Side& side) const {
#ifdef PLPHP_DOTS
    return able && side.kind != TOKEN && !(side.books && side.book[0] == 2);
#else
    return false;
#endif
  }

  template <class Take>
  void lay_out(Take take) {
    take(sums, N * width);
    take(rotated, N * width);
    take(codes, N * width);
    for (int book = 0; book < 2; ++book)
      for (int i = 0; i < call.tier_count; ++i) {
        const Side& side = call.tiers[i].values;
        const bool used = can(side) && std::count(side.book, side.book + side.books, book);
        if (used && !books[book]) take(books[book], width * CENTROIDS);
      }
  }

  void begin([[maybe_unused]] int head) {
    std::memset(sums, 0, N * width * sizeof(float));
    std::memset(rotated, 0, N * width * sizeof(float));
#ifdef PLPHP_DOTS
    if (kv_head == int(call.kv_head(head))) return;
    kv_head = int(call.kv_head(head));
    for (int book = 0; book < 2; ++book) {
      if (!books[book]) continue;
      const uint16_t* own = call.value_books[book] + int64_t(kv_head) * CENTROIDS * width;
      for (int64_t i = 0; i < int64_t(CENTROIDS) * width; i += BYTE)
        *(__m128i*)(books[book] + i) = (__m128i)_mm256_cvtneps_pbh((__m256)eight_halves(own + i));
    }
#endif
  }

  // Entries of a tier, weighed.
  void add([[maybe_unused]] const Some& some, [[maybe_unused]] const Row<N>* weights, [[maybe_unused]] int rows) {
#ifdef PLPHP_DOTS
    const Side& side = some.tier.values;
    Bytes bytes[STREAMS];
    for (int i = 0; i < side.books + side.planes; ++i) bytes[i] = Bytes(some, side.streams[i], width / BYTE);
    const auto book = [&](int i) { return books[side.book[i]]; };
    const auto of_books = [&](const auto& values) {
      add_dots<N>(values, weights, some.count, nullptr, rows, sums, width);
    };
    if (side.books == 1) of_books(OfBooks<1>{{book(0)}, {bytes[0]}});
    if (side.books == 2) of_books(OfBooks<2>{{book(0), book(1)}, {bytes[0], bytes[1]}});
    add_planes(bytes + side.books, some, weights, side.scales, rows, rotated);
#endif
  }

  // A group of entries, weighed; steps [2, width] are its lowest numbers and its steps, `total` the sum of the weights.
  void add_group([[maybe_unused]] const Some& some, [[maybe_unused]] const Row<N>* weights, [[maybe_unused]] int rows,
                 [[maybe_unused]] const Row<N>& total, [[maybe_unused]] const float* steps) {
#ifdef PLPHP_DOTS
    const Side& side = some.tier.values;
    Bytes bytes[STREAMS];
    for (int i = 0; i < side.planes; ++i) bytes[i] = Bytes(some, side.streams[i], width / BYTE);
    std::memset(codes, 0, rows * width * sizeof(float));
    add_planes(bytes, some, weights, nullptr, rows, codes);
    const float middle = float(1 << (side.planes - 1)) - 0.5f;
    for (int lane = 0; lane < rows; ++lane) {
      float *to = sums + lane * width, *own = codes + lane * width, all = total[lane];
      for (int i = 0; i < width; ++i) to[i] += (own[i] + middle * all) * steps[width + i] + all * steps[i];
    }
#endif
  }

  // What has been added up, [width]: what is rotated, or the rest.
  void put(bool of_rotated, int rows, Row<N>* out) const {
    for (int lane = 0; lane < rows; ++lane)
      for (int i = 0; i < width; ++i) out[i][lane] += (of_rotated ? rotated : sums)[lane * width + i];
  }

#ifdef PLPHP_DOTS
 private:
  void add_planes(const Bytes* planes, const Some& some, const Row<N>* weights, const uint16_t* scales, int rows,
                  float* to) const {
    const auto add = [&](const auto& values) { add_dots<N>(values, weights, some.count, scales, rows, to, width); };
    switch (some.tier.values.planes) {
      case 1: return add(OfPlanes<1>(planes));
      case 2: return add(OfPlanes<2>(planes));
      case 3: return add(OfPlanes<3>(planes));
      case 4: return add(OfPlanes<4>(planes));
    }
  }
#endif
};

}  // namespace
