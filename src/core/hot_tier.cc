// SPDX-License-Identifier: Apache-2.0
#include "hot_tier.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "error.h"

namespace damo {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMinEntries = 64;

// Fresh zeroed pages; huge ones where the system gives them; absent in forked children, whose
// copy would double the memory and whose handle is refused anyway.
std::byte* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED)
    throw StorageError("[memory] could not reserve " + std::to_string(bytes) +
                       " bytes of address space: choose a smaller memory budget or raise the process's limit");
  madvise(pages, bytes, MADV_DONTFORK);
  if (bytes >= kHugePage) madvise(pages, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(pages);
}

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

HotTier::HotTier(size_t bytes, size_t num_shards) : bytes_(bytes), shards_(num_shards) {
  shard_bits_ = static_cast<unsigned>(std::countr_zero(num_shards));
  // Some hundred slabs, so that a size that comes late finds one to take; whole huge pages when large.
  slab_bytes_ = std::clamp(std::bit_floor(bytes / 128), size_t{128} << 10, kHugePage);
  while (bytes_ > (size_t{1} << (31 + granularity_bits_))) ++granularity_bits_;
  const size_t num_slabs = std::max<size_t>(bytes / slab_bytes_, 1);
  reserved_bytes_ = num_slabs * slab_bytes_ + kHugePage;
  reserved_ = map_pages(reserved_bytes_);
  arena_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(reserved_), kHugePage));
  slabs_.resize(num_slabs);
  free_slabs_.resize(num_slabs);
  for (size_t i = 0; i < num_slabs; ++i) free_slabs_[i] = static_cast<uint32_t>(num_slabs - 1 - i);
  for (Shard& shard : shards_) {
    shard.entries = reinterpret_cast<uint64_t*>(map_pages(kMinEntries * sizeof(uint64_t)));
    shard.mask = kMinEntries - 1;
    index_bytes_ += kMinEntries * sizeof(uint64_t);
  }
}

HotTier::~HotTier() {
  for (Shard& shard : shards_)
    if (shard.entries != nullptr) munmap(shard.entries, (size_t{shard.mask} + 1) * sizeof(uint64_t));
  if (reserved_ != nullptr) munmap(reserved_, reserved_bytes_);
}

Slot HotTier::find(const Shard& shard, uint32_t table_id, uint64_t mixed) const noexcept {
  const uint32_t print = fingerprint(table_id, mixed);
  for (uint32_t at = print & shard.mask;; at = (at + 1) & shard.mask) {
    const uint64_t entry = shard.entries[at];
    if (entry == 0) return kNoSlot;
    if (static_cast<uint32_t>(entry >> 32) != print) continue;
    const Slot slot = static_cast<Slot>(entry);
    const HotRow* candidate = row(slot);
    if (candidate->mixed == mixed && candidate->table_id == table_id) return slot;
  }
}

bool HotTier::holds(Slot slot, uint32_t table_id, uint64_t mixed) const noexcept {
  if (slot == kNoSlot) return false;
  const size_t offset = static_cast<size_t>(slot - 1) << granularity_bits_;
  if (offset >= slabs_.size() * slab_bytes_) return false;
  const Slab& slab = slabs_[offset / slab_bytes_];
  const size_t within = offset % slab_bytes_;
  if (slab.slot_bytes == 0 || within % slab.slot_bytes != 0) return false;
  const size_t index = within / slab.slot_bytes;
  if (index >= slab.num_slots || (slab.used_bits[index / 64] >> (index % 64) & 1) == 0) return false;
  const HotRow* candidate = row(slot);
  // Pending first: the rest of such a row is its owner's, who may be writing it.
  return !candidate->has(HotRow::kPending) && candidate->mixed == mixed && candidate->table_id == table_id;
}

