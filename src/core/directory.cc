// SPDX-License-Identifier: Apache-2.0
#include "directory.h"
#include "planted.h"

#include <cinttypes>
#include <cstdio>

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "generation-";

std::string checksum_text(std::string_view name) {
  char text[20];
  std::snprintf(text, sizeof text, "%016" PRIx64, checksum64(std::as_bytes(std::span(name))));
  return text;
}

std::string generation_name(uint64_t number) {
  char text[40];
  std::snprintf(text, sizeof text, "generation-%06" PRIu64, number);
  return text;
}

uint64_t generation_number(const std::string& name) {
  uint64_t number = 0;
  for (const char c : name.substr(kPrefix.size())) {
    if (c < '0' || c > '9') return 0;
    number = number * 10 + static_cast<uint64_t>(c - '0');
  }
  return number;
}

// Whether a storage's directory has, or may have, an entry of this name that is its own.
bool is_name_of_storage(const std::string& name) {
  return name == "LOCK" || name == "CURRENT" || name == "CURRENT.tmp" || name == "CREATING" || name == "CREATING.tmp" ||
         name.starts_with(kPrefix);
}

}  // namespace

void check_is_not_of_storage(const char* operation, const fs::path& wanted, const fs::path& storage,
                             bool nothing_in_it) {
  const fs::path place = fs::canonical(wanted.parent_path()) / wanted.filename(), own = fs::canonical(storage);
  const auto [end, name] = std::mismatch(own.begin(), own.end(), place.begin(), place.end());
  if (end == own.end() && name != place.end() && (nothing_in_it || is_name_of_storage(*name)))
    throw StorageError(std::string("[") + operation + "] " + wanted.string() +
                       " is among the storage's own files, in " + name->string() + " of " + own.string() +
                       ": give a place outside of it");
}

StorageDirectory::StorageDirectory(const fs::path& path, OpenMode mode) : path_(fs::absolute(path).lexically_normal()) {
  const std::string shown = path_.string();
  std::error_code error;
  const fs::file_status status = fs::status(path_, error);
  const bool must_exist = mode == OpenMode::kOpen || mode == OpenMode::kReadOnly;
  if (!fs::exists(status)) {
    if (error && status.type() != fs::file_type::not_found) throw_system_error("open", path_, error.value());
    if (must_exist)
      throw StorageError("[open] " + shown + " does not exist: create it with Storage.create(path) or Storage(path)");
    if (const fs::path parent = path_.has_filename() ? path_.parent_path() : path_.parent_path().parent_path();
        !fs::is_directory(parent, error))
      throw StorageError("[open] the directory " + parent.string() + " does not exist: make it first");
    make_directory(path_);
  } else if (!fs::is_directory(status)) {
    throw StorageError("[open] " + shown + " is not a directory");
  }

  bool empty = true, has_current = false, creating = false, foreign = false;
  for (const fs::path& path : list_directory("open", path_)) {
    const std::string name = path.filename();
    if (name == "CURRENT") has_current = true;
    if (name == "CREATING") creating = true;
    if (!is_name_of_storage(name)) foreign = true;
    if (name != "LOCK" && name != "CREATING.tmp") empty = false;  // that is how far an interrupted creation may be
  }
  if (!has_current && !creating && !empty) {
    if (fs::exists(path_ / "CHECKPOINT", error)) {
      is_checkpoint_ = mode == OpenMode::kReadOnly;
      if (is_checkpoint_) return;
      throw StorageError("[open] " + shown +
                         " is a checkpoint: restore it into another directory with Storage.restore(checkpoint, path),"
                         " or look at it with Storage(checkpoint, read_only=True)");
    }
    if (foreign)
      throw StorageError("[open] " + shown +
                         " is not a storage: it holds other files and no CURRENT; give an empty or absent directory");
    throw CorruptionError("[open] " + shown +
                          " has lost its file CURRENT: restore a checkpoint into another directory");
  }
  if (!has_current && must_exist)
    throw StorageError("[open] " + shown + " is empty: create the storage with Storage.create(path) or Storage(path)");
  if (has_current && mode == OpenMode::kCreate)
    throw StorageError("[create] " + shown +
                       " is a storage already: open it with Storage.open(path), or give another directory");

  if (mode == OpenMode::kReadOnly) return;
  try {
    lock_.emplace(path_ / "LOCK", FileLock::Words{shown, "Storage", "directory"});
  } catch (const StorageError& refused) {
    throw StorageError(std::string(refused.what()) + ": a storage needs a directory it may write to");
  }
  // Another process may have made it between the look at it and the lock.
  if (!has_current && fs::exists(path_ / "CURRENT")) {
    has_current = true;
    if (mode == OpenMode::kCreate)
      throw StorageError("[create] " + shown +
                         " was made by another process meanwhile: open it with Storage.open(path)");
  }
  is_new_ = !has_current;
  if (!planted("storage whose name is not synced")) sync_name(path_);
  if (is_new_) {
    write_file_atomically(path_ / "CREATING", std::string_view{});
  } else if (creating) {
    fs::remove(path_ / "CREATING");
  }
}

