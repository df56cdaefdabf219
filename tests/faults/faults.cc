// SPDX-License-Identifier: Apache-2.0
//
// A library for LD_PRELOAD that stands between a process and its file system: below one directory it counts calls,
// lets the Nth of a kind fail, kills the process there, and keeps a journal of all that changes files. It sees the core
// and RocksDB alike and needs no hook in either. Memory goes through memory.cc, a library of its own.
// tests/python/reliability/faults.py builds and drives both.
//
//   points   every call that is visited has a kind ("write", "sync", ...) and the class of its file ("log", "sst", ...)
//   journal  creations, writes, truncations, renames, links, removals, syncs (those that failed, too) and marks of the
//            test, in the order in which they happened: reliability/journal.py makes of it what a power loss could have
//            left
//
// A kill here is kill -9 of the process itself, so the page cache keeps what was written. Memory is refused to the
// thread that armed it only, and not inside RocksDB, which has no answer to that.
//
// Thread safety: all of it. One lock is held across each call that changes a file, so the journal's order is the real
// one.
#include <dirent.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

enum Call : int { kOpen, kRead, kWrite, kSync, kRename, kLink, kUnlink, kMkdir, kTruncate, kAllocate, kNumCalls };
constexpr std::array<const char*, kNumCalls> kCallNames{"open", "read",   "write", "sync",     "rename",
                                                        "link", "unlink", "mkdir", "truncate", "allocate"};

// As reliability/faults.py numbers them.
enum Action : int {
  kNothing = 0,
  kKillBefore = 1,  // the call does not happen
  kKillAfter = 2,   // it happens, and is the last
  kFail = 3,        // it says the error, once
  kFailForGood = 4,
  kShort = 5,  // a write takes half of its bytes, once
  kTear = 6,   // a write takes half of its bytes, and is the last call
};

struct OpenFile {
  std::string path;  // below the root
  uint64_t handle;   // in the journal
  bool directory;
};

struct State {
  std::recursive_mutex mutex;  // recursive: memory is allocated under it, and that is a call, too
  std::string root;            // absolute, without a slash at the end; empty: nothing is watched
  std::unordered_map<int, OpenFile> files;
  uint64_t next_handle = 1;

  std::map<std::pair<int, std::string>, uint64_t> counts;
  Action action = kNothing;
  bool paused = false;
  int call = -1;           // -1: any but allocate
  std::string file_class;  // empty: any
  uint64_t nth = 0, visits = 0;
  int error = EIO;
  std::string hit;      // what was visited when it happened
  std::string epitaph;  // a file

  int journal = -1;
  std::string buffer;
};

State& state() {
  static State& state = *new State;  // never destroyed: threads may outlive main
  return state;
}
std::atomic<bool> watching{false};
thread_local bool allocations_count = false;  // this thread armed an allocation
uintptr_t rocksdb_begin = 0, rocksdb_end = 0;

void flush_journal();

// Leaves a note first: who died without one died of something else.
[[noreturn]] void die() {
  State& s = state();
  flush_journal();  // what a power loss would still undo
  const long fd = ::syscall(SYS_openat, AT_FDCWD, s.epitaph.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd >= 0) ::syscall(SYS_write, fd, s.hit.data(), s.hit.size());
  ::syscall(SYS_kill, ::getpid(), SIGKILL);
  for (;;) ::pause();
}

// ------------------------------------------------------------------- paths

std::string normal(std::string_view path) {
  std::string out;
  for (const char c : path)
    if (c != '/' || out.empty() || out.back() != '/') out += c;
  while (out.size() > 1 && out.back() == '/') out.pop_back();
  return out;
}

// Below the root: the rest of the path ("." for the root itself). Else empty.
std::string inside(int directory, const char* path) {
  State& s = state();
  std::string whole;
  if (path[0] == '/') {
    whole = normal(path);
  } else {
    if (directory == AT_FDCWD) return {};
    const auto found = s.files.find(directory);
    if (found == s.files.end()) return {};
    whole = normal(s.root + "/" + found->second.path + "/" + path);
  }
  if (whole == s.root) return ".";
  if (whole.size() <= s.root.size() || !whole.starts_with(s.root) || whole[s.root.size()] != '/') return {};
  whole = whole.substr(s.root.size() + 1);
  while (whole.starts_with("./")) whole = whole.substr(2);
  return whole;
}

