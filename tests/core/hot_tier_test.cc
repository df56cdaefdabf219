// SPDX-License-Identifier: Apache-2.0
#include "hot_tier.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <unordered_map>
#include <vector>

#include "format.h"

namespace damo {
namespace {

// One slot with a row in it, in the index.
Slot insert(HotTier& tier, size_t slot_bytes, uint32_t table_id, uint64_t mixed) {
  std::vector<Slot> slots;
  if (tier.allocate(slot_bytes, 1, slots) != 1) return kNoSlot;
  HotRow* row = tier.row(slots[0]);
  row->mixed = mixed;
  row->table_id = table_id;
  row->flags = 0;
  HotTier::Shard& shard = tier.shard(tier.shard_of(mixed));
  tier.reserve_entries(shard, 1);
  tier.insert(shard, slots[0]);
  return slots[0];
}

void remove(HotTier& tier, Slot slot) {
  tier.remove(tier.shard(tier.shard_of(tier.row(slot)->mixed)), slot);
  tier.free(slot);
}

Slot find(HotTier& tier, uint32_t table_id, uint64_t mixed) {
  return tier.find(tier.shard(tier.shard_of(mixed)), table_id, mixed);
}

TEST_CASE("hot tier: the index agrees with an unordered_map over random inserts and removals") {
  for (const size_t shards : {1, 8}) {
    HotTier tier(4 << 20, shards);
    const size_t slot_bytes = tier.slot_bytes(4);
    std::unordered_map<uint64_t, Slot> model[2];
    std::mt19937_64 random(shards);
    // Keys whose fingerprints collide on purpose: eight high halves over few low ones. Both tables hold all of them.
    const auto some_key = [&] { return (random() % 8) << 61 | (random() % 700) * 3; };
    bool right = true;
    for (int i = 0; i < 60000; ++i) {
      const auto table = static_cast<uint32_t>(random() % 2);
      const uint64_t key = some_key();
      const auto known = model[table].find(key);
      const Slot found = find(tier, table, key);
      right = right && found == (known == model[table].end() ? kNoSlot : known->second);
      if (known == model[table].end()) {
        model[table][key] = insert(tier, slot_bytes, table, key);
      } else if (random() % 3 != 0) {
        remove(tier, known->second);
        model[table].erase(known);
        right = right && find(tier, table, key) == kNoSlot;
      }
    }
    CHECK(right);
    CHECK(tier.rows() == model[0].size() + model[1].size());
    CHECK(tier.rows() > 1000);
    for (uint32_t table = 0; table < 2; ++table)
      for (const auto& [key, slot] : model[table]) right = right && find(tier, table, key) == slot;
    CHECK(right);
    // To the last one, so that every gap was closed.
    for (uint32_t table = 0; table < 2; ++table)
      for (const auto& [key, slot] : model[table]) remove(tier, slot);
    CHECK(tier.rows() == 0);
    CHECK(tier.available(slot_bytes) > 0);
  }
}

TEST_CASE("hot tier: guess never misses a row that is there, and is none where no fingerprint is alike") {
  HotTier tier(2 << 20, 4);
  const size_t slot_bytes = tier.slot_bytes(1);
  std::mt19937_64 random(5);
  std::vector<uint64_t> keys;
  for (int i = 0; i < 5000; ++i) {
    keys.push_back(random());
    insert(tier, slot_bytes, 1, keys.back());
  }
  size_t exact = 0;
  for (const uint64_t key : keys) {
    const Slot slot = tier.guess(tier.shard(tier.shard_of(key)), HotTier::fingerprint(1, key));
    REQUIRE(slot != kNoSlot);
    exact += tier.row(slot)->mixed == key;
  }
  CHECK(exact > keys.size() - 10);
}

TEST_CASE("hot tier: allocated slots are distinct, do not overlap, and are pending") {
  HotTier tier(2 << 20, 1);
  const size_t slot_bytes = tier.slot_bytes(13);
  std::vector<Slot> slots;
  const size_t made = tier.allocate(slot_bytes, SIZE_MAX / 64 < 100000 ? 0 : 100000, slots);
  CHECK(made == slots.size());
  CHECK(made < 100000);
  CHECK(tier.available(slot_bytes) == 0);
  CHECK(tier.bytes_in_use() <= tier.bytes());
  CHECK(made * slot_bytes > tier.bytes() * 8 / 10);
  std::vector<std::byte*> at;
  for (const Slot slot : slots) {
    CHECK(tier.row(slot)->has(HotRow::kPending));
    at.push_back(reinterpret_cast<std::byte*>(tier.row(slot)));
    std::fill_n(at.back(), slot_bytes, std::byte{0xff});  // a sanitizer sees a slot beyond the arena
  }
  std::sort(at.begin(), at.end());
  bool apart = true;
  for (size_t i = 1; i < at.size(); ++i) apart = apart && at[i] - at[i - 1] >= static_cast<ptrdiff_t>(slot_bytes);
  CHECK(apart);
}

TEST_CASE("hot tier: slabs serve several sizes, go back when empty and serve another size") {
  HotTier tier(2 << 20, 1);
  const size_t small = tier.slot_bytes(2), large = tier.slot_bytes(1000);
  std::vector<Slot> small_slots;
  tier.allocate(small, 1000000, small_slots);
  CHECK(tier.sizes_in_use() == 1);
  CHECK(tier.available(large) == 0);
  std::vector<Slot> none;
  CHECK(tier.allocate(large, 1, none) == 0);
  CHECK(none.empty());

  // One slab's slots given back: exactly one slab for the other size.
  const size_t slab = tier.slab_to_take(large).value();
  CHECK(tier.slab_slot_bytes(slab) == small);
  std::set<Slot> in_slab;
  tier.for_each_row(slab, [&](Slot slot, const HotRow*) { in_slab.insert(slot); });
  CHECK(in_slab.size() == tier.max_slot_bytes() / small);
  for (const Slot slot : in_slab) tier.free(slot);
  CHECK(tier.slab_slot_bytes(slab) == 0);
  CHECK(tier.available(large) == tier.max_slot_bytes() / large);
  std::vector<Slot> large_slots;
  CHECK(tier.allocate(large, 1000, large_slots) == tier.max_slot_bytes() / large);
  CHECK(tier.sizes_in_use() == 2);
  CHECK(tier.slabs_of(large) == 1);
  CHECK(tier.slab_to_take(small) == slab);
  CHECK(tier.slab_slot_bytes(tier.slab_to_take(large).value()) == small);

  for (const Slot slot : large_slots) tier.free(slot);
  for (const Slot slot : small_slots)
    if (!in_slab.contains(slot)) tier.free(slot);
  CHECK(tier.sizes_in_use() == 0);
  CHECK(tier.slab_to_take(0) == std::nullopt);
  CHECK(tier.available(large) >= tier.max_slot_bytes() / large * (tier.num_slabs() - 1));
}

TEST_CASE("hot tier: slots freed and taken at random are never given twice, and none is lost") {
  HotTier tier(1 << 20, 1);
  const std::vector<size_t> sizes{tier.slot_bytes(1), tier.slot_bytes(30), tier.slot_bytes(333)};
  std::map<Slot, size_t> held;  // slot -> size
  std::vector<Slot> order;
  std::mt19937_64 random(6);
  bool right = true;
  for (int round = 0; round < 3000; ++round) {
    const size_t size = sizes[random() % sizes.size()];
    if (random() % 2 == 0) {
      std::vector<Slot> slots;
      const size_t wanted = random() % 200, before = tier.available(size);
      right = right && tier.allocate(size, wanted, slots) == std::min(wanted, before) &&
              tier.available(size) == before - slots.size();
      for (const Slot slot : slots) {
        right = right && held.emplace(slot, size).second;
        order.push_back(slot);
      }
    } else {
      for (size_t i = random() % 300; i > 0 && !order.empty(); --i) {
        std::swap(order[random() % order.size()], order.back());
        held.erase(order.back());
        tier.free(order.back());
        order.pop_back();
      }
    }
    right = right && tier.bytes_in_use() <= tier.bytes();
  }
  CHECK(right);
  size_t seen = 0;
  for (size_t slab = 0; slab < tier.num_slabs(); ++slab)
    tier.for_each_row(slab, [&](Slot slot, const HotRow*) {
      ++seen;
      right = right && held.contains(slot) && held[slot] == tier.slab_slot_bytes(slab);
    });
  CHECK(right);
  CHECK(seen == held.size());
}

TEST_CASE("hot tier: a hint is believed only while its slot holds this very row") {
  HotTier tier(1 << 20, 2);
  const size_t slot_bytes = tier.slot_bytes(4);
  const Slot slot = insert(tier, slot_bytes, 3, 77);
  CHECK(tier.holds(slot, 3, 77));
  CHECK_FALSE(tier.holds(slot, 4, 77));
  CHECK_FALSE(tier.holds(slot, 3, 78));
  CHECK_FALSE(tier.holds(kNoSlot, 3, 77));
  // Nonsense: between slots, in free slots, in free slabs, beyond the arena.
  for (Slot nonsense = 1; nonsense < 40000; ++nonsense)
    if (nonsense != slot) REQUIRE_FALSE(tier.holds(nonsense, 3, 77));
  for (const Slot nonsense : {Slot{0x7fffffff}, Slot{0x80000000}, ~Slot{0}, ~Slot{0} - 1})
    CHECK_FALSE(tier.holds(nonsense, 3, 77));
  // Stale: the row left, its slot was given to another, or waits for its new owner.
  remove(tier, slot);
  CHECK_FALSE(tier.holds(slot, 3, 77));
  std::vector<Slot> again;
  tier.allocate(slot_bytes, 1, again);
  REQUIRE(again[0] == slot);
  tier.row(slot)->mixed = 77;
  tier.row(slot)->table_id = 3;
  CHECK_FALSE(tier.holds(slot, 3, 77));  // pending
  tier.free(slot);
}

TEST_CASE("hot tier: index and slabs together keep the budget, but for one doubling that is told") {
  HotTier tier(1 << 20, 1);
  const size_t slot_bytes = tier.slot_bytes(0);  // the smallest rows: the index weighs most
  std::mt19937_64 random(7);
  std::vector<Slot> slots;
  size_t over = 0;
  for (size_t i = 0; i < 40000; ++i) {
    const Slot slot = insert(tier, slot_bytes, 1, random());
    if (slot != kNoSlot) {
      slots.push_back(slot);
    } else {
      CHECK(tier.available(slot_bytes) == 0);
      break;
    }
    if (tier.over_budget()) {
      ++over;
      // As the evictor does: rows go until the slabs fit beside the index again.
      while (tier.over_budget()) {
        std::vector<Slot> victims;
        tier.for_each_row(tier.slab_to_take(0).value(), [&](Slot victim, const HotRow*) { victims.push_back(victim); });
        for (const Slot victim : victims) remove(tier, victim);
        std::erase_if(slots, [&](Slot s) { return std::find(victims.begin(), victims.end(), s) != victims.end(); });
      }
    }
    if (!tier.over_budget()) REQUIRE(tier.bytes_in_use() <= tier.bytes());
  }
  CHECK(tier.rows() == slots.size());
  CHECK(tier.rows() > tier.capacity(slot_bytes) * 7 / 10);
  CHECK(over <= 3);
}

TEST_CASE("hot tier: capacity is what really fits, for small and large rows") {
  for (const size_t num_floats : {0, 16, 48, 1000}) {
    HotTier tier(4 << 20, 8);
    const size_t slot_bytes = tier.slot_bytes(num_floats);
    CHECK(slot_bytes >= sizeof(HotRow) + num_floats * 4);
    std::mt19937_64 random(num_floats);
    size_t fitted = 0;
    while (!tier.over_budget() && insert(tier, slot_bytes, 1, random()) != kNoSlot) ++fitted;
    CAPTURE(num_floats);
    CHECK(fitted >= tier.capacity(slot_bytes) * 8 / 10);
    CHECK(fitted <= tier.capacity(slot_bytes) * 12 / 10);
  }
}

}  // namespace
}  // namespace damo
