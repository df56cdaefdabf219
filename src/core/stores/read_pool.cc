// SPDX-License-Identifier: Apache-2.0
#include "read_pool.h"

#include <algorithm>
#include <system_error>

#include "blocked_signals.h"

namespace damo {

ReadPool::~ReadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ReadPool::run(size_t num_parts, const std::function<void(size_t)>& part) {
  if (num_parts <= 1 || max_helpers_ == 0) {
    for (size_t i = 0; i < num_parts; ++i) part(i);
    return;
  }
  Job job{.part = &part, .num_parts = num_parts, .error = nullptr};
  const size_t wanted = std::min(num_parts - 1, max_helpers_);
  std::unique_lock lock(mutex_);
  while (threads_.size() < wanted) {
    const BlockedSignals blocked;
    try {
      threads_.emplace_back([this] { help(); });
    } catch (const std::system_error&) {
      break;  // the system gives no more threads: those we have, and the caller, do the work
    }
  }
  jobs_.push_back(&job);
  for (size_t i = 0; i < std::min(wanted, threads_.size()); ++i) work_.notify_one();
  work_on(job, lock);
  std::erase(jobs_, &job);
  finished_.wait(lock, [&] { return job.helpers == 0; });
  if (job.error) std::rethrow_exception(job.error);
}

void ReadPool::help() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    Job& job = *jobs_.front();
    // The next thread begins with the next call's job, so that calls share the pool evenly.
    std::rotate(jobs_.begin(), jobs_.begin() + 1, jobs_.end());
    ++job.helpers;
    work_on(job, lock);
    std::erase(jobs_, &job);
    if (--job.helpers == 0) finished_.notify_all();
  }
}

void ReadPool::work_on(Job& job, std::unique_lock<std::mutex>& lock) {
  while (job.next < job.num_parts) {
    const size_t i = job.next++;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*job.part)(i);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) {
      if (!job.error) job.error = error;
      job.next = job.num_parts;
    }
  }
}

}  // namespace damo