bool ends_with_number_after(std::string_view name, std::string_view prefix) {
  return name.starts_with(prefix) &&
         name.substr(prefix.size()).find_first_not_of("0123456789-.") == std::string_view::npos;
}

// What a file is for, whatever its number.
std::string class_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  std::string name = path.substr(slash == std::string::npos ? 0 : slash + 1);
  const std::string above = slash == std::string::npos ? "" : path.substr(0, slash);
  std::string tail;
  if (name.ends_with(".tmp") && name != "ingest.tmp") {
    tail = ".tmp";
    name.resize(name.size() - 4);
  }
  const bool cold = above.ends_with("rocksdb");
  if (above.ends_with("/log") && name.ends_with(".log")) return "log" + tail;
  if (above.ends_with("ingest.tmp")) return "ingest.sst";
  if (name.ends_with(".sst")) return "sst";
  if (cold && ends_with_number_after(name, "MANIFEST-")) return "rocksdb-manifest";
  if (cold && ends_with_number_after(name, "OPTIONS-")) return "rocksdb-options" + tail;
  if (cold && (name == "CURRENT" || name == "LOCK" || name == "IDENTITY" || name == "LOG"))
    return "rocksdb-" + name + tail;
  if (cold && name.ends_with(".dbtmp")) return "rocksdb-CURRENT.tmp";
  if (cold && name.ends_with(".log")) return "rocksdb-wal";
  if (name.starts_with("generation-")) return "generation";
  if (ends_with_number_after(name, "filter-")) return "filter" + tail;
  if (name.find(".building-") != std::string::npos) return above.ends_with("dumps") ? "dump.tmp" : "checkpoint.tmp";
  if (above.ends_with("dumps")) return "dump";
  if (above.ends_with("checkpoints")) return "checkpoint";
  return name + tail;  // CURRENT, MANIFEST, COMMITTED, presence, LOCK, CREATING, CHECKPOINT, log, rocksdb, ...
}

// ----------------------------------------------------------------- journal

void flush_journal() {
  State& s = state();
  size_t at = 0;
  while (at < s.buffer.size()) {
    const ssize_t wrote = ::syscall(SYS_write, s.journal, s.buffer.data() + at, s.buffer.size() - at);
    if (wrote <= 0) break;
    at += static_cast<size_t>(wrote);
  }
  s.buffer.clear();
}

// type, then u64 numbers, then a text or bytes, each with its length before it
void note(char type, std::initializer_list<uint64_t> numbers, std::initializer_list<std::string_view> texts) {
  State& s = state();
  if (s.journal < 0) return;
  const auto put = [&](uint64_t number) { s.buffer.append(reinterpret_cast<const char*>(&number), sizeof number); };
  s.buffer += type;
  for (const uint64_t number : numbers) put(number);
  for (const std::string_view text : texts) {
    put(text.size());
    s.buffer.append(text);
  }
  if (s.buffer.size() > (1 << 20)) flush_journal();
}

// ------------------------------------------------------------------ points

struct Verdict {
  int error = 0;
  bool half = false;        // of the bytes
  bool kill_after = false;  // once it happened
};

// Counts a call, and says what is to become of it. The lock is held.
Verdict visit(Call call, const std::string& path) {
  State& s = state();
  if (s.paused) return {};
  std::string file_class = class_of(path);
  ++s.counts[{call, file_class}];
  if (s.action == kNothing || (s.call >= 0 ? s.call != call : call == kAllocate)) return {};
  if (!s.file_class.empty() && s.file_class != file_class) return {};
  ++s.visits;
  if (s.visits < s.nth || (s.visits > s.nth && s.action != kFailForGood)) return {};
  if (s.hit.empty()) s.hit = std::string(kCallNames[call]) + " " + file_class;
  switch (s.action) {
    case kKillBefore:
      die();
    case kKillAfter:
      return {.kill_after = true};
    case kFail:
    case kFailForGood:
      return {.error = s.error};
    case kShort:
      return {.half = call == kWrite};
    case kTear:
      return {.half = call == kWrite, .kill_after = true};
    case kNothing:
      break;
  }
  return {};
}

long refuse(int error) {
  errno = error;
  return -1;
}

