// SPDX-License-Identifier: Apache-2.0
#include "storage.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "checkpoints.h"
#include "gil.h"
#include "rescue.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace damo::bindings;
using damo::Batch;
using damo::Storage;
using damo::Table;

std::vector<Table::Part> parts_of(const Table& table, const nb::list& items);
nb::object filter_info_of(const Table::FilterInfo& info);

namespace {

damo::OpenMode mode_of(const std::string& mode) {
  if (mode == "create") return damo::OpenMode::kCreate;
  if (mode == "open") return damo::OpenMode::kOpen;
  return damo::OpenMode::kOpenOrCreate;
}

std::optional<damo::Lifetime> lifetime_of(const std::optional<std::pair<uint32_t, uint64_t>>& ttl) {
  if (!ttl) return std::nullopt;
  return damo::Lifetime{static_cast<damo::AgeUnit>(ttl->first), ttl->second};
}

// None: as stored; (): no filter; else the settings of one.
damo::WantedAdmission admission_of(const nb::object& given) {
  using Kind = damo::WantedAdmission::Kind;
  if (given.is_none()) return {};
  const auto settings = nb::cast<nb::tuple>(given);
  if (settings.size() == 0) return {Kind::kAll};
  return {Kind::kFilter,
          {nb::cast<uint64_t>(settings[0]), nb::cast<uint32_t>(settings[1]), nb::cast<double>(settings[2]),
           nb::cast<uint64_t>(settings[3])}};
}

std::unique_ptr<Storage> open_storage(const std::string& path, const std::string& mode, uint64_t memory_bytes,
                                      const std::string& durability, uint64_t threads, uint64_t log_bytes,
                                      std::optional<std::pair<uint32_t, uint64_t>> ttl, uint64_t disk_bytes) {
  damo::StorageOptions options;
  options.memory_bytes = memory_bytes;
  options.durability = durability == "durable"  ? damo::Durability::kDurable
                       : durability == "commit" ? damo::Durability::kCommit
                                                : damo::Durability::kLogged;
  options.threads = threads;
  options.log_bytes = log_bytes;
  options.lifetime = lifetime_of(ttl);
  options.disk_bytes = disk_bytes;
  options.read_only = mode == "read_only";
  const GilRelease released;
  return Storage::open(path, options, mode_of(mode));
}

Table& open_table(Storage& storage, std::optional<uint32_t> group, const std::string& name, uint32_t dimension,
                  const std::string& optimizer, const std::map<std::string, double>& optimizer_settings,
                  const std::string& initializer, const std::map<std::string, double>& initializer_settings,
                  uint64_t seed, std::optional<std::pair<uint32_t, uint64_t>> ttl, const nb::object& admission) {
  damo::TableSpec spec;
  spec.group = group.value_or(damo::kNumGroups);
  spec.name = name;
  spec.dimension = dimension;
  spec.optimizer = optimizer;
  spec.optimizer_settings = {optimizer_settings.begin(), optimizer_settings.end()};
  spec.initializer = initializer;
  spec.initializer_settings = {initializer_settings.begin(), initializer_settings.end()};
  spec.seed = seed;
  const damo::WantedAdmission filter = admission_of(admission);
  const GilRelease released;
  return storage.table(std::move(spec), lifetime_of(ttl), filter);
}

nb::list damages_of(const std::vector<damo::Damage>& damages) {
  nb::list out;
  for (const damo::Damage& damage : damages)
    out.append(nb::make_tuple(damage.file, damage.what, damage.group, damage.key, damage.mixed));
  return out;
}

nb::dict stats_of(const Storage& storage) {
  damo::StorageStats stats;
  {
    const GilRelease released;
    stats = storage.stats();
  }
  nb::dict out;
  uint64_t rows = 0;
  nb::list groups;
  for (const auto& group : stats.groups) {
    nb::dict entry;
    entry["group"] = group.group;
    entry["name"] = group.name;
    entry["dimension"] = group.dimension;
    entry["rows"] = group.rows;
    entry["step"] = group.step;
    entry["row_bytes"] = group.row_bytes;
    entry["ttl"] = nb::make_tuple(static_cast<uint32_t>(group.lifetime.unit), group.lifetime.ttl);
    entry["initializer"] = group.initializer;
    nb::dict settings;
    for (const auto& [name, value] : group.initializer_settings) settings[name.c_str()] = value;
    entry["initializer_settings"] = settings;
    entry["seed"] = group.seed;
    entry["admission"] = group.filter ? filter_info_of(*group.filter) : nb::none();
    groups.append(entry);
    rows += group.rows;
  }
  out["rows"] = rows;
  out["hot_rows"] = stats.tiers.hot_rows;
  out["hot_bytes"] = stats.tiers.hot_bytes;
  out["hot_bytes_in_use"] = stats.tiers.hot_bytes_in_use;
  out["hits"] = stats.tiers.hits;
  out["cold_hits"] = stats.tiers.cold_hits;
  out["created"] = stats.tiers.created;
  out["misses"] = stats.tiers.cold_hits + stats.tiers.created;
  out["evictions"] = stats.tiers.evicted;
  out["written_back"] = stats.tiers.written_back;
  out["write_waits"] = stats.tiers.write_waits;
  out["cuts"] = stats.tiers.cuts;
  out["cut_rows"] = stats.tiers.cut_rows;
  out["cut_displaced"] = stats.tiers.cut_displaced;
  out["cut_pause_seconds"] = stats.tiers.cut_pause_seconds;
  out["disk_bytes"] = stats.store.disk_bytes;
  out["disk_files"] = stats.store.files;
  out["disk_cache_bytes"] = stats.store.cache_bytes;
  out["disk_keys_read"] = stats.store.keys_read;
  out["disk_keys_found"] = stats.store.keys_found;
  out["disk_keys_written"] = stats.store.keys_written;
  out["disk_bytes_written"] = stats.store.bytes_written;
  out["log_bytes"] = stats.log_bytes;
  out["recovery_bytes"] = stats.recovery_bytes;
  out["sequence"] = stats.sequence;
  out["synced_sequence"] = stats.synced_sequence;
  out["redone_records"] = stats.redone_records;
  out["clock_held_seconds"] = stats.clock_held_seconds;
  out["forgotten"] = stats.forgotten;
  out["groups"] = groups;
  return out;
}

}  // namespace

