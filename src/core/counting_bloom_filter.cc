// SPDX-License-Identifier: Apache-2.0
#include "counting_bloom_filter.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"
#include "planted.h"
#include "settings.h"

namespace damo {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr size_t kLineCounters = CountingBloomFilter::kLineBytes * 2;
constexpr size_t kLineWords = CountingBloomFilter::kLineBytes / 8;
constexpr size_t kPageLines = CountingBloomFilter::kPageBytes / CountingBloomFilter::kLineBytes;
constexpr uint32_t kMaxPerLine = 16;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
constexpr uint64_t kLowBits = 0x1111111111111111ULL;  // the lowest bit of each counter

// The lines are read and changed word by word, and estimate() may run beside an add. Relaxed: on this machine plain
// loads and stores.
uint64_t load(const uint64_t& word) noexcept {
  return std::atomic_ref(const_cast<uint64_t&>(word)).load(std::memory_order_relaxed);
}
void store(uint64_t& word, uint64_t value) noexcept { std::atomic_ref(word).store(value, std::memory_order_relaxed); }

// How many of a word's counters have their lowest bit set in `bits`, which has no others.
uint32_t count_low_bits(uint64_t bits) noexcept {
  const uint64_t bytes = (bits + (bits >> 4)) & 0x0303030303030303ULL;
  return static_cast<uint32_t>((bytes * 0x0101010101010101ULL) >> 56);
}

uint32_t count_nonzero(uint64_t word) noexcept {
  return count_low_bits((word | word >> 1 | word >> 2 | word >> 3) & kLowBits);
}

// How many of a word's counters are at least `count`: 16 - count more of those carry into the fifth bit.
uint32_t count_at_least(uint64_t word, uint32_t count) noexcept {
  constexpr uint64_t kEven = 0x0F0F0F0F0F0F0F0FULL, kOnes = 0x0101010101010101ULL;
  const uint64_t missing = kOnes * (16 - count);
  return count_low_bits((((word & kEven) + missing) >> 4 & kOnes) | (((word >> 4 & kEven) + missing) & kOnes << 4));
}

double nth_power(double base, uint32_t exponent) noexcept {
  double power = 1.0;
  for (; exponent > 0; --exponent) power *= base;
  return power;
}

// --------------------------------------------------------------- the layout

// The false positives of lines in which a key has `per_line` counters, each drawn alone out of 128.
// In +, -, * and / alone and in a fixed order: every machine gets the same bits, so the same layout.
class LineModel {
 public:
  explicit LineModel(uint32_t per_line) : most_keys_(256.0 / per_line), hit_(512 / per_line + 64) {
    // share[j]: the probability that j counters are above zero.
    std::array<double, kLineCounters + 1> share{}, hit;
    share[0] = 1.0;
    for (size_t j = 0; j <= kLineCounters; ++j) hit[j] = nth_power(filled(j), per_line);
    for (double& of_line : hit_) {
      of_line = 0.0;
      for (size_t j = 0; j <= kLineCounters; ++j) of_line += share[j] * hit[j];
      for (uint32_t draw = 0; draw < per_line; ++draw) {
        for (size_t j = kLineCounters; j > 0; --j)
          share[j] = share[j] * filled(j) + share[j - 1] * (1.0 - filled(j - 1));
        share[0] = 0.0;
      }
    }
  }

  // The most keys that a line may have on average.
  double keys_for(double fpr) const {
    double low = 0.0, high = most_keys_;  // with so many, two thirds of all get through
    for (int i = 0; i < 32; ++i) {
      const double middle = (low + high) / 2;
      (rate(middle) <= fpr ? low : high) = middle;
    }
    return low;
  }