// visit, the call, the journal, and the kill that may follow: the shape of all that change something.
template <class Do, class Note>
long pass(Call call, const std::string& path, Do&& run, Note&& noted) {
  const Verdict verdict = visit(call, path);
  if (verdict.error != 0) return refuse(verdict.error);
  const long result = run(verdict.half);
  const int error = errno;
  if (result >= 0) noted(result);
  if (verdict.kill_after) die();
  errno = error;
  return result;
}

// Of a crash that is nobody's plan.
void show_where(int number) {
  std::array<void*, 64> frames;
  ::backtrace_symbols_fd(frames.data(), ::backtrace(frames.data(), static_cast<int>(frames.size())), STDERR_FILENO);
  ::signal(number, SIG_DFL);
  ::raise(number);
}

// The lock, under which the library's own memory is not refused.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex) : lock_(mutex), counted_(std::exchange(allocations_count, false)) {}
  ~Lock() { allocations_count = counted_; }
  void count_allocations(bool count) { counted_ = count; }  // of this thread, from the end of the lock on
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  bool counted_;
};

int open_at(int directory, const char* path, int flags, mode_t mode) {
  const auto raw = [&] { return static_cast<int>(::syscall(SYS_openat, directory, path, flags, mode)); };
  if (!watching.load(std::memory_order_acquire)) return raw();
  State& s = state();
  const Lock lock(s.mutex);
  const std::string below = inside(directory, path);
  if (below.empty()) {
    const int fd = raw();
    if (fd >= 0) s.files.erase(fd);
    return fd;
  }
  return static_cast<int>(pass(
      kOpen, below, [&](bool) { return raw(); },
      [&](long fd) {
        struct stat info {};
        const bool is_directory = ::fstat(static_cast<int>(fd), &info) == 0 && S_ISDIR(info.st_mode);
        const uint64_t handle = s.next_handle++;
        s.files[static_cast<int>(fd)] = {below, handle, is_directory};
        note('O', {handle, static_cast<uint64_t>(flags)}, {below});
      }));
}

// Runs `change` on a file that is watched, `raw` on any other.
template <class Raw, class Watched>
auto on_file(int fd, Raw raw, Watched watched) -> decltype(raw()) {
  if (!watching.load(std::memory_order_acquire)) return raw();
  State& s = state();
  const Lock lock(s.mutex);
  const auto found = s.files.find(fd);
  return found == s.files.end() ? raw() : static_cast<decltype(raw())>(watched(found->second));
}

ssize_t write_pieces(int fd, const iovec* pieces, int count, off_t offset, bool at_position) {
  const auto raw = [&](const iovec* from, int number) -> ssize_t {
    return at_position ? ::syscall(SYS_writev, fd, from, number) : ::syscall(SYS_pwritev, fd, from, number, offset, 0);
  };
  return on_file(
      fd, [&] { return raw(pieces, count); },
      [&](const OpenFile& file) {
        std::vector<iovec> taken(pieces, pieces + count);
        return pass(
            kWrite, file.path,
            [&](bool half) {
              if (half) {
                size_t left = 0;
                for (const iovec& piece : taken) left += piece.iov_len;
                left = (left + 1) / 2;
                for (iovec& piece : taken) {
                  piece.iov_len = std::min(piece.iov_len, left);
                  left -= piece.iov_len;
                }
              }
              return raw(taken.data(), count);
            },
            [&](long wrote) {
              if (state().journal < 0) return;
              uint64_t at = static_cast<uint64_t>(offset);
              if (at_position) at = static_cast<uint64_t>(::syscall(SYS_lseek, fd, 0, SEEK_CUR) - wrote);
              std::string bytes;
              size_t left = static_cast<size_t>(wrote);
              for (const iovec& piece : taken) {
                const size_t size = std::min(piece.iov_len, left);
                bytes.append(static_cast<const char*>(piece.iov_base), size);
                left -= size;
              }
              note('W', {file.handle, at}, {bytes});
            });
      });
}

int sync_file(int fd, long number) {
  return on_file(
      fd, [&] { return static_cast<int>(::syscall(number, fd)); },
      [&](const OpenFile& file) {
        const long result = pass(
            kSync, file.path, [&](bool) { return ::syscall(number, fd); },
            [&](long) { note(file.directory ? 'Y' : 'S', {file.handle}, {file.path}); });
        if (result < 0 && !file.directory) note('F', {file.handle}, {});
        return result;
      });
}