void HotTier::reserve_entries(Shard& shard, size_t count) {
  const size_t capacity = size_t{shard.mask} + 1;
  size_t wanted = capacity;
  while ((shard.size + count) * 4 > wanted * 3) wanted *= 2;
  if (wanted == capacity) return;
  const size_t old_bytes = capacity * sizeof(uint64_t), new_bytes = wanted * sizeof(uint64_t);
  auto* entries = reinterpret_cast<uint64_t*>(map_pages(new_bytes));
  const uint32_t mask = static_cast<uint32_t>(wanted - 1);
  for (size_t i = 0; i < capacity; ++i) {
    const uint64_t entry = shard.entries[i];
    if (entry == 0) continue;
    uint32_t at = static_cast<uint32_t>(entry >> 32) & mask;
    while (entries[at] != 0) at = (at + 1) & mask;
    entries[at] = entry;
  }
  munmap(shard.entries, old_bytes);
  shard.entries = entries;
  shard.mask = mask;
  index_bytes_ += new_bytes - old_bytes;
}

void HotTier::insert(Shard& shard, Slot slot) noexcept {
  const HotRow* added = row(slot);
  const uint32_t print = fingerprint(added->table_id, added->mixed);
  uint32_t at = print & shard.mask;
  while (shard.entries[at] != 0) at = (at + 1) & shard.mask;
  shard.entries[at] = uint64_t{print} << 32 | slot;
  ++shard.size;
}

void HotTier::remove(Shard& shard, Slot slot) noexcept {
  const HotRow* gone = row(slot);
  const uint64_t entry = uint64_t{fingerprint(gone->table_id, gone->mixed)} << 32 | slot;
  uint32_t at = static_cast<uint32_t>(entry >> 32) & shard.mask;
  while (shard.entries[at] != entry) at = (at + 1) & shard.mask;
  // Close the gap: an entry moves back unless that would put it before its home.
  for (uint32_t next = (at + 1) & shard.mask; shard.entries[next] != 0; next = (next + 1) & shard.mask) {
    const uint32_t home = static_cast<uint32_t>(shard.entries[next] >> 32) & shard.mask;
    if (((next - home) & shard.mask) < ((next - at) & shard.mask)) continue;
    shard.entries[at] = shard.entries[next];
    at = next;
  }
  shard.entries[at] = 0;
  --shard.size;
}

size_t HotTier::slot_bytes(size_t num_floats) const noexcept {
  return round_up(sizeof(HotRow) + num_floats * sizeof(float), size_t{1} << granularity_bits_);
}

size_t HotTier::slab_limit() const noexcept {
  const size_t bytes = bytes_;
  return bytes > index_bytes_ ? std::min((bytes - index_bytes_) / slab_bytes_, slabs_.size()) : 0;
}

HotTier::SizeClass& HotTier::size_class(size_t slot_bytes) {
  for (SizeClass& known : classes_)
    if (known.slot_bytes == slot_bytes) return known;
  SizeClass wanted{.slot_bytes = static_cast<uint32_t>(slot_bytes), .free_slots = 0, .partial = {}};
  wanted.partial.reserve(slabs_.size());  // or free() would ask for memory
  classes_.push_back(std::move(wanted));
  return classes_.back();
}

const HotTier::SizeClass* HotTier::find_size_class(size_t slot_bytes) const noexcept {
  for (const SizeClass& known : classes_)
    if (known.slot_bytes == slot_bytes) return &known;
  return nullptr;
}

size_t HotTier::allocate(size_t slot_bytes, size_t count, std::vector<Slot>& out) {
  SizeClass& wanted = size_class(slot_bytes);
  out.reserve(out.size() + count);
  size_t made = 0;
  while (made < count) {
    if (wanted.partial.empty()) {
      if (free_slabs_.empty() || used_slabs_ >= slab_limit()) break;
      const uint32_t taken = free_slabs_.back();
      Slab& slab = slabs_[taken];
      slab.num_slots = static_cast<uint32_t>(slab_bytes_ / slot_bytes);
      slab.used_bits.assign((slab.num_slots + 63) / 64, 0);
      wanted.partial.push_back(taken);
      free_slabs_.pop_back();
      slab.slot_bytes = static_cast<uint32_t>(slot_bytes);
      slab.used = 0;
      slab.search_from = 0;
      slab.in_partial = true;
      wanted.free_slots += slab.num_slots;
      ++used_slabs_;
    }
    const uint32_t slab_number = wanted.partial.back();
    Slab& slab = slabs_[slab_number];
    for (size_t word = slab.search_from; word < slab.used_bits.size() && made < count; ++word) {
      const size_t in_word = std::min<size_t>(64, slab.num_slots - word * 64);
      const uint64_t valid = in_word == 64 ? ~uint64_t{0} : (uint64_t{1} << in_word) - 1;
      uint64_t free_bits = ~slab.used_bits[word] & valid;
      while (free_bits != 0 && made < count) {
        const auto bit = static_cast<size_t>(__builtin_ctzll(free_bits));
        free_bits &= free_bits - 1;
        slab.used_bits[word] |= uint64_t{1} << bit;
        ++slab.used;
        ++made;
        --wanted.free_slots;
        const Slot slot = slot_at(slab_number, word * 64 + bit);
        HotRow* fresh = row(slot);
        fresh->flags = HotRow::kPending;
        fresh->referenced.store(0, std::memory_order_relaxed);
        out.push_back(slot);
      }
      slab.search_from = static_cast<uint32_t>(free_bits == 0 ? word + 1 : word);
    }
    if (slab.used == slab.num_slots) {
      slab.in_partial = false;
      wanted.partial.pop_back();
    }
  }
  return made;
}