fs::path live_generation(const fs::path& path) {
  const std::string text = read_file(path / "CURRENT", 256);
  const size_t space = text.find(' ');
  const std::string name = text.substr(0, space);
  if (space == std::string::npos || text != name + " " + checksum_text(name) + "\n" || !name.starts_with(kPrefix) ||
      generation_number(name) == 0)
    throw CorruptionError("[open] " + (path / "CURRENT").string() +
                          " is damaged at offset 0: its checksum does not agree");
  const fs::path generation = path / name;
  if (!fs::is_directory(generation))
    throw CorruptionError("[open] " + (path / "CURRENT").string() + " names " + name + ", which does not exist");
  return generation;
}

Manifest manifest_of(const fs::path& generation) {
  const fs::path file = generation / "MANIFEST";
  std::string bytes;
  try {
    bytes = read_file(file, kMaxManifestBytes);
  } catch (const MissingFileError&) {
    throw CorruptionError("[open] " + file.string() + " is missing: restore a checkpoint");
  }
  Manifest manifest = decode_manifest(std::as_bytes(std::span(bytes)), file.string());
  check_settings_are_known(manifest, file.string());
  return manifest;
}

void check_parts(const fs::path& generation) {
  for (const char* part : {"rocksdb", "log"})
    if (!fs::is_directory(generation / part))
      throw CorruptionError("[open] the directory " + (generation / part).string() +
                            " is missing: restore a checkpoint");
}

fs::path StorageDirectory::generation() const { return is_checkpoint_ ? path_ : live_generation(path_); }

void StorageDirectory::replace_generation(const std::function<void(const fs::path&)>& build, const fs::path& working) {
  uint64_t number = 0;
  for (const fs::path& path : list_directory("open", path_)) {
    const std::string name = path.filename();
    if (name.starts_with(kPrefix)) number = std::max(number, generation_number(name));
  }
  const std::string name = generation_name(number + 1);
  const fs::path fresh = path_ / name;
  try {
    make_directory(fresh);
    if (planted("CURRENT before what it names"))
      write_file_atomically(path_ / "CURRENT", name + " " + checksum_text(name) + "\n");
    build(fresh);
    fsync_directory(fresh);
    if (planted("old generations removed before the switch")) remove_generations_but(fresh, working);
    write_file_atomically(path_ / "CURRENT", name + " " + checksum_text(name) + "\n");
  } catch (...) {
    // Unless the switch happened and only its sync failed; also where that cannot be told. The next open will.
    bool may_be_live = true;
    try {
      may_be_live = fs::exists(path_ / "CURRENT") && generation() == fresh;
    } catch (...) {
    }
    if (!may_be_live) try_to_remove_tree(fresh);
    throw;
  }
  if (is_new_) {
    fs::remove(path_ / "CREATING");
    fsync_directory(path_);
    is_new_ = false;
  }
  remove_generations_but(fresh, working);
}

void StorageDirectory::remove_stale_generations() {
  const fs::path live = generation();
  // Who switched to it may have died before that was on the disk, and power loss would undo it. Then the others count.
  fsync_directory(path_);
  remove_generations_but(live, {});
}

// What cannot be removed now goes at the next open.
void StorageDirectory::remove_generations_but(const fs::path& live, const fs::path& working) noexcept {
  try {
    for (const fs::path& path : list_directory("open", path_))
      if (path.filename().string().starts_with(kPrefix) && path != live && path != working) try_to_remove_tree(path);
  } catch (const std::exception&) {
  }
}

}  // namespace damo
