// SPDX-License-Identifier: Apache-2.0
//
// Threads that wait for the disk side by side: a deep queue of reads from one
// call. They sleep on a condition variable when there is nothing to read, and
// are started when first needed, so a small store has none.
//
// Thread safety: run() from any number of threads; the calls share the pool's threads, and each caller works
// on its own call too, so none waits for another's to end.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace damo {

class ReadPool {
 public:
  // At most `threads` work on one call of run(), its caller included.
  explicit ReadPool(size_t threads) : max_helpers_(threads > 0 ? threads - 1 : 0) {}
  ~ReadPool();
  ReadPool(const ReadPool&) = delete;
  ReadPool& operator=(const ReadPool&) = delete;

  // Calls part(0) ... part(num_parts - 1), each once, and returns when all are done. The first exception stops
  // the handing out of parts and comes out of run() when no part is running any more.
  void run(size_t num_parts, const std::function<void(size_t)>& part);

 private:
  struct Job {
    const std::function<void(size_t)>* part;
    size_t num_parts;
    size_t next = 0;     // the first part not handed out
    size_t helpers = 0;  // threads of the pool inside work_on(this)
    std::exception_ptr error;
  };

  void help();
  // Called and left with `lock` held; works without it.
  void work_on(Job& job, std::unique_lock<std::mutex>& lock);

  const size_t max_helpers_;
  std::mutex mutex_;                  // protects what follows and every Job
  std::condition_variable work_;      // jobs_ grew, or stopping_
  std::condition_variable finished_;  // some job's last helper left
  std::deque<Job*> jobs_;             // those with parts to hand out
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

}  // namespace damo
