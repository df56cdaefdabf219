// SPDX-License-Identifier: Apache-2.0
//
// The storage's side of the filters: their memory, and their files from one cut to the next.
#include "admission.h"

#include <algorithm>

#include "error.h"
#include "saved_filters.h"
#include "storage.h"

namespace damo {

namespace fs = std::filesystem;

// ------------------------------------------------------------------- files

Storage::SavedFilters::SavedFilters(Storage& storage, fs::path directory)
    : storage_(storage), directory_(std::move(directory)) {}

Storage::SavedFilters::~SavedFilters() { end(); }

void Storage::SavedFilters::begin(uint64_t sequence) {
  savers_.reserve(kNumGroups);  // adds go to a saver from its construction on
  for (const auto& table : storage_.tables_) {
    if (!table) continue;
    const std::shared_ptr<Admission> admission = table->admission();
    if (!admission || !admission->is_newer_than_file()) continue;
    const SavedFilter saved{storage_.manifest_.storage_id, table->spec().table_id, sequence};
    savers_.push_back(std::make_unique<FilterSaver>(directory_, saved, admission->filter));
  }
}

void Storage::SavedFilters::save() {
  if (savers_.empty()) return;
  for (const auto& saver : savers_) saver->save();
  fsync_directory(directory_);
  end();
}

void Storage::SavedFilters::end() noexcept {
  if (ended_ || savers_.empty()) return;
  const std::lock_guard order(storage_.order_);
  for (const auto& saver : savers_) saver->end();
  ended_ = true;
}

void Storage::SavedFilters::note_in(Manifest& manifest) const {
  for (const auto& saver : savers_)
    for (TableSpec& spec : manifest.tables)
      if (spec.table_id == saver->saved().table_id && spec.admission) spec.admission->saved = saver->saved().sequence;
}

void Storage::load_filters() {
  for (const TableSpec& spec : manifest_.tables)
    if (spec.admission && spec.admission->saved != 0)
      read_saved_filter(generation_, {manifest_.storage_id, spec.table_id, spec.admission->saved},
                        *tables_[spec.group]->admission()->filter);
}

void Storage::adopt_files(const SavedFilters& filters, uint64_t cut) {
  if (filters.empty()) return;
  const std::lock_guard order(order_);
  Manifest wanted = manifest_;
  filters.note_in(wanted);
  wanted.cut = cut;
  save_manifest(std::move(wanted));
  for (const TableSpec& spec : manifest_.tables)
    if (spec.admission) tables_[spec.group]->admission()->saved = spec.admission->saved;
}

void Storage::remove_old_filters() noexcept {
  const auto is_wanted = [&](const std::string& name) {
    return std::any_of(manifest_.tables.begin(), manifest_.tables.end(), [&](const TableSpec& spec) {
      return spec.admission && spec.admission->saved != 0 &&
             name == SavedFilter{manifest_.storage_id, spec.table_id, spec.admission->saved}.name();
    });
  };
  if (point_) return;  // a new recovery point has none of them
  // What cannot be removed now goes at the next open.
  try {
    for (const fs::path& path : list_directory("remove old filters", generation_)) {
      const std::string name = path.filename();
      std::error_code ignored;
      if (is_name_of_saved_filter(name) && !is_wanted(name)) fs::remove(path, ignored);
    }
  } catch (const std::exception&) {
  }
}

// ------------------------------------------------------------------ groups

void Storage::set_admission(Table& table, const std::optional<AdmissionSpec>& spec) {
  table.set_admission(spec);
  for (TableSpec& stored : manifest_.tables)
    if (stored.table_id == table.spec().table_id) stored.admission = spec;
  tiers_->lend(check_filter_memory("embedding", 0));
}

void Storage::drop_filter(Table& table) {
  // Redo of counted keys needs the filter: first a log without any. Nobody counts keys of this group meanwhile.
  const uint64_t cut = cut_log();
  const std::lock_guard cutting(cutting_);
  const std::lock_guard order(order_);
  Manifest wanted = manifest_;
  for (TableSpec& stored : wanted.tables)
    if (stored.table_id == table.spec().table_id) stored.admission.reset();
  wanted.cut = std::max(wanted.cut, cut);
  save_manifest(std::move(wanted));
  set_admission(table, std::nullopt);
  remove_old_filters();
}

}  // namespace damo
