// SPDX-License-Identifier: Apache-2.0
// Where the bytes of some entries of a head lie.
#pragma once
#include <cstdint>

#include "coded_call.h"

namespace {

// Some entries of a head in a tier: those in a list of their places in the head, or `count` from `from` on.
struct Some {
  const Tier& tier;
  int head, count;
  const int32_t* list;
  int64_t from;

  int64_t place(int i) const { return list ? list[i] : from + i; }
  int64_t entry(int i) const { return tier.starts[head] + place(i); }
  // Those from `first` to before `end`.
  Some part(int first, int end) const {
    return {tier, head, end - first, list ? list + first : nullptr, list ? from : from + first};
  }
};

// The bytes of some entries in a stream.
struct Bytes {
  const uint8_t* stream = nullptr;
  const int32_t* list = nullptr;
  int64_t first = 0;
  int parts = 0;

  Bytes() = default;
  Bytes(const Some& some, const uint8_t* stream, int parts)
      : stream(stream), list(some.list), first(some.tier.starts[some.head] + some.from), parts(parts) {}
  int64_t entry(int i) const { return first + (list ? list[i] : i); }
  const uint8_t* of(int64_t entry) const { return stream + entry * parts; }
  const uint8_t* operator[](int i) const { return of(entry(i)); }
};

}  // namespace