void bind_storage(nb::module_& m) {
  m.attr("MIN_MEMORY_BYTES") = damo::kMinMemoryBytes;
  m.attr("MIN_DISK_PER_MEMORY") = damo::kMinDiskPerMemory;
  m.attr("MAX_DIMENSION") = damo::kMaxDimension;
  m.def(
      "list_checkpoints",
      [](const std::string& directory) {
        damo::CheckpointList list;
        {
          const GilRelease released;
          list = damo::list_checkpoints(directory);
        }
        nb::list complete, damaged;
        for (const damo::CheckpointInfo& info : list.complete)
          complete.append(nb::make_tuple(info.path.string(), info.step, info.sequence, info.created,
                                         nb::bytes(info.storage_id.data(), info.storage_id.size())));
        for (const auto& [path, wrong, newer] : list.damaged)
          damaged.append(nb::make_tuple(path.string(), wrong, newer));
        return nb::make_tuple(complete, damaged);
      },
      "directory"_a,
      nb::sig("def list_checkpoints(directory: str) -> tuple[list[tuple[str, int, int, int, bytes]], list[tuple[str, "
              "str, bool]]]"));
  m.def(
      "verify_checkpoint",
      [](const std::string& checkpoint) {
        damo::CheckpointManifest manifest;
        {
          const GilRelease released;
          manifest = damo::verify_checkpoint(checkpoint);
        }
        return nb::make_tuple(manifest.step, manifest.counters.sequence, manifest.created,
                              nb::bytes(manifest.storage_id.data(), manifest.storage_id.size()));
      },
      "checkpoint"_a, nb::sig("def verify_checkpoint(checkpoint: str) -> tuple[int, int, int, bytes]"));
  m.def(
      "read_checkpoint",
      [](const std::string& checkpoint) {
        const damo::CheckpointManifest manifest = damo::read_checkpoint(checkpoint);
        return nb::make_tuple(manifest.step, manifest.counters.sequence, manifest.created,
                              nb::bytes(manifest.storage_id.data(), manifest.storage_id.size()));
      },
      "checkpoint"_a, nb::sig("def read_checkpoint(checkpoint: str) -> tuple[int, int, int, bytes]"));
  m.def(
      "check_layouts",
      [](const std::string& checkpoint, const std::vector<std::pair<const Table*, nb::object>>& tables,
         uint64_t memory_bytes) {
        std::vector<damo::TableSpec> wanted;
        for (const auto& [table, admission] : tables) {
          wanted.push_back(table->spec());
          const damo::WantedAdmission filter = admission_of(admission);
          wanted.back().admission.reset();
          if (filter.kind == damo::WantedAdmission::Kind::kFilter)
            wanted.back().admission = damo::AdmissionSpec{filter.filter, 0};
        }
        const GilRelease released;
        damo::check_layouts(checkpoint, wanted, memory_bytes);
      },
      "checkpoint"_a, "tables"_a, "memory_bytes"_a,
      nb::sig("def check_layouts(checkpoint: str, tables: collections.abc.Sequence[tuple[Table, tuple[int, int, float, "
              "int] | tuple[()] | None]], memory_bytes: int) -> None"));
  m.def(
      "salvage",
      [](const std::string& path, const std::string& out, const std::string& manifest_of) {
        damo::SalvageReport report;
        {
          const GilRelease released;
          report = Storage::salvage(path, out, manifest_of);
        }
        return nb::make_tuple(report.rows, report.records, damages_of(report.lost));
      },
      "path"_a, "out"_a, "manifest_of"_a,
      nb::sig("def salvage(path: str, out: str, manifest_of: str) -> tuple[int, int, list[tuple[str, str, int | None, "
              "int | None, tuple[int, int] | None]]]"));
  m.def(
      "restore",
      [](const std::string& checkpoint, const std::string& path, uint64_t memory_bytes, const nb::bytearray& done) {
        if (done.size() != 1) throw std::invalid_argument("[restore] done has to have one byte");
        {
          const GilRelease released;
          Storage::restore(checkpoint, path, memory_bytes);
        }
        // Before Python looks for signals: an exception of Ctrl-C comes out of the call though it has done its work.
        static_cast<char*>(const_cast<nb::bytearray&>(done).data())[0] = 1;
      },
      "checkpoint"_a, "path"_a, "memory_bytes"_a, "done"_a);

  nb::class_<Storage>(m, "Storage", "One directory, its groups, its log, its rows.")
      .def_static("open", &open_storage, "path"_a, "mode"_a, "memory_bytes"_a, "durability"_a, "threads"_a,
                  "log_bytes"_a, "ttl"_a.none(), "disk_bytes"_a)
      .def_prop_ro("path", [](const Storage& storage) { return storage.path().string(); })
      .def_prop_ro("closed", &Storage::closed)
      .def_prop_ro("in_place", [](const Storage& storage) { return storage.is_in_place(); })
      .def_prop_ro("read_only", &Storage::read_only)
      .def_prop_ro("tables_made", &Storage::tables_made)
      .def_prop_ro(
          "id",
          [](const Storage& storage) {
            std::array<std::byte, 16> id{};
            {
              const GilRelease released;
              id = storage.id();
            }
            return nb::bytes(id.data(), id.size());
          },
          nb::sig("def id(self) -> bytes"))
      .def("table", &open_table, "group"_a.none(), "name"_a, "dimension"_a, "optimizer"_a, "optimizer_settings"_a,
           "initializer"_a, "initializer_settings"_a, "seed"_a, "ttl"_a.none() = nb::none(),
           "admission"_a.none() = nb::none(), nb::rv_policy::reference_internal,
           nb::sig("def table(self, group: int | None, name: str, dimension: int, optimizer: str, optimizer_settings: "
                   "collections.abc.Mapping[str, float], initializer: str, initializer_settings: "
                   "collections.abc.Mapping[str, float], seed: int, ttl: tuple[int, int] | None = None, admission: "
                   "tuple[()] | tuple[int, int, float, int] | None = None) -> Table"))
      .def(
          "forward_many",
          [](Storage&, const nb::list& items, bool insert, bool zeros) {
            struct Item {
              Table* table;
              std::span<const uint64_t> keys;
              float* out;
              std::optional<uint64_t> padding;
            };
            std::vector<Item> work;
            for (const nb::handle item : items) {
              const auto given = nb::cast<nb::tuple>(item);
              auto* table = nb::cast<Table*>(given[0]);
              const auto keys = nb::cast<AnyKeys>(given[1], false);
              const auto out = nb::cast<OutRows>(given[2], false);
              const auto span = keys_of("lookup", keys);
              check_rows("lookup", "out", out.shape(0), out.shape(1), span.size(), table->spec().dimension,
                         table->spec().label());
              work.push_back({table, span, out.data(), key_bits(given[3])});
            }
            std::vector<std::shared_ptr<Batch>> batches;
            batches.reserve(work.size());  // a lookup that has made its rows may not fail after that
            {
              const GilRelease released;
              for (const Item& item : work)
                batches.push_back(item.table->lookup(item.keys, item.out, insert, zeros, item.padding));
            }
            nb::list out;
            for (auto& batch : batches) out.append(insert ? nb::cast(std::move(batch)) : nb::none());
            return out;
          },
          "items"_a, "insert"_a, "zeros"_a,
          nb::sig("def forward_many(self, items: list[tuple[Table, object, object, int | None]], insert: bool, zeros: "
                  "bool) -> list[Batch | None]"),
          "One call for the lookups of many tables: (table, keys [n], out [n, dimension], padding).")
      .def(
          "backward_many",
          [](Storage&, const nb::list& items) {
            std::vector<Table::Update> work;
            for (const nb::handle item : items) {
              const auto given = nb::cast<nb::tuple>(item);
              auto* table = nb::cast<Table*>(given[0]);
              const auto lr = given[2].is_none() ? std::nullopt : std::optional(nb::cast<double>(given[2]));
              work.push_back({table, parts_of(*table, nb::cast<nb::list>(given[1])), lr});
            }
            const GilRelease released;
            Table::apply_gradients(work);
          },
          "items"_a,
          nb::sig(
              "def backward_many(self, items: list[tuple[Table, list[tuple[Batch, object]], float | None]]) -> None"),
          "One optimizer step of each table, all of them or none.")
      .def(
          "commit",
          [](Storage& storage, int64_t step, const nb::bytes& extra) {
            std::string text(extra.c_str(), extra.size());
            const GilRelease released;
            storage.commit(step, std::move(text));
          },
          "step"_a, "extra"_a)
      .def(
          "last_commit",
          [](const Storage& storage) -> nb::object {
            std::optional<damo::CommitRecord> commit;
            {
              const GilRelease released;
              commit = storage.last_commit();
            }
            if (!commit) return nb::none();
            return nb::make_tuple(commit->step, nb::bytes(commit->extra.data(), commit->extra.size()));
          },
          nb::sig("def last_commit(self) -> tuple[int, bytes] | None"))
      .def(
          "checkpoint",
          [](Storage& storage, const std::string& directory, int64_t step, const nb::bytes& extra, uint64_t keep,
             const nb::object& fill) {
            std::string text(extra.c_str(), extra.size());
            Storage::FillCheckpoint files;
            if (!fill.is_none())
              files = [&](const std::filesystem::path& staged) {
                const nb::gil_scoped_acquire held;
                fill(staged.string());
              };
            const GilRelease released;
            return storage.checkpoint(directory, step, std::move(text), keep, files);
          },
          "directory"_a, "step"_a, "extra"_a, "keep"_a, "fill"_a.none(),
          nb::sig("def checkpoint(self, directory: str, step: int, extra: bytes, keep: int, fill: "
                  "collections.abc.Callable[[str], object] | None) -> list[str]"))
      .def(
          "dump",
          [](Storage& storage, const std::string& path, std::optional<uint32_t> group, uint32_t min_count,
             std::optional<int64_t> updated_since, const nb::object& progress) {
            const auto report = [&](uint64_t done, uint64_t total) {
              const nb::gil_scoped_acquire held;
              // Ctrl-C: Python calls its handlers when the main thread asks.
              if (PyErr_CheckSignals() != 0) throw nb::python_error();
              if (!progress.is_none()) progress(done, total);
            };
            const GilRelease released;
            return storage.dump(path, {group, min_count, updated_since}, report);
          },
          "path"_a, "group"_a.none(), "min_count"_a, "updated_since"_a.none(), "progress"_a.none(),
          nb::sig("def dump(self, path: str, group: int | None, min_count: int, updated_since: int | None, progress: "
                  "collections.abc.Callable[[int, int], object] | None) -> int"))
      .def_prop_rw("now", &Storage::now, &Storage::set_now, nb::for_getter(nb::call_guard<GilRelease>()),
                   nb::for_setter(nb::call_guard<GilRelease>()))
      .def_prop_ro("clock_held_seconds", &Storage::clock_held_seconds)
      .def("expire", &Storage::expire, "now"_a.none(), nb::call_guard<GilRelease>())
      .def("compact", &Storage::compact, nb::call_guard<GilRelease>())
      .def("drop_group", &Storage::drop_group, "group"_a, nb::call_guard<GilRelease>())
      .def(
          "verify",
          [](Storage& storage) {
            damo::VerifyReport report;
            {
              const GilRelease released;
              report = storage.verify();
            }
            return nb::make_tuple(report.rows, report.files, report.bytes, report.records, damages_of(report.damages));
          },
          nb::sig("def verify(self) -> tuple[int, int, int, int, list[tuple[str, str, int | None, int | None, "
                  "tuple[int, int] | None]]]"))
      .def("stats", &stats_of, nb::sig("def stats(self) -> dict[str, typing.Any]"))
      .def("close", &Storage::close, nb::call_guard<GilRelease>());
}