template <class Do>
long on_path(Call call, int directory, const char* path, Do run, char type) {
  if (!watching.load(std::memory_order_acquire)) return run();
  const Lock lock(state().mutex);
  const std::string below = inside(directory, path);
  if (below.empty()) return run();
  return pass(
      call, below, [&](bool) { return run(); }, [&](long) { note(type, {}, {below}); });
}

template <class Do>
long on_two_paths(Call call, int from_directory, const char* from, int to_directory, const char* to, Do run,
                  char type) {
  if (!watching.load(std::memory_order_acquire)) return run();
  const Lock lock(state().mutex);
  const std::string source = inside(from_directory, from), target = inside(to_directory, to);
  if (target.empty()) return run();
  return pass(
      call, target, [&](bool) { return run(); },
      [&](long) {
        note(type, {}, {source, target});
      });
}

// Whether a read is to fail; errno is set.
bool read_fails(int fd) {
  if (!watching.load(std::memory_order_acquire)) return false;
  State& s = state();
  const Lock lock(s.mutex);
  const auto found = s.files.find(fd);
  if (found == s.files.end() || found->second.directory) return false;
  // RocksDB asserts, in the builds of distributions, that a table can be read which it is handed: no error comes of it.
  if (class_of(found->second.path) == "ingest.sst") return false;
  const Verdict verdict = visit(kRead, found->second.path);
  if (verdict.kill_after) die();
  if (verdict.error != 0) errno = verdict.error;
  return verdict.error != 0;
}

void forget(int fd) {
  if (!watching.load(std::memory_order_acquire)) return;
  State& s = state();
  const Lock lock(s.mutex);
  s.files.erase(fd);
}

template <class Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

// ------------------------------------------------------------------ memory

int note_rocksdb(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_name == nullptr || std::strstr(info->dlpi_name, "librocksdb") == nullptr) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    rocksdb_begin = rocksdb_begin == 0 ? begin : std::min(rocksdb_begin, begin);
    rocksdb_end = std::max(rocksdb_end, begin + info->dlpi_phdr[i].p_memsz);
  }
  return 0;
}

bool inside_rocksdb() {
  std::array<void*, 64> frames;
  const int count = ::backtrace(frames.data(), static_cast<int>(frames.size()));
  for (int i = 0; i < count; ++i) {
    const auto at = reinterpret_cast<uintptr_t>(frames[static_cast<size_t>(i)]);
    if (at >= rocksdb_begin && at < rocksdb_end) return true;
  }
  return false;
}

void* allocate(size_t bytes, size_t alignment) noexcept {
  if (allocations_count) {
    State& s = state();
    const Lock lock(s.mutex);
    if (s.call == kAllocate && s.action != kNothing && !s.paused) {
      const uint64_t visits = s.visits + 1;
      // At the Nth: not inside RocksDB, then at the next one outside.
      if (visits < s.nth || !inside_rocksdb()) {
        s.visits = visits;
        if (visits == s.nth || (visits > s.nth && s.action == kFailForGood)) {
          s.hit = "allocate";
          return nullptr;
        }
      }
    }
  }
  if (bytes == 0) bytes = 1;
  if (alignment <= alignof(std::max_align_t)) return std::malloc(bytes);
  return ::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

}  // namespace

// --------------------------------------------------------------- the driver

