// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer on a parser of the core: finds inputs that reach new code. Built with the sanitizers (preset fuzz).
//
//   damo_libfuzzer --write-seeds=DIR                                 DIR/PARSER/*: whole inputs of each parser
//   damo_libfuzzer --parser=NAME [libFuzzer's options] [CORPUS...]   fuzzes it; CORPUS a directory
//   damo_libfuzzer --parser=NAME FILE                                shows a finding again
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

#include "error.h"
#include "parsers.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

damo::Parser parser;
unsigned long long inputs = 0, refused = 0;

void write_seeds(const std::filesystem::path& directory) {
  for (const damo::Parser& each : damo::parsers()) {
    std::filesystem::create_directories(directory / each.name);
    for (size_t i = 0; i < each.seeds.size(); ++i) {
      std::ofstream out(directory / each.name / ("whole-" + std::to_string(i)), std::ios::binary);
      if (!(out << each.seeds[i]).flush()) std::abort();
    }
  }
}

}  // namespace

// libFuzzer leaves options with two dashes to us.
extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments) {
  constexpr std::string_view kWriteSeeds = "--write-seeds=", kParser = "--parser=";
  for (const std::string_view argument : std::span(*arguments, static_cast<size_t>(*count))) {
    if (argument.starts_with(kWriteSeeds)) {
      write_seeds(argument.substr(kWriteSeeds.size()));
      std::exit(0);
    }
    if (!argument.starts_with(kParser)) continue;
    for (const damo::Parser& each : damo::parsers())
      if (each.name == argument.substr(kParser.size())) parser = each;
  }
  if (!parser.consume) {
    std::fprintf(stderr, "--parser=NAME, one of:");
    for (const damo::Parser& each : damo::parsers()) std::fprintf(stderr, " %s", each.name.c_str());
    std::fprintf(stderr, "\n");
    std::exit(2);
  }
  for (const std::string& whole : parser.seeds) parser.consume(std::as_bytes(std::span(whole)));  // must be taken
  std::atexit([] { std::fprintf(stderr, "%s: %llu inputs, %llu refused\n", parser.name.c_str(), inputs, refused); });
  return 0;
}

// The bytes are libFuzzer's own copy, of exactly that size.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ++inputs;
  try {
    parser.consume(std::as_bytes(std::span(data, size)));
  } catch (const damo::CorruptionError&) {
    ++refused;
  }
  return 0;
}

// Half of the inputs get right checksums: behind them is most of the code.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  if (!parser.repair || seed % 2 == 0) return size;
  std::string text(reinterpret_cast<const char*>(data), size);
  parser.repair(text);
  size = std::min(text.size(), max_size);
  std::memcpy(data, text.data(), size);
  return size;
}
