// SPDX-License-Identifier: Apache-2.0
// Bit planes of some entries, and what their bytes look up.
#pragma once
#include <cstdint>

#include "bytes.h"
#include "coded_call.h"
#include "tables.h"

namespace {

// The bytes of some entries in bit planes, from the highest down; see tables.h for PARTS.
template <int N, int PARTS, int COUNT>
struct PlanesOf {
  static constexpr int PLANES = COUNT;
  const Bytes bytes[PLANES];
  const int parts;

  Row<N> looked_up(Row<N>* table, int i) const {
    Row<N> sum = ::looked_up<N, PARTS>(table, bytes[0][i], parts);
    for (int plane = 1; plane < PLANES; ++plane) sum = sum + sum + ::looked_up<N, PARTS>(table, bytes[plane][i], parts);
    return sum;
  }
  void let_fall(Row<N>* weights, int i, Row<N> weight) const {
    for (int plane = PLANES - 1; plane >= 0; --plane, weight += weight)
      ::let_fall<N, PARTS>(weights, bytes[plane][i], parts, weight);
  }
};

// Call work(bit planes of some entries): of all planes, or of the first alone.
template <int N, class Work>
inline void by_planes(const Some& some, const Side& side, bool one, int dim, Work work) {
  const int parts = dim / BYTE;
  const auto plane = [&](int number) { return Bytes(some, side.streams[side.books + number], parts); };
  by_parts(parts, [&](auto constant) {
    switch (one ? 1 : side.planes) {
      case 1: return work(PlanesOf<N, constant, 1>{{plane(0)}, parts});
      case 2: return work(PlanesOf<N, constant, 2>{{plane(0), plane(1)}, parts});
      case 3: return work(PlanesOf<N, constant, 3>{{plane(0), plane(1), plane(2)}, parts});
      default: return work(PlanesOf<N, constant, 4>{{plane(0), plane(1), plane(2), plane(3)}, parts});
    }
  });
}

}  // namespace