 private:
  // The share of keys never added that find all their counters above zero, where a line has `keys` keys on average.
  // Keys of a line are Poisson distributed, and those of the two lines independent but for keys that have both: of a
  // line's keys, one in 63 is in a given other line of the page.
  double rate(double keys) const {
    const double common = keys / (kPageLines - 1);
    const std::vector<double> in_both = poisson(common, 32), in_one = poisson(keys - common, hit_.size());
    double rate = 0.0;
    for (size_t z = 0; z < in_both.size(); ++z) {
      if (in_both[z] < 1e-18) continue;
      double hit = 0.0;
      for (size_t y = 0; y + z < hit_.size(); ++y) hit += in_one[y] * hit_[y + z];
      rate += in_both[z] * (hit * hit);
    }
    return rate;
  }

  static double filled(size_t counters) { return static_cast<double>(counters) / kLineCounters; }
  // The first probabilities of the distribution, from their ratios: no exponential needed.
  static std::vector<double> poisson(double mean, size_t size) {
    std::vector<double> weights(size);
    const auto mode = std::min(static_cast<size_t>(mean), size - 1);
    double sum = weights[mode] = 1.0;
    for (size_t i = mode; i > 0; --i) sum += weights[i - 1] = weights[i] * static_cast<double>(i) / mean;
    for (size_t i = mode + 1; i < size; ++i) sum += weights[i] = weights[i - 1] * mean / static_cast<double>(i);
    for (double& weight : weights) weight /= sum;
    return weights;
  }

  double most_keys_;
  std::vector<double> hit_;  // by the keys of a line: what rate() squares
};

}  // namespace

void CountingBloomFilter::check(const FilterSettings& settings) {
  const auto fail = [](const char* name, const std::string& value, const std::string& expected) {
    throw std::invalid_argument(std::string("[CountingBloomFilter] ") + name + " is " + value + ", expected " +
                                expected);
  };
  if (settings.capacity < 1 || settings.capacity > kMaxCapacity)
    fail("capacity", std::to_string(settings.capacity), "1 to " + std::to_string(kMaxCapacity) + " distinct keys");
  if (settings.count < 1 || settings.count > kMaxCount)
    fail("count", std::to_string(settings.count), "1 to " + std::to_string(kMaxCount));
  if (!(settings.fpr >= kMinFpr && settings.fpr <= kMaxFpr))
    fail("fpr", format_number(settings.fpr),
         "a rate in [" + format_number(kMinFpr) + ", " + format_number(kMaxFpr) + "]");
}

FilterLayout CountingBloomFilter::layout_of(const FilterSettings& settings) {
  check(settings);
  // How many keys a line may have follows from the rate alone, and takes a millisecond to find: the last one is kept.
  struct Found {
    double fpr = 0.0, keys = 0.0;
    uint32_t per_line = 0;
  };
  thread_local Found found;
  if (found.fpr != settings.fpr) {
    // The textbook's filter has the least k with 2^-k <= fpr. Lines whose load varies want fewer: from half of k down,
    // as long as that is no loss. A counter less is worth a hundredth of the memory, for each add and check is shorter.
    uint32_t k = 1;
    for (double rate = 0.5; rate > settings.fpr; rate /= 2) ++k;
    Found best;
    double most = 0.0;
    for (uint32_t per_line = (k + 1) / 2; per_line > 0; --per_line) {
      const double keys = LineModel(per_line).keys_for(settings.fpr);
      if (keys < most * 0.99) break;
      most = std::max(most, keys);
      best = {settings.fpr, keys, per_line};
    }
    found = best;
  }
  const double pages = std::ceil(static_cast<double>(settings.capacity) * 2 / (found.keys * kPageLines));
  return {static_cast<uint64_t>(pages), found.per_line};
}

// ------------------------------------------------------------------ memory

void CountingBloomFilter::Unmap::operator()(std::byte* memory) const noexcept {
  // A forked child does not have these pages; what it has at their addresses is something else's.
  if (getpid() == process) munmap(memory, bytes);
}

