// SPDX-License-Identifier: Apache-2.0
//
// Updates of 60,000 distinct rows on one thread, as apply_gradients makes them:
//   optimizer_bench            rows that lie in a row, about the size of the caches
//   optimizer_bench 2000000    rows scattered over a table of that many
// For each vector width, optimizer and dimension: nanoseconds a row, the best of
// 9 runs with one call a batch (update_rows), and with one call a row (update).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "optimizer.h"
#include "vector_width.h"

namespace {

using namespace damo;

constexpr size_t kBatch = 60000;
constexpr size_t kHeaderFloats = 8;  // what a row holds in front of its weights

double nanoseconds_a_row_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / kBatch;
}

// What runs another loop than the defaults.
struct Loop {
  std::string label;
  std::string name;
  Settings settings;
};
const std::vector<Loop> kOtherLoops = {
    {"sgd momentum", "sgd", {{"momentum", 0.9}}},
    {"adagrad lr_decay", "adagrad", {{"lr_decay", 1e-3}}},
    {"adam global", "adam", {{"bias_correction", 1.0}}},
    {"rmsprop all", "rmsprop", {{"momentum", 0.9}, {"centered", 1.0}}},
};

void measure(const std::string& label, const Optimizer& optimizer, size_t dimension, size_t table_rows) {
  const size_t row_floats = kHeaderFloats + dimension + optimizer.state_floats(dimension);
  std::mt19937_64 engine(1);
  std::vector<float> table(table_rows * row_floats, 0.01f);
  for (size_t i = 0; i < table_rows; ++i) {
    optimizer.initialize_state(dimension, table.data() + i * row_floats + kHeaderFloats + dimension);
  }
  std::vector<float> gradients(kBatch * dimension);
  for (float& gradient : gradients) gradient = (static_cast<float>(engine() % 2001) - 1000.0f) * 1e-4f;
  std::vector<size_t> order(table_rows);
  for (size_t i = 0; i < table_rows; ++i) order[i] = i;
  if (table_rows > kBatch) std::shuffle(order.begin(), order.end(), engine);
  std::vector<RowUpdate> rows(kBatch);
  for (size_t i = 0; i < kBatch; ++i) {
    float* weights = table.data() + order[i] * row_floats + kHeaderFloats;
    const auto count = static_cast<uint32_t>(engine() % 20000 + 1);
    rows[i] = {weights, weights + dimension, gradients.data() + i * dimension, count};
  }
  double batch = 1e9;
  double single = 1e9;
  for (uint64_t step = 1; step <= 9; ++step) {
    const StepNumbers numbers = optimizer.numbers(optimizer.lr(), step);
    auto start = std::chrono::steady_clock::now();
    optimizer.update_rows(numbers, dimension, rows);
    batch = std::min(batch, nanoseconds_a_row_since(start));
    start = std::chrono::steady_clock::now();
    for (const RowUpdate& row : rows) {
      optimizer.update(numbers, row.update_count, dimension, row.weights, row.state, row.gradient);
    }
    single = std::min(single, nanoseconds_a_row_since(start));
  }
  std::printf("%-20s dimension %3zu  update_rows %6.1f ns  update %6.1f ns\n", label.c_str(), dimension, batch, single);
}

}  // namespace

int main(int argc, char** argv) {
#ifndef NDEBUG
  std::printf("built without NDEBUG: these are not the numbers of a release build\n");
#endif
  const size_t table_rows = argc > 1 ? std::max<size_t>(kBatch, std::strtoull(argv[1], nullptr, 10)) : kBatch;
  std::printf("%zu rows of a table of %zu\n", kBatch, table_rows);
  const VectorWidth widest = vector_width();
  for (const VectorWidth width : {VectorWidth::kAvx2, VectorWidth::kBaseline}) {
    if (width > widest) continue;
    vector_width() = width;
    std::printf("%s\n", width == VectorWidth::kAvx2 ? "AVX2" : "SSE2");
    for (const size_t dimension : {8u, 10u, 16u, 32u, 64u}) {
      for (const std::string& name : optimizer_names()) {
        measure(name, *make_optimizer(name, {}), dimension, table_rows);
      }
      for (const Loop& loop : kOtherLoops) {
        measure(loop.label, *make_optimizer(loop.name, loop.settings), dimension, table_rows);
      }
    }
  }
}
