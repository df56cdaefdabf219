// SPDX-License-Identifier: Apache-2.0
#include "table.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "arrays.h"
#include "gil.h"
#include "schedules.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace damo::bindings;
using damo::Batch;
using damo::Scan;
using damo::Table;

namespace {

using OutBools = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutKeys = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutCounts = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutEstimates = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutTimes = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::shared_ptr<Batch> forward(Table& table, const AnyKeys& keys, const OutRows& out, bool insert, bool zeros,
                               nb::object padding) {
  const auto span = keys_of("lookup", keys);
  const auto pad = key_bits(padding);
  check_rows("lookup", "out", out.shape(0), out.shape(1), span.size(), table.spec().dimension, table.spec().label());
  float* to = out.data();
  std::shared_ptr<Batch> batch;
  {
    const GilRelease released;
    batch = table.lookup(span, to, insert, zeros, pad);
  }
  return insert ? batch : nullptr;
}

}  // namespace

// Also used by storage.cpp, for calls over many tables.
std::vector<Table::Part> parts_of(const Table& table, const nb::list& items) {
  std::vector<Table::Part> parts;
  for (const nb::handle item : items) {
    const auto pair = nb::cast<nb::tuple>(item);
    const auto* batch = nb::cast<const Batch*>(pair[0]);
    const auto gradients = nb::cast<Rows>(pair[1], false);
    check_rows("apply_gradients", "gradients", gradients.shape(0), gradients.shape(1), batch->num_positions(),
               table.spec().dimension, table.spec().label());
    parts.push_back({batch, gradients.data()});
  }
  return parts;
}

// Also used by storage.cpp.
nb::object filter_info_of(const Table::FilterInfo& info) {
  nb::dict out;
  out["memory_bytes"] = info.memory_bytes;
  out["adds"] = info.adds;
  out["keys"] = std::llround(info.distinct_keys);
  out["fill"] = info.fill;
  out["refused"] = info.refused;
  out["ignored_gradients"] = info.ignored;
  return out;
}

