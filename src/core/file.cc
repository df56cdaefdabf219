// SPDX-License-Identifier: Apache-2.0
#include "file.h"
#include "planted.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace damo {

namespace {

// One system call moves at most this much: big enough to cost nothing, small enough to hold on the heap.
constexpr size_t kChunkBytes = 1 << 20;

template <class Call>
auto retry(Call call) {
  for (;;) {
    auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

// The directory an entry's name lives in; "" (a bare file name) is the working directory.
std::filesystem::path parent_of(const std::filesystem::path& path) {
  std::filesystem::path parent = path.has_filename() ? path.parent_path() : path.parent_path().parent_path();
  return parent.empty() ? std::filesystem::path(".") : parent;
}

void copy_and_sync(const std::filesystem::path& from, const std::filesystem::path& to) {
  const FileDescriptor in("copy", from, O_RDONLY);
  FileDescriptor out("copy", to, O_WRONLY | O_CREAT | O_EXCL);
  try {
    std::vector<std::byte> buffer(kChunkBytes);
    for (uint64_t offset = 0;;) {
      const size_t got = in.read_at(buffer, offset);
      if (got == 0) break;
      out.write(Bytes(buffer.data(), got));
      offset += got;
    }
    out.sync();
    out.close();
  } catch (...) {
    ::unlink(to.c_str());
    throw;
  }
}

}  // namespace

void throw_system_error(std::string_view operation, const std::filesystem::path& path, int error) {
  // std::generic_category().message and not strerror: the latter may share its buffer between threads.
  const std::string message =
      "[" + std::string(operation) + "] " + path.string() + ": " + std::generic_category().message(error);
  if (error == ENOENT || error == ENOTDIR) throw MissingFileError(message);
  if (error == ENOSPC || error == EDQUOT) throw DiskFullError(message);
  throw StorageError(message);
}

// ---------------------------------------------------------- FileDescriptor

FileDescriptor::FileDescriptor(std::string_view operation, const std::filesystem::path& path, int flags, unsigned mode)
    : path_(path) {
  fd_ = retry([&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); });
  if (fd_ < 0) throw_system_error(operation, path);
}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
  }
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

uint64_t FileDescriptor::bytes() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) throw_system_error("stat", path_);
  return static_cast<uint64_t>(info.st_size);
}

void FileDescriptor::write(Bytes data) const {
  while (!data.empty()) {
    const ssize_t wrote = retry([&] { return ::write(fd_, data.data(), data.size()); });
    if (wrote < 0) throw_system_error("write", path_);
    data = data.subspan(static_cast<size_t>(wrote));
  }
}

void FileDescriptor::write_at(Bytes data, uint64_t offset) const {
  while (!data.empty()) {
    const ssize_t wrote = retry([&] { return ::pwrite(fd_, data.data(), data.size(), static_cast<off_t>(offset)); });
    if (wrote < 0) throw_system_error("write", path_);
    data = data.subspan(static_cast<size_t>(wrote));
    offset += static_cast<uint64_t>(wrote);
  }
}

size_t FileDescriptor::read_at(std::span<std::byte> data, uint64_t offset) const {
  size_t done = 0;
  while (done < data.size()) {
    const ssize_t got =
        retry([&] { return ::pread(fd_, data.data() + done, data.size() - done, static_cast<off_t>(offset + done)); });
    if (got < 0) throw_system_error("read", path_);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

void FileDescriptor::sync() const {
  if (retry([&] { return ::fsync(fd_); }) != 0) throw_system_error("sync", path_);
}

void FileDescriptor::write_again(uint64_t begin, uint64_t end) const {
  if (begin >= end) return;
  std::vector<std::byte> buffer(std::min<uint64_t>(1 << 20, end - begin));
  for (uint64_t offset = begin; offset < end;) {
    const std::span piece(buffer.data(), std::min<uint64_t>(buffer.size(), end - offset));
    if (read_at(piece, offset) != piece.size())
      throw StorageError("[write] " + path_.string() + " became shorter while it was read");
    write_at(piece, offset);
    offset += piece.size();
  }
}

void FileDescriptor::sync_data() const {
  if (retry([&] { return ::fdatasync(fd_); }) != 0) throw_system_error("sync", path_);
}

void FileDescriptor::truncate(uint64_t bytes) const {
  if (retry([&] { return ::ftruncate(fd_, static_cast<off_t>(bytes)); }) != 0) throw_system_error("truncate", path_);
}

void FileDescriptor::rename_to(const std::filesystem::path& to) {
  if (::rename(path_.c_str(), to.c_str()) != 0) throw_system_error("rename", to);
  path_ = to;
}

void FileDescriptor::close() {
  if (fd_ < 0) return;
  // Never repeated: on Linux the descriptor is gone even when close was interrupted.
  if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) throw_system_error("close", path_);
}

// ------------------------------------------------------------ whole files

void fsync_file(const std::filesystem::path& path) { FileDescriptor("sync", path, O_RDONLY).sync(); }

void sync_name(const std::filesystem::path& path) {
  const std::filesystem::path above = parent_of(std::filesystem::canonical(path));
  struct stat own {
  }, parent{};
  if (::stat(path.c_str(), &own) != 0) throw_system_error("sync", path);
  if (::stat(above.c_str(), &parent) != 0 || own.st_dev != parent.st_dev) return;
  if (::faccessat(AT_FDCWD, above.c_str(), R_OK, AT_EACCESS) == 0) fsync_directory(above);
}

void fsync_directory(const std::filesystem::path& path) { FileDescriptor("sync", path, O_RDONLY | O_DIRECTORY).sync(); }

std::vector<std::filesystem::path> list_directory(std::string_view operation, const std::filesystem::path& path) {
  const int fd = retry([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd < 0) throw_system_error(operation, path);
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::fdopendir(fd), ::closedir);
  if (directory == nullptr) {
    const int error = errno;
    ::close(fd);
    throw_system_error(operation, path, error);
  }
  std::vector<std::filesystem::path> found;
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(directory.get());
    if (entry == nullptr && errno != 0) throw_system_error(operation, path);
    if (entry == nullptr) return found;
    const std::string_view name = entry->d_name;
    if (name != "." && name != "..") found.push_back(path / name);
  }
}

