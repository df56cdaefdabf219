// SPDX-License-Identifier: Apache-2.0
#include "stores/read_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace damo {
namespace {

TEST_CASE("read pool: each part runs once, whatever the number of threads and parts") {
  for (const size_t threads : {0, 1, 2, 7}) {
    ReadPool pool(threads);
    for (const size_t parts : {0, 1, 2, 3, 100}) {
      std::vector<std::atomic<int>> counts(parts);
      pool.run(parts, [&](size_t i) { ++counts[i]; });
      for (const auto& count : counts) CHECK(count == 1);
    }
  }
}

TEST_CASE("read pool: as many parts are worked on at once as there are threads") {
  ReadPool pool(4);
  // Four parts that wait for each other end only side by side.
  std::mutex mutex;
  std::condition_variable all_here;
  size_t here = 0;
  bool met = true;
  pool.run(4, [&](size_t) {
    std::unique_lock lock(mutex);
    if (++here == 4) all_here.notify_all();
    if (!all_here.wait_for(lock, std::chrono::seconds(20), [&] { return here == 4; })) met = false;
  });
  CHECK(met);
}

TEST_CASE("read pool: the first exception comes out when no part is running, and later parts are not begun") {
  ReadPool pool(4);
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> running{0}, begun{0};
    std::atomic<bool> thrown{false};
    CHECK_THROWS_WITH_AS(pool.run(1000,
                                  [&](size_t i) {
                                    ++running;
                                    ++begun;
                                    // Slow from then on: the thread that throws may not have a core at once.
                                    if (thrown) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                    while (i > 3 && !thrown) std::this_thread::yield();
                                    --running;
                                    if (i == 3) {
                                      thrown = true;
                                      throw std::domain_error("three");
                                    }
                                  }),
                         "three", std::domain_error);
    CHECK(running == 0);
    CHECK(begun < 1000);
  }
  std::atomic<int> count{0};
  pool.run(100, [&](size_t) { ++count; });
  CHECK(count == 100);
}

TEST_CASE("read pool: calls of several threads share it and each gets its own parts") {
  ReadPool pool(3);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<size_t> sum{0};
        pool.run(20, [&](size_t i) { sum += i; });
        if (sum != 190) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

}  // namespace
}  // namespace damo
