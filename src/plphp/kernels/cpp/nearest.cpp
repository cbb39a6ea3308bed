// SPDX-License-Identifier: Apache-2.0
// The nearest of 256 centroids to each part of each entry, on a CPU: `nearest` in centroids.py says what,
// _nearest_cpp.py calls it.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace {

constexpr int CENTROIDS = 256, WIDEST_PART = 16;
constexpr int AT_ONCE = 4;  // entries that a centroid is compared with when it is read

// Centroids of a part, channel by channel, and their squared lengths.
struct Part {
  alignas(64) float channels[WIDEST_PART][CENTROIDS];
  alignas(64) float lengths[CENTROIDS];

  void fetch(const float* book, int width) {
    std::fill(lengths, lengths + CENTROIDS, 0.0f);
    for (int number = 0; number < CENTROIDS; ++number)
      for (int i = 0; i < width; ++i) {
        const float x = book[number * width + i];
        channels[i][number] = x;
        lengths[number] += x * x;
      }
  }

  // The nearest to each of AT_ONCE states, |c|^2 - 2 x.c being least; of equal ones the first.
  void search(const float* const (&states)[AT_ONCE], int width, uint8_t* const (&to)[AT_ONCE]) const {
    Floats least[AT_ONCE];
    Words where[AT_ONCE] = {};
    std::fill(least, least + AT_ONCE, all(std::numeric_limits<float>::infinity()));
    for (int at = 0; at < CENTROIDS; at += LANES) {
      Floats distances[AT_ONCE];
      std::fill(distances, distances + AT_ONCE, load(lengths + at));
      for (int i = 0; i < width; ++i) {
        const Floats channel = load(channels[i] + at);
        for (int j = 0; j < AT_ONCE; ++j) distances[j] -= channel * (2 * states[j][i]);
      }
      for (int j = 0; j < AT_ONCE; ++j) {
        const Words nearer = distances[j] < least[j];
        least[j] = nearer ? distances[j] : least[j];
        where[j] = nearer ? Words{} + at : where[j];
      }
    }
    for (int j = 0; j < AT_ONCE; ++j) {
      int best = 0;
      for (int lane = 1; lane < LANES; ++lane) {
        const bool nearer = least[j][lane] < least[j][best];
        const bool first = least[j][lane] == least[j][best] && where[j][lane] + lane < where[j][best] + best;
        if (nearer || first) best = lane;
      }
      *to[j] = uint8_t(where[j][best] + best);
    }
  }
};

}  // namespace

// states [entries, parts * width], book [heads, parts, 256, width], head [entries], numbers [entries, parts].
extern "C" int nearest_float32(const float* states, const float* book, const int64_t* head, uint8_t* numbers,
                               int64_t entries, int64_t heads, int64_t parts, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic)
  for (int64_t task = 0; task < heads * parts; ++task) {
    const int64_t own = task / parts, part = task % parts;
    Part centroids;
    centroids.fetch(book + task * CENTROIDS * width, int(width));
    const float* some[AT_ONCE];
    uint8_t* to[AT_ONCE];
    int count = 0;
    for (int64_t i = 0; i < entries; ++i) {
      if (head[i] != own) continue;
      some[count] = states + (i * parts + part) * width;
      to[count++] = numbers + i * parts + part;
      if (count == AT_ONCE) centroids.search(some, int(width), to), count = 0;
    }
    if (!count) continue;
    for (int j = count; j < AT_ONCE; ++j) some[j] = some[0], to[j] = to[0];  // what is there again
    centroids.search(some, int(width), to);
  }
  return 0;
}