void HotTier::free(Slot slot) noexcept {
  const size_t offset = static_cast<size_t>(slot - 1) << granularity_bits_;
  const size_t slab_number = offset / slab_bytes_;
  Slab& slab = slabs_[slab_number];
  const size_t index = offset % slab_bytes_ / slab.slot_bytes;
  slab.used_bits[index / 64] &= ~(uint64_t{1} << (index % 64));
  slab.search_from = std::min(slab.search_from, static_cast<uint32_t>(index / 64));
  --slab.used;
  SizeClass* owner = nullptr;
  for (SizeClass& known : classes_)
    if (known.slot_bytes == slab.slot_bytes) owner = &known;
  ++owner->free_slots;
  if (!slab.in_partial) {
    slab.in_partial = true;
    owner->partial.push_back(static_cast<uint32_t>(slab_number));  // has room for all
  }
  if (slab.used == 0) {
    // An empty slab goes back at once: any size may need it.
    std::erase(owner->partial, static_cast<uint32_t>(slab_number));
    owner->free_slots -= slab.num_slots;
    slab = Slab{};
    --used_slabs_;
    free_slabs_.push_back(static_cast<uint32_t>(slab_number));
  }
}

size_t HotTier::available(size_t slot_bytes) const noexcept {
  const SizeClass* known = find_size_class(slot_bytes);
  const size_t limit = slab_limit();
  const size_t slabs = limit > used_slabs_ ? std::min(limit - used_slabs_, free_slabs_.size()) : 0;
  return (known != nullptr ? known->free_slots : 0) + slabs * (slab_bytes_ / slot_bytes);
}

size_t HotTier::capacity(size_t slot_bytes) const noexcept {
  // An entry costs 8 bytes at a load between 3/8 and 3/4.
  const size_t slabs = std::max<size_t>(bytes_ * slot_bytes / (slot_bytes + 20) / slab_bytes_, 1);
  return slabs * (slab_bytes_ / slot_bytes);
}

size_t HotTier::slabs_of(size_t slot_bytes) const noexcept {
  size_t count = 0;
  for (const Slab& slab : slabs_) count += slab.slot_bytes == slot_bytes;
  return count;
}

size_t HotTier::sizes_in_use() const noexcept {
  size_t count = 0;
  for (const SizeClass& known : classes_) count += slabs_of(known.slot_bytes) > 0;
  return count;
}

std::optional<size_t> HotTier::slab_to_take(size_t except_slot_bytes) const noexcept {
  size_t largest = 0, most = 0;
  for (const SizeClass& known : classes_) {
    const size_t count = known.slot_bytes == except_slot_bytes ? 0 : slabs_of(known.slot_bytes);
    if (count > most) {
      most = count;
      largest = known.slot_bytes;
    }
  }
  std::optional<size_t> emptiest;
  for (size_t s = 0; most > 0 && s < slabs_.size(); ++s)
    if (slabs_[s].slot_bytes == largest && (!emptiest || slabs_[s].used < slabs_[*emptiest].used)) emptiest = s;
  return emptiest;
}

size_t HotTier::rows() const noexcept {
  size_t total = 0;
  for (const Shard& shard : shards_) total += shard.size;
  return total;
}

}  // namespace damo
