// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "gil.h"
#include "standalone_filter.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace damo::bindings;
using damo::StandaloneFilter;

namespace {

using OutBools = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutEstimates = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void expect_length(const char* operation, size_t length, size_t expected) {
  if (length != expected)
    throw std::invalid_argument(std::string("[") + operation + "] out has " + std::to_string(length) +
                                " places, expected one for each of " + std::to_string(expected) + " keys");
}

}  // namespace

void bind_filters(nb::module_& m) {
  using damo::CountingBloomFilter;
  nb::class_<StandaloneFilter> filter(m, "StandaloneFilter", "A counting Bloom filter, in memory or with a file.");
  filter.attr("MAX_CAPACITY") = CountingBloomFilter::kMaxCapacity;
  filter.attr("MAX_COUNT") = CountingBloomFilter::kMaxCount;
  filter.attr("MIN_FPR") = CountingBloomFilter::kMinFpr;
  filter.attr("MAX_FPR") = CountingBloomFilter::kMaxFpr;
  filter
      .def(
          "__init__",
          [](StandaloneFilter* self, uint64_t capacity, uint32_t count, double fpr, uint64_t halve_every,
             const std::optional<std::string>& path, bool reload) {
            const GilRelease released;
            new (self) StandaloneFilter({capacity, count, fpr, halve_every}, path, reload);
          },
          "capacity"_a, "count"_a, "fpr"_a, "halve_every"_a, "path"_a.none(), "reload"_a)
      .def_prop_ro("memory_bytes", &StandaloneFilter::memory_bytes)
      .def_prop_ro("counters_per_key", &StandaloneFilter::counters_per_key)
      .def_prop_ro("used", &StandaloneFilter::used)
      .def_prop_ro("closed", &StandaloneFilter::closed)
      .def(
          "add",
          [](StandaloneFilter& filter, const AnyKeys& keys, uint32_t num) {
            const auto span = keys_of("add", keys);
            const GilRelease released;
            filter.add(span, num);
          },
          "keys"_a.noconvert(), "num"_a, nb::sig("def add(self, keys: object, num: int) -> None"))
      .def(
          "estimate",
          [](const StandaloneFilter& filter, const AnyKeys& keys, const OutEstimates& out) {
            const auto span = keys_of("estimate", keys);
            expect_length("estimate", out.shape(0), span.size());
            uint8_t* to = out.data();
            const GilRelease released;
            filter.estimate(span, to);
          },
          "keys"_a.noconvert(), "out"_a.noconvert(), nb::sig("def estimate(self, keys: object, out: object) -> None"))
      .def(
          "check",
          [](const StandaloneFilter& filter, const AnyKeys& keys, const OutBools& out) {
            const auto span = keys_of("check", keys);
            expect_length("check", out.shape(0), span.size());
            bool* to = out.data();
            const GilRelease released;
            filter.check(span, to);
          },
          "keys"_a.noconvert(), "out"_a.noconvert(), nb::sig("def check(self, keys: object, out: object) -> None"))
      .def("adds", &StandaloneFilter::adds, nb::call_guard<GilRelease>())
      .def("fill", &StandaloneFilter::fill, nb::call_guard<GilRelease>())
      .def("distinct_keys", &StandaloneFilter::distinct_keys, nb::call_guard<GilRelease>())
      .def("estimated_fpr", &StandaloneFilter::estimated_fpr, nb::call_guard<GilRelease>())
      .def("sync", &StandaloneFilter::sync, nb::call_guard<GilRelease>())
      .def("close", &StandaloneFilter::close, nb::call_guard<GilRelease>());
}