CountingBloomFilter::CountingBloomFilter(const FilterSettings& settings)
    : settings_(settings), layout_(layout_of(settings)) {
  const size_t bytes = layout_.pages * kPageBytes;
  // Room to start at a huge page: with half of the pages in it, the translation of addresses costs half.
  const size_t reserved = bytes + (bytes >= kHugePage ? kHugePage : 0);
  void* pages = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED)
    throw StorageError("[CountingBloomFilter] there is no address space for the " + std::to_string(bytes) +
                       " bytes of a filter with capacity " + std::to_string(settings.capacity) + " and fpr " +
                       format_number(settings.fpr) + ": choose a smaller capacity or a higher fpr");
  own_ = {static_cast<std::byte*>(pages), Unmap{reserved, getpid()}};
  madvise(pages, reserved, MADV_DONTFORK);
  size_t start = 0;
  if (bytes >= kHugePage) {
    start = (kHugePage - reinterpret_cast<uintptr_t>(pages) % kHugePage) % kHugePage;
    madvise(own_.get() + start, bytes, MADV_HUGEPAGE);
  }
  memory_ = {own_.get() + start, bytes};
  changed_.resize(num_chunks());
  set_adds(0);
}

CountingBloomFilter::CountingBloomFilter(const FilterSettings& settings, std::span<std::byte> memory, uint64_t adds)
    : settings_(settings), layout_(layout_of(settings)), memory_(memory) {
  const size_t bytes = layout_.pages * kPageBytes;
  if (memory.size() != bytes || reinterpret_cast<uintptr_t>(memory.data()) % kLineBytes != 0)
    throw std::invalid_argument("[CountingBloomFilter] memory has " + std::to_string(memory.size()) +
                                " bytes, expected " + std::to_string(bytes) + " at a multiple of " +
                                std::to_string(kLineBytes));
  changed_.resize(num_chunks());
  for (size_t i = 0; i < num_chunks(); ++i) nonzero_ += nonzero_of(i);
  set_adds(adds);
}

// -------------------------------------------------------------------- keys

struct CountingBloomFilter::Place {
  uint64_t* lines[2];
  uint64_t hash;
};

namespace {

// A key's counters one by one: 7 bits for each out of a stream of words, those of the first line first. kPerLine is
// counters_per_line where the compiler knows it (adds and checks take a third less time), else 0.
template <uint32_t kPerLine>
struct Counters {
  Counters(uint64_t* const lines[2], uint64_t hash, uint32_t given) noexcept : size(2 * (kPerLine ? kPerLine : given)) {
    uint64_t bits = 0;
    for (uint32_t i = 0, left = 0; i < size; ++i, --left, bits >>= 7) {
      if (left == 0) {
        bits = mix_key(hash += kGolden);
        left = 9;
      }
      words[i] = lines[i < size / 2 ? 0 : 1] + (bits >> 4 & (kLineWords - 1));
      shifts[i] = static_cast<uint8_t>(4 * (bits & 15));
    }
  }
  uint32_t get(uint32_t i) const noexcept { return load(*words[i]) >> shifts[i] & 15; }
  uint32_t least() const noexcept {
    uint32_t least = CountingBloomFilter::kMaxCount;
    for (uint32_t i = 0; i < size; ++i) least = std::min(least, get(i));
    return least;
  }

  const uint32_t size;
  uint64_t* words[2 * (kPerLine ? kPerLine : kMaxPerLine)];
  uint8_t shifts[2 * (kPerLine ? kPerLine : kMaxPerLine)];
};

}  // namespace

uint64_t CountingBloomFilter::page_of(uint64_t hash) const noexcept {
  return static_cast<uint64_t>((static_cast<Wide>(hash) * layout_.pages) >> 64);
}

size_t CountingBloomFilter::chunk_of(uint64_t key) const noexcept {
  return page_of(mix_key(key)) / (kChunkBytes / kPageBytes);
}

CountingBloomFilter::Place CountingBloomFilter::place_of(uint64_t key) const noexcept {
  // The page from the high bits, the lines from the low ones; the second is any but the first.
  const uint64_t hash = mix_key(key);
  const uint64_t first = hash % kPageLines, second = first ^ (((hash >> 6 & 0xFFFF) * (kPageLines - 1) >> 16) + 1);
  auto* lines = reinterpret_cast<uint64_t*>(memory_.data() + page_of(hash) * kPageBytes);
  return {{lines + first * kLineWords, lines + second * kLineWords}, hash};
}

