// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <doctest/doctest.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <new>
#include <set>
#include <vector>

namespace damo {
namespace {

TEST_CASE("thread pool: each task runs once, whatever the number of threads and tasks") {
  for (const size_t threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const size_t tasks : {0, 1, 2, 3, 7, 1000}) {
      std::vector<std::atomic<int>> counts(tasks);
      pool.run(tasks, [&](size_t i) { ++counts[i]; });
      for (const auto& count : counts) CHECK(count == 1);
    }
  }
}

TEST_CASE("thread pool: what a loop wrote is there when run returns, loop after loop") {
  ThreadPool pool(3);
  std::vector<int> values(64, 0);
  for (int round = 1; round <= 2000; ++round) {
    pool.run(values.size(), [&](size_t i) { ++values[i]; });
    REQUIRE(values[static_cast<size_t>(round) % values.size()] == round);
  }
}

TEST_CASE("thread pool: tasks of one loop run side by side") {
  ThreadPool pool(3);
  std::mutex mutex;
  std::condition_variable all_here;
  size_t here = 0;
  bool met = true;
  pool.run(3, [&](size_t) {
    std::unique_lock lock(mutex);
    if (++here == 3) all_here.notify_all();
    if (!all_here.wait_for(lock, std::chrono::seconds(20), [&] { return here == 3; })) met = false;
  });
  CHECK(met);
}

TEST_CASE("thread pool: the exception of a task comes out of run, and the pool goes on") {
  for (const size_t threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (const size_t bad : {0, 1, 500, 999}) {
      std::atomic<int> done{0};
      CHECK_THROWS_AS(pool.run(1000,
                               [&](size_t i) {
                                 if (i == bad) throw std::bad_alloc();
                                 ++done;
                               }),
                      std::bad_alloc);
      CHECK(done < 1000);
      done = 0;
      pool.run(1000, [&](size_t) { ++done; });
      CHECK(done == 1000);
    }
  }
}

TEST_CASE("thread pool: a caller that finds the helpers busy does its loop alone") {
  ThreadPool pool(2);
  std::atomic<bool> inside{false}, release{false};
  std::thread first([&] {
    pool.run(2, [&](size_t) {
      inside = true;
      while (!release) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  });
  while (!inside) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::set<std::thread::id> ran_on;
  pool.run(10, [&](size_t) { ran_on.insert(std::this_thread::get_id()); });
  CHECK(ran_on == std::set{std::this_thread::get_id()});
  release = true;
  first.join();
}

TEST_CASE("thread pool: many callers at once each get all of their own tasks done") {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        std::atomic<size_t> sum{0};
        pool.run(20, [&](size_t i) { sum += i; });
        if (sum != 190) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("thread pool: its threads take no signals, and the caller's own mask stays") {
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  std::atomic<bool> blocked{false};
  start_quiet_thread([&] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    blocked = sigismember(&mask, SIGINT) == 1 && sigismember(&mask, SIGTERM) == 1;
  }).join();
  CHECK(blocked);
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1})
    CHECK(sigismember(&before, signal) == sigismember(&after, signal));
}

}  // namespace
}  // namespace damo
