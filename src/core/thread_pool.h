// SPDX-License-Identifier: Apache-2.0
//
// A few threads that wait for parallel loops. The caller works along, so a pool of one
// thread has no helper and costs nothing. Helpers block all signals: Ctrl-C belongs to the caller's program.
//
// Thread safety: run() may be called from many threads; one loop at a time gets the helpers, a
// second caller that finds them busy does its loop alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace damo {

class ThreadPool {
 public:
  explicit ThreadPool(size_t num_threads);  // counting the caller
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t size() const noexcept { return helpers_.size() + 1; }
  // Calls task(0) .. task(count - 1), each once, and returns when all are done. If one throws, those not yet begun are
  // left out, and the first exception comes out of here.
  void run(size_t count, const std::function<void(size_t)>& task);

 private:
  void help();
  void work(const std::function<void(size_t)>& task);

  std::mutex busy_;  // held by the caller whose loop the helpers serve
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(size_t)>* task_ = nullptr;
  size_t count_ = 0;
  uint64_t loop_ = 0;  // numbers the loops, so that a helper joins each at most once
  size_t active_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
  std::atomic<size_t> next_{0};
  std::vector<std::thread> helpers_;
};

// Starts a thread with all signals blocked.
std::thread start_quiet_thread(std::function<void()> body);

}  // namespace damo
