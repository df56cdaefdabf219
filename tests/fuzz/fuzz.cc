// SPDX-License-Identifier: Apache-2.0
//
// Fuzzes every parser of the core without a compiler of its own: whole inputs, changed at random. Built with the
// sanitizers (preset asan), which see what a test cannot. libfuzzer.cc, with Clang, goes deeper.
//
//   damo_fuzz [--parser NAME] [--seconds N] [--runs N] [--seed N]      N runs or seconds of each parser
//
// Half of the inputs get right checksums. A crash is shown again by its --parser, --seed and run number.
#include <signal.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "error.h"
#include "parsers.h"

namespace damo {
namespace {

std::string changed(std::mt19937_64& random, const std::vector<std::string>& seeds) {
  const auto below = [&](size_t limit) { return static_cast<size_t>(random() % std::max<size_t>(limit, 1)); };
  static constexpr std::array<uint64_t, 10> kHard{
      0, 1, 0x7f, 0xff, 0xffff, 0x7fffffff, 0xffffffff, uint64_t{1} << 32, ~uint64_t{0} >> 1, ~uint64_t{0}};
  std::string text = seeds[below(seeds.size())];
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(text.size());
    switch (below(7)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1:
        if (!text.empty()) text[at] = static_cast<char>(random());
        break;
      case 2:
        text.resize(at);
        break;
      case 3:
        text.insert(at, below(40), static_cast<char>(random()));
        break;
      case 4:    // numbers are where lengths and counts are
      case 5: {  // of eight bytes, or of four
        const uint64_t number = kHard[below(kHard.size())];
        const size_t width = random() % 2 == 0 ? 4 : 8, from = at & ~size_t{3};
        if (from + width <= text.size()) std::memcpy(text.data() + from, &number, width);
        break;
      }
      default: {  // a piece of another one
        const std::string& other = seeds[below(seeds.size())];
        const size_t from = below(other.size());
        text.replace(at, below(64), other.substr(from, below(64)));
      }
    }
  }
  return text;
}

const char* running = "";
uint64_t running_seed = 0, running_run = 0;

// The sanitizers end with SIGABRT (abort_on_error) or with an exit code; both after this line.
void say_which() {
  std::fprintf(stderr, "--parser %s, --seed %llu, run %llu\n", running, static_cast<unsigned long long>(running_seed),
               static_cast<unsigned long long>(running_run));
}

int fuzz(const Parser& parser, double seconds, uint64_t runs, uint64_t seed) {
  running = parser.name.c_str();
  running_seed = seed;
  std::mt19937_64 random(seed);
  uint64_t refused = 0;
  for (const std::string& whole : parser.seeds) parser.consume(std::as_bytes(std::span(whole)));  // must be taken
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  uint64_t run = 0;
  for (; run < runs && (run % 256 != 0 || std::chrono::steady_clock::now() < end); ++run) {
    running_run = run;
    std::string text = changed(random, parser.seeds);
    if (parser.repair && random() % 2 == 0) parser.repair(text);
    // A copy of exactly its size: a read past its end is past the end of an allocation.
    const Bytes bytes = std::as_bytes(std::span(text));
    const std::vector<std::byte> input(bytes.begin(), bytes.end());
    try {
      parser.consume(input);
    } catch (const CorruptionError&) {
      ++refused;
    }
  }
  std::printf("%s: %llu runs, %llu refused\n", parser.name.c_str(), static_cast<unsigned long long>(run),
              static_cast<unsigned long long>(refused));
  return refused > 0 || parser.name == "presence" ? 0 : 1;
}

int run(int count, char** arguments) {
  std::string wanted;
  double seconds = 1e9;
  uint64_t runs = UINT64_MAX, seed = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--parser") wanted = arguments[i + 1];
    if (name == "--seconds") seconds = std::atof(arguments[i + 1]);
    if (name == "--runs") runs = std::strtoull(arguments[i + 1], nullptr, 10);
    if (name == "--seed") seed = std::strtoull(arguments[i + 1], nullptr, 10);
  }
  if (seconds >= 1e9 && runs == UINT64_MAX) seconds = 1;
  int failed = 0;
  for (const Parser& parser : parsers())
    if (wanted.empty() || wanted == parser.name) failed |= fuzz(parser, seconds, runs, seed);
  return failed;
}

}  // namespace
}  // namespace damo

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_set_death_callback(void (*callback)());
#endif

int main(int count, char** arguments) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_set_death_callback(damo::say_which);
#endif
  ::signal(SIGABRT, [](int) {
    damo::say_which();
    ::signal(SIGABRT, SIG_DFL);
    ::raise(SIGABRT);
  });
  return damo::run(count, arguments);
}
