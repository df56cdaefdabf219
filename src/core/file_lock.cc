// SPDX-License-Identifier: Apache-2.0
#include "file_lock.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ctime>
#include <mutex>
#include <set>

namespace damo {

// A POSIX lock is the process's own: it neither keeps out a second open in the same process, nor survives the
// closing of *any* descriptor of the file. So what this process has locked is listed here, and asked first.
struct FileLock::Held {
  std::mutex mutex;
  std::set<Holding> locks;  // with the pid: a forked child inherits the list, not the locks
};

FileLock::Held& FileLock::held() {
  static Held held;
  return held;
}

namespace {

std::string holder_text() {
  char host[256] = "?", since[64] = "?";
  gethostname(host, sizeof host - 1);
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  if (gmtime_r(&now, &utc) != nullptr) std::strftime(since, sizeof since, "%Y-%m-%d %H:%M:%S UTC", &utc);
  return "process " + std::to_string(getpid()) + " on " + host + " since " + since;
}

}  // namespace

FileLock::FileLock(const std::filesystem::path& file, const Words& words) {
  const std::filesystem::path parent = file.has_parent_path() ? file.parent_path() : ".";
  struct stat info {};
  if (::stat(parent.c_str(), &info) != 0) throw_system_error("open", parent);
  holding_ = {getpid(), static_cast<uint64_t>(info.st_dev), static_cast<uint64_t>(info.st_ino), file.filename()};
  Held& all = held();
  const std::lock_guard guard(all.mutex);
  if (all.locks.contains(holding_))
    throw AlreadyOpenError("[open] " + words.shown + " is open in this process already (process " +
                           std::to_string(getpid()) + "): use that " + words.handle + ", or close it first");
  file_ = FileDescriptor("open", file, O_RDWR | O_CREAT);
  struct flock whole {};
  whole.l_type = F_WRLCK;
  whole.l_whence = SEEK_SET;
  if (fcntl(file_.get(), F_SETLK, &whole) != 0) {
    if (errno != EACCES && errno != EAGAIN) throw_system_error("open", file);
    std::string holder(512, '\0');
    holder.resize(file_.read_at(std::as_writable_bytes(std::span(holder)), 0));
    throw AlreadyOpenError("[open] " + words.shown + " is open elsewhere" + (holder.empty() ? "" : ": " + holder) +
                           "; close it there, or open another " + words.place);
  }
  // Over the text of the last holder, then cut: a disk without a free block still takes it.
  const std::string holder = holder_text();
  file_.write_at(std::as_bytes(std::span(holder)), 0);
  file_.truncate(holder.size());
  if (::fstat(file_.get(), &info) != 0) throw_system_error("open", file);
  device_ = info.st_dev;
  inode_ = info.st_ino;
  all.locks.insert(holding_);
}

FileLock::~FileLock() { unlock(); }

bool FileLock::is_in_place() const noexcept {
  struct stat info {};
  if (::stat(file_.path().c_str(), &info) == 0) return info.st_dev == device_ && info.st_ino == inode_;
  return errno != ENOENT && errno != ENOTDIR;  // a disk that does not answer tells nothing; who needs it hears of that
}

void FileLock::unlock() noexcept {
  if (!file_.is_open() || std::get<pid_t>(holding_) != getpid()) return;
  Held& all = held();
  const std::lock_guard guard(all.mutex);
  all.locks.erase(holding_);
  file_ = FileDescriptor();
}

}  // namespace damo