void bind_table(nb::module_& m) {
  nb::class_<Batch>(m, "Batch", "The distinct keys of a batch, mostly of a training lookup, for the backward pass.")
      .def(
          "__init__",
          [](Batch* batch, const AnyKeys& keys) { new (batch) Batch(keys_of("Batch", keys), std::nullopt); },
          "keys"_a.noconvert(), nb::sig("def __init__(self, keys: object) -> None"), "Of keys that nobody looked up.")
      .def_prop_ro("num_positions", &Batch::num_positions)
      .def_prop_ro("num_rows", &Batch::num_rows);

  nb::class_<Scan>(m, "Scan", "Rows of one cut.")
      .def_prop_ro("num_floats", &Scan::num_floats)
      .def(
          "next",
          [](Scan& scan, const OutKeys& keys, const OutRows& floats, const OutCounts& counts, const OutTimes& times) {
            const size_t limit = keys.shape(0);
            if (floats.shape(0) != limit || floats.shape(1) != scan.num_floats() || counts.shape(0) != limit ||
                times.shape(0) != limit)
              throw std::invalid_argument("[scan] the arrays' lengths differ");
            const GilRelease released;
            return scan.next(limit, keys.data(), floats.data(), counts.data(), times.data());
          },
          "keys"_a.noconvert(), "floats"_a.noconvert(), "update_counts"_a.noconvert(), "times"_a.noconvert(),
          "Fills the arrays with the next rows; returns how many.");

  nb::class_<damo::RowInfo>(m, "RowInfo", "One row, looked at.")
      .def_ro("key", &damo::RowInfo::key)
      .def_ro("update_count", &damo::RowInfo::update_count)
      .def_ro("step", &damo::RowInfo::step)
      .def_ro("time", &damo::RowInfo::time)
      .def_ro("sequence", &damo::RowInfo::sequence)
      .def_ro("in_memory", &damo::RowInfo::in_memory)
      .def_ro("floats", &damo::RowInfo::floats);

  nb::class_<Table>(m, "Table", "One group's rows.")
      .def_prop_ro("group", [](const Table& table) { return table.spec().group; })
      .def_prop_ro("table_id", [](const Table& table) { return table.spec().table_id; })
      .def_prop_ro("name", [](const Table& table) { return table.spec().name; })
      .def_prop_ro("dimension", [](const Table& table) { return table.spec().dimension; })
      .def_prop_ro("seed", [](const Table& table) { return table.spec().seed; })
      .def_prop_ro("step", &Table::step)
      .def_prop_ro("num_floats", &Table::num_floats)
      .def_prop_ro("ttl",
                   [](const Table& table) {
                     return std::pair(static_cast<uint32_t>(table.spec().lifetime.unit), table.spec().lifetime.ttl);
                   })
      .def_prop_ro(
          "filter_settings",
          [](const Table& table) -> nb::object {
            const auto filter = table.filter_settings();
            if (!filter) return nb::none();
            return nb::make_tuple(filter->capacity, filter->count, filter->fpr, filter->halve_every);
          },
          nb::sig("def filter_settings(self) -> tuple[int, int, float, int] | None"))
      .def(
          "filter_info",
          [](const Table& table) {
            Table::FilterInfo info;
            {
              const GilRelease released;
              info = table.filter_info();
            }
            return filter_info_of(info);
          },
          nb::sig("def filter_info(self) -> dict[str, typing.Any]"))
      .def("filter_estimated_fpr", &Table::filter_estimated_fpr, nb::call_guard<GilRelease>())
      .def(
          "filter_estimate",
          [](const Table& table, const AnyKeys& keys, const OutEstimates& out) {
            const auto span = keys_of("estimate", keys);
            if (out.shape(0) != span.size()) throw std::invalid_argument("[estimate] out has another length than keys");
            uint8_t* to = out.data();
            const GilRelease released;
            table.filter_estimate(span, to);
          },
          "keys"_a.noconvert(), "out"_a.noconvert(),
          nb::sig("def filter_estimate(self, keys: object, out: object) -> None"))
      .def(
          "filter_check",
          [](const Table& table, const AnyKeys& keys, const OutBools& out) {
            const auto span = keys_of("check", keys);
            if (out.shape(0) != span.size()) throw std::invalid_argument("[check] out has another length than keys");
            bool* to = out.data();
            const GilRelease released;
            table.filter_check(span, to);
          },
          "keys"_a.noconvert(), "out"_a.noconvert(),
          nb::sig("def filter_check(self, keys: object, out: object) -> None"))
      .def_prop_ro("lr", &Table::lr)
      .def(
          "set_rate", [](Table& table, const Rate& rate) { table.set_lr(rate.schedule); }, "rate"_a,
          "From the next update on. Whoever calls it keeps the rate.")
      .def("__len__", &Table::size, nb::call_guard<GilRelease>())
      .def("forward", &forward, "keys"_a.noconvert(), "out"_a.noconvert(), "insert"_a, "zeros"_a,
           "padding"_a.none() = nb::none(),
           nb::sig("def forward(self, keys: object, out: object, insert: bool, zeros: bool, padding: int | None = "
                   "None) -> Batch | None"),
           "Fills out [n, dimension] for keys [n]; a training lookup returns its batch.")
      .def(
          "backward",
          [](Table& table, const nb::list& items, std::optional<double> lr) {
            const std::vector<Table::Part> parts = parts_of(table, items);
            const GilRelease released;
            table.apply_gradients(parts, lr);
          },
          "items"_a, "lr"_a.none() = nb::none(),
          nb::sig("def backward(self, items: list[tuple[Batch, object]], lr: float | None = None) -> None"),
          "One optimizer step with the gradients [n, dimension] of all items, summed per key.")
      .def(
          "merge",
          [](const Table& table, const nb::list& items) {
            const std::vector<Table::Part> parts = parts_of(table, items);
            std::pair<std::shared_ptr<Batch>, std::unique_ptr<float[]>> merged;
            {
              const GilRelease released;
              merged = table.merge(parts);
            }
            float* sums = merged.second.release();
            const nb::capsule owner(sums, [](void* data) noexcept { delete[] static_cast<float*>(data); });
            const size_t shape[] = {merged.first->num_rows(), table.spec().dimension};
            return nb::make_tuple(merged.first, nb::ndarray<nb::numpy, float>(sums, 2, shape, owner));
          },
          "items"_a, nb::sig("def merge(self, items: list[tuple[Batch, object]]) -> tuple[Batch, numpy.ndarray]"),
          "The same gradients with each key once: a batch with one position a key, and float32 [keys, dimension].")
      .def(
          "apply_gradients",
          [](Table& table, const AnyKeys& keys, const Rows& gradients, std::optional<double> lr) {
            const auto span = keys_of("apply_gradients", keys);
            check_rows("apply_gradients", "gradients", gradients.shape(0), gradients.shape(1), span.size(),
                       table.spec().dimension, table.spec().label());
            const float* from = gradients.data();
            const GilRelease released;
            table.apply_gradients(span, from, lr);
          },
          "keys"_a.noconvert(), "gradients"_a.noconvert(), "lr"_a.none() = nb::none(),
          nb::sig("def apply_gradients(self, keys: object, gradients: object, lr: float | None = None) -> None"))
      .def(
          "erase",
          [](Table& table, const AnyKeys& keys) {
            const auto span = keys_of("erase", keys);
            const GilRelease released;
            return table.erase(span);
          },
          "keys"_a.noconvert(), nb::sig("def erase(self, keys: object) -> int"))
      .def(
          "import_rows",
          [](Table& table, const AnyKeys& keys, const Counts& update_counts, const Rows& floats) {
            const auto span = keys_of("import_rows", keys);
            if (update_counts.shape(0) != span.size() || floats.shape(0) != span.size() ||
                floats.shape(1) != table.num_floats())
              throw std::invalid_argument("[import_rows] the arrays' shapes do not fit");
            const std::span<const uint32_t> counts(update_counts.data(), span.size());
            const float* from = floats.data();
            const GilRelease released;
            table.import_rows(span, counts, from);
          },
          "keys"_a.noconvert(), "update_counts"_a.noconvert(), "floats"_a.noconvert(),
          nb::sig("def import_rows(self, keys: object, update_counts: object, floats: object) -> None"))
      .def(
          "contains",
          [](const Table& table, const AnyKeys& keys, const OutBools& out) {
            const auto span = keys_of("contains", keys);
            if (out.shape(0) != span.size()) throw std::invalid_argument("[contains] out has another length than keys");
            bool* to = out.data();
            const GilRelease released;
            table.contains(span, to);
          },
          "keys"_a.noconvert(), "out"_a.noconvert(), nb::sig("def contains(self, keys: object, out: object) -> None"))
      .def(
          "prefetch",
          [](Table& table, const AnyKeys& keys) {
            const auto span = keys_of("prefetch", keys);
            const GilRelease released;
            table.prefetch(span);
          },
          "keys"_a.noconvert(), nb::sig("def prefetch(self, keys: object) -> None"))
      .def(
          "inspect",
          [](const Table& table, nb::int_ key) {
            const uint64_t bits = *key_bits(key);
            const GilRelease released;
            return table.inspect(bits);
          },
          "key"_a)
      .def("scan", &Table::scan, nb::call_guard<GilRelease>(), nb::keep_alive<0, 1>());
}
