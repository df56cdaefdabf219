// SPDX-License-Identifier: Apache-2.0
//
// The bytes that every file of a counting Bloom filter begins with: head, mark, counters with their checksums.
// docs/format.md is the specification. The stand-alone file has a log behind them (filter_file.h), that of a storage
// has none (saved_filter.h).
//
// All checksums take a seed: 0 in a stand-alone file; in a storage one that stands for the storage, the table and the
// moment, so that no other file passes for this one.
//
// Errors: CorruptionError with the file and the offset. Thread safety: none of its own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "counting_bloom_filter.h"
#include "file.h"

namespace damo {

inline constexpr std::string_view kFilterMagic = "DAMOFILT";
inline constexpr size_t kFilterHeadBytes = 4096;  // then the counters
inline constexpr size_t kFilterMarkOffset = 512;  // a sector of its own: a disk writes it whole or not at all

// How much of a file counts.
struct FilterMark {
  uint64_t end = 0, synced = 0, boot = 0;
};

// What is at kFilterMarkOffset.
std::string encode_filter_mark(const FilterMark& mark, uint64_t seed);
// The kFilterHeadBytes, the mark among them, of a filter that has seen `adds`.
std::string encode_filter_head(const CountingBloomFilter& filter, uint64_t adds, const FilterMark& mark, uint64_t seed);

struct FilterHead {
  FilterSettings settings;
  FilterLayout layout;
  uint64_t adds = 0;
  FilterMark mark;  // not compared with the file's length
};
// Reads and checks the head; of its fields, whether the layout is that of the settings is the caller's to say.
FilterHead read_filter_head(const FileDescriptor& file, uint64_t seed);

// A file's length up to the end of the counters' checksums.
uint64_t filter_counters_end(const CountingBloomFilter& filter) noexcept;
inline uint64_t filter_chunk_offset(size_t index) noexcept {
  return kFilterHeadBytes + index * CountingBloomFilter::kChunkBytes;
}
inline uint64_t filter_chunk_checksum(Bytes chunk, size_t index, uint64_t seed) noexcept {
  return checksum64(chunk, seed + filter_chunk_offset(index));
}
// Fills a filter of the head's settings with what the file has, its adds included.
void read_filter_counters(const FileDescriptor& file, const FilterHead& head, uint64_t seed,
                          CountingBloomFilter& filter);

// "capacity=10, count=3, fpr=0.001, halve_every=None"
std::string show_filter_settings(const FilterSettings& settings);

}  // namespace damo