// Calls then(i, counters) for each key in order, with the lines of keys some places ahead on their way into the cache.
template <uint32_t kPerLine, class Then>
void CountingBloomFilter::each_key_of(std::span<const uint64_t> keys, Then then) const {
  constexpr size_t kAhead = 32;
  std::array<Place, kAhead> ring;
  const auto prepare = [&](size_t i) {
    const Place& place = ring[i % kAhead] = place_of(keys[i]);
    __builtin_prefetch(place.lines[0], 1);
    __builtin_prefetch(place.lines[1], 1);
  };
  for (size_t i = 0; i < std::min(kAhead, keys.size()); ++i) prepare(i);
  for (size_t i = 0; i < keys.size(); ++i) {
    const Place place = ring[i % kAhead];
    if (i + kAhead < keys.size()) prepare(i + kAhead);
    then(i, Counters<kPerLine>(place.lines, place.hash, layout_.counters_per_line));
  }
}

template <class Then>
void CountingBloomFilter::each_key(std::span<const uint64_t> keys, Then then) const {
  switch (layout_.counters_per_line) {
    case 2:
      return each_key_of<2>(keys, then);
    case 3:
      return each_key_of<3>(keys, then);
    case 4:
      return each_key_of<4>(keys, then);
    case 5:
      return each_key_of<5>(keys, then);
    default:
      return each_key_of<0>(keys, then);
  }
}

// -------------------------------------------------------------------- adds

template <class KeyCounters>
uint32_t CountingBloomFilter::add_one(const KeyCounters& counters, uint32_t num) {
  const uint32_t least = counters.least();
  const uint32_t wanted = least + std::min(num, kMaxCount - least);
  if (wanted != least) {
    will_change(static_cast<size_t>(reinterpret_cast<std::byte*>(counters.words[0]) - memory_.data()) / kChunkBytes);
    for (uint32_t i = 0; i < counters.size; ++i) {
      // Without a branch on the counter, which nobody could predict.
      const uint32_t now = counters.get(i);
      const uint64_t more = std::max(now, wanted) - now;
      store(*counters.words[i], load(*counters.words[i]) + (more << counters.shifts[i]));
      nonzero_ += now == 0;
    }
  }
  count_adds(num);
  return wanted;
}

void CountingBloomFilter::set_adds(uint64_t adds) noexcept {
  constexpr uint64_t kEnd = std::numeric_limits<uint64_t>::max();
  adds_ = adds;
  const uint64_t every = settings_.halve_every;
  next_halving_ = every == 0 || adds > kEnd - every ? kEnd : (adds / every + 1) * every;
}

void CountingBloomFilter::count_adds(uint32_t num) {
  const uint64_t before = adds_;
  adds_ += std::min<uint64_t>(num, std::numeric_limits<uint64_t>::max() - adds_);
  if (adds_ < next_halving_ || settings_.halve_every == 0) return;
  const uint64_t passed = adds_ / settings_.halve_every - before / settings_.halve_every;
  for (uint64_t i = 0; i < std::min<uint64_t>(passed, 4); ++i) halve();  // after four all are zero
  set_adds(adds_);
}

void CountingBloomFilter::halve() {
  nonzero_ = 0;
  for (size_t i = 0; i < num_chunks(); ++i) {
    if (!planted("halved before the cut has saved it")) will_change(i);
    for (uint64_t& word : words_of(i)) {
      const uint64_t halved = load(word) >> 1 & kLowBits * 7;
      store(word, halved);
      nonzero_ += count_nonzero(halved);
    }
  }
}

void CountingBloomFilter::add(std::span<const uint64_t> keys, uint32_t num) {
  each_key(keys, [&](size_t, const auto& counters) { add_one(counters, num); });
}

void CountingBloomFilter::add(std::span<const uint64_t> keys, std::span<const uint32_t> nums) {
  each_key(keys, [&](size_t i, const auto& counters) { add_one(counters, nums[i]); });
}

