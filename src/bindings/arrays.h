// SPDX-License-Identifier: Apache-2.0
//
// Each array type that crosses the boundary, named once. Outputs never convert: a converted copy would be filled and
// thrown away. Keys come as int64 or uint64; the bits count.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace damo::bindings {

namespace nb = nanobind;

using AnyKeys = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline std::span<const uint64_t> keys_of(const char* operation, const AnyKeys& keys) {
  const nb::dlpack::dtype type = keys.dtype();
  const bool integer = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int) ||
                       type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt);
  if (!integer || type.bits != 64 || type.lanes != 1)
    throw nb::type_error((std::string("[") + operation + "] keys must be int64 or uint64").c_str());
  return {static_cast<const uint64_t*>(keys.data()), keys.shape(0)};
}

// The 64 bits of a Python integer, signed or not.
inline std::optional<uint64_t> key_bits(nb::handle value) {
  if (value.is_none()) return std::nullopt;
  const uint64_t bits = PyLong_AsUnsignedLongLongMask(value.ptr());
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return bits;
}

inline void check_rows(const char* operation, const char* what, size_t rows, size_t columns, size_t expected_rows,
                       size_t expected_columns, const std::string& group) {
  if (rows == expected_rows && columns == expected_columns) return;
  throw std::invalid_argument(std::string("[") + operation + "] " + what + " has shape (" + std::to_string(rows) +
                              ", " + std::to_string(columns) + "), expected (" + std::to_string(expected_rows) + ", " +
                              std::to_string(expected_columns) + ") for " + group);
}

}  // namespace damo::bindings