void remove_tree(std::string_view operation, const std::filesystem::path& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return;
    throw_system_error(operation, path);
  }
  if (S_ISDIR(info.st_mode))
    for (const std::filesystem::path& entry : list_directory(operation, path)) remove_tree(operation, entry);
  const int result = S_ISDIR(info.st_mode) ? ::rmdir(path.c_str()) : ::unlink(path.c_str());
  if (result != 0 && errno != ENOENT) throw_system_error(operation, path);
}

void try_to_remove_tree(const std::filesystem::path& path) noexcept {
  try {
    remove_tree("remove", path);
  } catch (const std::exception&) {
  }
}

void make_directory(const std::filesystem::path& path) {
  if (::mkdir(path.c_str(), 0755) != 0) throw_system_error("create directory", path);
  fsync_directory(parent_of(path));
}

void write_file_atomically(const std::filesystem::path& path, Bytes bytes) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  FileDescriptor file("write", temporary, O_WRONLY | O_CREAT | O_TRUNC);
  try {
    file.write(bytes);
    if (!planted("renamed before it is synced")) file.sync();
    file.close();
    if (::rename(temporary.c_str(), path.c_str()) != 0) throw_system_error("rename", path);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  if (!planted("rename not synced")) fsync_directory(parent_of(path));
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text.data(), text.size())));
}

std::string read_file(const std::filesystem::path& path, size_t limit) {
  const FileDescriptor file("read", path, O_RDONLY);
  const uint64_t size = file.bytes();
  const auto too_long = [&](uint64_t bytes) {
    throw CorruptionError("[read] " + path.string() + " has " + std::to_string(bytes) + " bytes, at most " +
                          std::to_string(limit) + " were expected: damaged at offset " + std::to_string(limit));
  };
  if (size > limit) too_long(size);
  limit = std::min(limit, SIZE_MAX - 1);
  // One byte more than the length it told us, so that a file that grows meanwhile, or one of /proc (length 0), is
  // read whole.
  std::string text;
  for (size_t room = static_cast<size_t>(size) + 1;; room = kChunkBytes) {
    const size_t before = text.size();
    room = std::min(room, limit + 1 - before);
    text.resize(before + room);
    const size_t got = file.read_at(std::as_writable_bytes(std::span(text.data() + before, room)), before);
    text.resize(before + got);
    if (text.size() > limit) too_long(text.size());
    if (got < room) return text;
  }
}

bool link_or_copy(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::link(from.c_str(), to.c_str()) == 0) return true;
  switch (errno) {
    case EXDEV:       // another file system
    case EPERM:       // a file system without hard links
    case EOPNOTSUPP:  // the same, in other words
    case ENOSYS:
    case EMLINK:  // too many names already
      copy_and_sync(from, to);
      return false;
    default:
      throw_system_error("link", from.string() + " -> " + to.string());
  }
}

// ------------------------------------------------------------------ CRC-32C

namespace {

// Slicing by 8: kTables[k][b] is the remainder of byte b followed by k zero bytes.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  }
  return tables;
}();

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(Bytes bytes, uint32_t crc) noexcept {
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  uint64_t state = static_cast<uint32_t>(~crc);
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    state = _mm_crc32_u64(state, word);
  }
  auto narrow = static_cast<uint32_t>(state);
  for (; left > 0; ++at, --left) narrow = _mm_crc32_u8(narrow, std::to_integer<uint8_t>(*at));
  return ~narrow;
}
#endif

}  // namespace

uint32_t detail::crc32c_portable(Bytes bytes, uint32_t crc) noexcept {
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  uint32_t state = ~crc;
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    word ^= state;
    state = 0;
    for (size_t k = 0; k < 8; ++k) state ^= kTables[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; left > 0; ++at, --left) state = (state >> 8) ^ kTables[0][(state ^ std::to_integer<uint32_t>(*at)) & 0xff];
  return ~state;
}

uint32_t crc32c(Bytes bytes, uint32_t crc) noexcept {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) return crc32c_sse42(bytes, crc);
#endif
  return detail::crc32c_portable(bytes, crc);
}

uint32_t crc32c_of_file(const std::filesystem::path& path) {
  const FileDescriptor file("read", path, O_RDONLY);
  std::vector<std::byte> buffer(kChunkBytes);
  uint32_t crc = 0;
  for (uint64_t offset = 0;;) {
    const size_t got = file.read_at(buffer, offset);
    if (got == 0) return crc;
    crc = crc32c(Bytes(buffer.data(), got), crc);
    offset += got;
  }
}

}  // namespace damo