void CountingBloomFilter::add_and_check(std::span<const uint64_t> keys, uint32_t num, bool* seen) {
  each_key(keys, [&](size_t i, const auto& counters) { seen[i] = add_one(counters, num) >= settings_.count; });
}

void CountingBloomFilter::add_and_check(std::span<const uint64_t> keys, std::span<const uint32_t> nums, bool* seen) {
  each_key(keys, [&](size_t i, const auto& counters) { seen[i] = add_one(counters, nums[i]) >= settings_.count; });
}

// ----------------------------------------------------------------- answers

void CountingBloomFilter::estimate(std::span<const uint64_t> keys, uint8_t* out) const noexcept {
  each_key(keys, [&](size_t i, const auto& counters) { out[i] = static_cast<uint8_t>(counters.least()); });
}

void CountingBloomFilter::check(std::span<const uint64_t> keys, bool* out) const noexcept {
  each_key(keys, [&](size_t i, const auto& counters) { out[i] = counters.least() >= settings_.count; });
}

double CountingBloomFilter::fill() const noexcept {
  return static_cast<double>(nonzero_) / static_cast<double>(memory_.size() * 2);
}

double CountingBloomFilter::distinct_keys() const noexcept {
  // A line has Poisson many keys; each leaves a given counter alone with (127/128)^counters_per_line.
  const double counters = static_cast<double>(memory_.size()) * 2;
  const double zeros = std::max(counters - static_cast<double>(nonzero_), 0.5);
  const double missed = 1.0 - std::pow(1.0 - 1.0 / kLineCounters, layout_.counters_per_line);
  return counters / kLineCounters / 2 * std::log(counters / zeros) / missed;
}

double CountingBloomFilter::estimated_fpr() const noexcept {
  // A key never added has any two different lines of any page, and in each of them counters drawn one by one.
  std::array<double, kLineCounters + 1> hit;
  for (size_t filled = 0; filled <= kLineCounters; ++filled)
    hit[filled] = nth_power(static_cast<double>(filled) / kLineCounters, layout_.counters_per_line);
  double sum = 0.0;
  for (uint64_t page = 0; page < layout_.pages; ++page) {
    const auto* word = reinterpret_cast<const uint64_t*>(memory_.data() + page * kPageBytes);
    double hits = 0.0, squares = 0.0;
    for (size_t line = 0; line < kPageLines; ++line) {
      uint32_t filled = 0;
      for (size_t i = 0; i < kLineWords; ++i) filled += count_at_least(load(*word++), settings_.count);
      hits += hit[filled];
      squares += hit[filled] * hit[filled];
    }
    sum += (hits * hits - squares) / (kPageLines * (kPageLines - 1));
  }
  return sum / static_cast<double>(layout_.pages);
}

// ------------------------------------------------------------------ chunks

std::span<uint64_t> CountingBloomFilter::words_of(size_t chunk) const noexcept {
  return {reinterpret_cast<uint64_t*>(memory_.data() + chunk * kChunkBytes), chunk_bytes(chunk) / 8};
}

uint64_t CountingBloomFilter::nonzero_of(size_t chunk) const noexcept {
  uint64_t nonzero = 0;
  for (const uint64_t& word : words_of(chunk)) nonzero += count_nonzero(load(word));
  return nonzero;
}

void CountingBloomFilter::load_chunk(size_t index, Bytes bytes) noexcept {
  nonzero_ -= nonzero_of(index);
  std::memcpy(memory_.data() + index * kChunkBytes, bytes.data(), chunk_bytes(index));
  nonzero_ += nonzero_of(index);
}

std::vector<bool> CountingBloomFilter::begin_cut(std::function<void(size_t index)> before_change) {
  std::vector<bool> changed(changed_.begin(), changed_.end());
  std::fill(changed_.begin(), changed_.end(), uint8_t{0});
  before_change_ = std::move(before_change);
  return changed;
}

}  // namespace damo