extern "C" {

void damo_faults_watch(const char* root) {
  State& s = state();
  ::signal(SIGABRT, show_where);
  ::signal(SIGSEGV, show_where);
  const Lock lock(s.mutex);
  s.root = normal(root);
  s.files.clear();
  watching.store(!s.root.empty(), std::memory_order_release);
}

// From now on, everything that changes below the root goes to this file. Returns 0 or -1.
int damo_faults_journal(const char* path) {
  State& s = state();
  const Lock lock(s.mutex);
  s.journal = static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  return s.journal < 0 ? -1 : 0;
}

// Where a process that is killed at a point says which one it was.
void damo_faults_epitaph(const char* path) {
  const Lock lock(state().mutex);
  state().epitaph = path;
}

void damo_faults_mark(char kind, uint64_t number) {
  const Lock lock(state().mutex);
  note('K', {static_cast<uint64_t>(kind), number}, {});
}

void damo_faults_flush() {
  const Lock lock(state().mutex);
  flush_journal();
}

// `call`: a name of kCallNames, or "" for any. `file_class`: "" for any. -1: there is no such call.
int damo_faults_arm(int action, const char* call, const char* file_class, uint64_t nth, int error) {
  State& s = state();
  std::array<void*, 4> frames;
  ::backtrace(frames.data(), 4);  // its first call allocates
  Lock lock(s.mutex);
  s.call = -1;
  if (call[0] != '\0') {
    for (int i = 0; i < kNumCalls; ++i)
      if (std::strcmp(call, kCallNames[static_cast<size_t>(i)]) == 0) s.call = i;
    if (s.call < 0) return -1;
  }
  rocksdb_begin = rocksdb_end = 0;
  ::dl_iterate_phdr(note_rocksdb, nullptr);
  s.file_class = file_class;
  s.nth = nth;
  s.error = error;
  s.visits = 0;
  s.counts.clear();
  s.hit.clear();
  s.action = static_cast<Action>(action);
  lock.count_allocations(s.call == kAllocate);
  return 0;
}

void damo_faults_pause(int pause) {
  const Lock lock(state().mutex);
  state().paused = pause != 0;
}

void damo_faults_disarm() {
  State& s = state();
  Lock lock(s.mutex);
  s.action = kNothing;
  lock.count_allocations(false);
}

// What was visited when it happened, or "": valid until the next call here.
const char* damo_faults_hit() {
  const Lock lock(state().mutex);
  return state().hit.c_str();
}

uint64_t damo_faults_visits() {
  const Lock lock(state().mutex);
  return state().visits;
}

// What operator new of memory.cc asks for; null: refused.
void* damo_faults_allocate(size_t bytes, size_t alignment) noexcept { return allocate(bytes, alignment); }

// Lines of "call class count" since the last arm; valid until the next call here.
const char* damo_faults_counts() {
  static std::string text;
  State& s = state();
  const Lock lock(s.mutex);
  text.clear();
  for (const auto& [point, count] : s.counts)
    text += std::string(kCallNames[static_cast<size_t>(point.first)]) + " " + point.second + " " +
            std::to_string(count) + "\n";
  return text.c_str();
}

// -------------------------------------------------- in front of the C library

#define DAMO_OPEN_MODE()                      \
  mode_t mode = 0;                            \
  if ((flags & (O_CREAT | O_TMPFILE)) != 0) { \
    va_list rest;                             \
    va_start(rest, flags);                    \
    mode = va_arg(rest, mode_t);              \
    va_end(rest);                             \
  }

int open(const char* path, int flags, ...) {
  DAMO_OPEN_MODE()
  return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  DAMO_OPEN_MODE()
  return open_at(AT_FDCWD, path, flags, mode);
}
int openat(int directory, const char* path, int flags, ...) {
  DAMO_OPEN_MODE()
  return open_at(directory, path, flags, mode);
}
int openat64(int directory, const char* path, int flags, ...) {
  DAMO_OPEN_MODE()
  return open_at(directory, path, flags, mode);
}
#undef DAMO_OPEN_MODE

int close(int fd) {
  forget(fd);
  return static_cast<int>(::syscall(SYS_close, fd));
}
int fclose(FILE* file) {
  forget(::fileno(file));
  static const auto real = next<int (*)(FILE*)>("fclose");
  return real(file);
}
int closedir(DIR* directory) {
  forget(::dirfd(directory));
  static const auto real = next<int (*)(DIR*)>("closedir");
  return real(directory);
}

ssize_t write(int fd, const void* data, size_t size) {
  const iovec piece{const_cast<void*>(data), size};
  return write_pieces(fd, &piece, 1, 0, true);
}
ssize_t writev(int fd, const iovec* pieces, int count) { return write_pieces(fd, pieces, count, 0, true); }
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  const iovec piece{const_cast<void*>(data), size};
  return write_pieces(fd, &piece, 1, offset, false);
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t pwritev(int fd, const iovec* pieces, int count, off_t offset) {
  return write_pieces(fd, pieces, count, offset, false);
}
ssize_t pwritev64(int fd, const iovec* pieces, int count, off64_t offset) {
  return write_pieces(fd, pieces, count, offset, false);
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

int ftruncate(int fd, off_t length) noexcept {
  return on_file(
      fd, [&] { return static_cast<int>(::syscall(SYS_ftruncate, fd, length)); },
      [&](const OpenFile& file) {
        return pass(
            kTruncate, file.path, [&](bool) { return ::syscall(SYS_ftruncate, fd, length); },
            [&](long) {
              note('T', {file.handle, static_cast<uint64_t>(length)}, {});
            });
      });
}
int ftruncate64(int fd, off64_t length) noexcept { return ftruncate(fd, length); }

int fallocate(int fd, int mode, off_t offset, off_t length) {
  return on_file(
      fd, [&] { return static_cast<int>(::syscall(SYS_fallocate, fd, mode, offset, length)); },
      [&](const OpenFile& file) {
        return pass(
            kTruncate, file.path, [&](bool) { return ::syscall(SYS_fallocate, fd, mode, offset, length); },
            [&](long) {
              if (mode == 0) note('A', {file.handle, static_cast<uint64_t>(offset + length)}, {});
            });
      });
}
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }

ssize_t read(int fd, void* data, size_t size) {
  if (read_fails(fd)) return -1;
  return ::syscall(SYS_read, fd, data, size);
}
ssize_t pread(int fd, void* data, size_t size, off_t offset) {
  if (read_fails(fd)) return -1;
  return ::syscall(SYS_pread64, fd, data, size, offset);
}
ssize_t pread64(int fd, void* data, size_t size, off64_t offset) { return pread(fd, data, size, offset); }
size_t fread_unlocked(void* data, size_t size, size_t count, FILE* file) {
  if (read_fails(::fileno(file))) return 0;
  static const auto real = next<size_t (*)(void*, size_t, size_t, FILE*)>("fread_unlocked");
  return real(data, size, count, file);
}

// libstdc++ copies files by sendfile and falls back to writes, which are seen.
ssize_t sendfile(int to, int from, off_t* offset, size_t count) noexcept {
  return on_file(
      to, [&] { return static_cast<ssize_t>(::syscall(SYS_sendfile, to, from, offset, count)); },
      [](const OpenFile&) { return refuse(EINVAL); });
}
ssize_t copy_file_range(int from, off64_t* from_offset, int to, off64_t* to_offset, size_t count, unsigned flags) {
  return on_file(
      to,
      [&] {
        return static_cast<ssize_t>(::syscall(SYS_copy_file_range, from, from_offset, to, to_offset, count, flags));
      },
      [](const OpenFile&) { return refuse(EINVAL); });
}

int rename(const char* from, const char* to) noexcept {
  return static_cast<int>(on_two_paths(
      kRename, AT_FDCWD, from, AT_FDCWD, to, [&] { return ::syscall(SYS_rename, from, to); }, 'R'));
}
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) noexcept {
  return static_cast<int>(on_two_paths(
      kRename, from_directory, from, to_directory, to,
      [&] { return ::syscall(SYS_renameat2, from_directory, from, to_directory, to, flags); }, 'R'));
}
int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
  return renameat2(from_directory, from, to_directory, to, 0);
}
int link(const char* from, const char* to) noexcept {
  return static_cast<int>(on_two_paths(
      kLink, AT_FDCWD, from, AT_FDCWD, to, [&] { return ::syscall(SYS_link, from, to); }, 'L'));
}

int unlinkat(int directory, const char* path, int flags) noexcept {
  return static_cast<int>(on_path(
      kUnlink, directory, path, [&] { return ::syscall(SYS_unlinkat, directory, path, flags); }, 'U'));
}
int unlink(const char* path) noexcept { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) noexcept { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char* path) noexcept {
  if (unlink(path) == 0) return 0;
  return errno == EISDIR ? rmdir(path) : -1;
}

int mkdirat(int directory, const char* path, mode_t mode) noexcept {
  return static_cast<int>(on_path(
      kMkdir, directory, path, [&] { return ::syscall(SYS_mkdirat, directory, path, mode); }, 'M'));
}
int mkdir(const char* path, mode_t mode) noexcept { return mkdirat(AT_FDCWD, path, mode); }

}  // extern "C"
