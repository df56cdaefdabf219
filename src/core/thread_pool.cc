// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <string>
#include <system_error>
#include <utility>

#include "error.h"

namespace damo {

std::thread start_quiet_thread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread thread(std::move(body));
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return thread;
  } catch (const std::system_error& refused) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw StorageError(std::string("[open] the system starts no more threads (") + refused.what() +
                       "): raise the limit (ulimit -u, pids.max), or give fewer threads");
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
}

ThreadPool::ThreadPool(size_t num_threads) {
  helpers_.reserve(num_threads);
  try {
    for (size_t i = 1; i < num_threads; ++i) helpers_.push_back(start_quiet_thread([this] { help(); }));
  } catch (...) {
    // As many as the machine allows: the caller's thread alone would do.
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::work(const std::function<void(size_t)>& task) {
  try {
    for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task(i);
  } catch (...) {
    next_.store(count_);  // the rest is not begun
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::run(size_t count, const std::function<void(size_t)>& task) {
  std::unique_lock busy(busy_, std::try_to_lock);
  if (count <= 1 || helpers_.empty() || !busy.owns_lock()) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    task_ = &task;
    count_ = count;
    next_.store(0);
    ++loop_;
  }
  wake_.notify_all();
  work(task);
  std::unique_lock lock(mutex_);
  task_ = nullptr;  // a helper that wakes only now finds nothing to do
  done_.wait(lock, [this] { return active_ == 0; });
  // Not before the others are done: they use what the caller would take away.
  if (const std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
}

void ThreadPool::help() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || (task_ != nullptr && loop_ != seen); });
    if (stop_) return;
    seen = loop_;
    const auto* task = task_;
    ++active_;
    lock.unlock();
    work(*task);
    lock.lock();
    if (--active_ == 0) done_.notify_all();
  }
}

}  // namespace damo
