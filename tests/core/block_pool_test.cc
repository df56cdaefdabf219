// SPDX-License-Identifier: Apache-2.0
#include "stores/block_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace damo {
namespace {

TEST_CASE("block pool: blocks of all sizes are aligned, hold what was asked for and do not overlap") {
  BlockPool pool;
  std::mt19937_64 random(1);
  std::vector<std::pair<unsigned char*, size_t>> blocks;
  const auto fill_of = [](const void* block) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(block) >> 4 & 0xff);
  };
  size_t wrong = 0;
  for (int step = 0; step < 20000; ++step) {
    if (blocks.size() < 300 || random() % 2 == 0) {
      const size_t bytes = random() % 10 == 0 ? random() % 100'000 : random() % 6000;
      auto* block = static_cast<unsigned char*>(pool.allocate(bytes));
      wrong += reinterpret_cast<uintptr_t>(block) % 16 != 0 || BlockPool::usable_bytes(block) < bytes ? 1 : 0;
      std::memset(block, fill_of(block), bytes);
      blocks.emplace_back(block, bytes);
    } else {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      const auto [block, bytes] = blocks.back();
      for (size_t i = 0; i < bytes; ++i) wrong += block[i] != fill_of(block) ? 1 : 0;
      pool.free(block);
      blocks.pop_back();
    }
  }
  for (const auto& [block, bytes] : blocks) pool.free(block);
  pool.free(nullptr);
  CHECK(wrong == 0);
}

TEST_CASE("block pool: memory of one size serves another once it is free") {
  BlockPool pool;
  const auto take = [&](size_t bytes) {
    std::vector<void*> blocks;
    for (size_t taken = 0; taken < (8 << 20); taken += bytes) blocks.push_back(pool.allocate(bytes));
    return blocks;
  };
  size_t first = 0;
  for (const size_t bytes : {4000, 500, 9000, 4000, 1200}) {
    const std::vector<void*> blocks = take(bytes);
    if (first == 0) first = pool.system_bytes();
    for (void* block : blocks) pool.free(block);
  }
  CHECK(first <= (10 << 20));
  CHECK(pool.system_bytes() <= first + first / 2);  // classes differ in what they waste
}

TEST_CASE("block pool: what one thread frees, another uses") {
  BlockPool pool;
  constexpr size_t kBlocks = 1000;  // 4 MiB in all
  std::vector<void*> shared(kBlocks);
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(static_cast<uint64_t>(thread));
      for (int step = 0; step < 5000; ++step) {
        void* block = pool.allocate(4100);
        std::memset(block, thread, 4100);
        {
          const std::lock_guard lock(mutex);
          std::swap(block, shared[random() % kBlocks]);
        }
        pool.free(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(pool.system_bytes() < (7 << 20));
  for (void* block : shared) pool.free(block);
}

}  // namespace
}  // namespace damo
