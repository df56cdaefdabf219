// SPDX-License-Identifier: Apache-2.0
//
// The Arrow C data interface: the three structs of
// https://arrow.apache.org/docs/format/CDataInterface.html, whose layout is a
// stable ABI, and owners for them. What speaks it (pyarrow, polars, DuckDB...)
// hands columns over without a copy and without our linking to Arrow.
#pragma once

#include <cstdint>
#include <utility>

extern "C" {

struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  int64_t flags;
  int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  int64_t length;
  int64_t null_count;
  int64_t offset;
  int64_t n_buffers;
  int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

struct ArrowArrayStream {
  int (*get_schema)(ArrowArrayStream*, ArrowSchema*);
  int (*get_next)(ArrowArrayStream*, ArrowArray*);
  const char* (*get_last_error)(ArrowArrayStream*);
  void (*release)(ArrowArrayStream*);
  void* private_data;
};

}  // extern "C"

namespace damo {

// Owns one of the structs: released by its producer's callback, once.
template <class T>
class ArrowOwner {
 public:
  ArrowOwner() = default;
  ArrowOwner(ArrowOwner&& other) noexcept : value(std::exchange(other.value, T{})) {}
  ArrowOwner& operator=(ArrowOwner&&) = delete;
  ~ArrowOwner() {
    if (value.release != nullptr) value.release(&value);
  }

  T value{};
};

}  // namespace damo
