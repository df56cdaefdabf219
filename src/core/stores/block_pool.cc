// SPDX-License-Identifier: Apache-2.0
#include "block_pool.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace damo {

// At the start of each chunk, found from a block by the chunk's alignment.
struct alignas(16) BlockPool::Chunk {
  Chunk* previous;
  Chunk* next;
  Block* free;      // blocks given back
  uint32_t class_;  // block size in steps
  uint32_t used;    // blocks handed out
  uint32_t fresh;   // blocks never handed out begin here
  uint32_t num_blocks;
};

// Before each block; `next` only while the block is free.
struct alignas(16) BlockPool::Block {
  size_t usable_bytes;
  uint64_t is_large;  // from malloc, in no chunk
  Block* next() const { return *reinterpret_cast<Block* const*>(this + 1); }
  void set_next(Block* block) { *reinterpret_cast<Block**>(this + 1) = block; }
};

BlockPool::~BlockPool() {
  for (void* region : regions_) ::munmap(region, (kRegionChunks + 1) * kChunkBytes);
}

void BlockPool::push(Chunk*& list, Chunk* chunk) noexcept {
  chunk->previous = nullptr;
  chunk->next = list;
  if (list != nullptr) list->previous = chunk;
  list = chunk;
}

void BlockPool::remove(Chunk*& list, Chunk* chunk) noexcept {
  if (chunk->previous != nullptr) chunk->previous->next = chunk->next;
  if (chunk->next != nullptr) chunk->next->previous = chunk->previous;
  if (list == chunk) list = chunk->next;
}

void BlockPool::add_region() {
  regions_.reserve(regions_.size() + 1);
  // One chunk more than is used, to align the others.
  void* region = ::mmap(nullptr, (kRegionChunks + 1) * kChunkBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) throw std::bad_alloc();
  regions_.push_back(region);
  const auto first = (reinterpret_cast<uintptr_t>(region) + kChunkBytes - 1) & ~(kChunkBytes - 1);
  for (size_t i = kRegionChunks; i-- > 0;) push(empty_, reinterpret_cast<Chunk*>(first + i * kChunkBytes));
}

void* BlockPool::allocate(size_t bytes) {
  const size_t steps = (bytes + sizeof(Block) + kStep - 1) / kStep;
  if (bytes > kClasses * kStep || steps > kClasses) {
    auto* block = static_cast<Block*>(std::malloc(bytes + sizeof(Block)));
    if (block == nullptr) throw std::bad_alloc();
    block->usable_bytes = bytes;
    block->is_large = 1;
    return block + 1;
  }
  const std::lock_guard lock(mutex_);
  Chunk*& list = with_room_[steps];
  if (list == nullptr) {
    if (empty_ == nullptr) add_region();
    Chunk* chunk = empty_;
    remove(empty_, chunk);
    chunk->free = nullptr;
    chunk->class_ = static_cast<uint32_t>(steps);
    chunk->used = chunk->fresh = 0;
    chunk->num_blocks = static_cast<uint32_t>((kChunkBytes - sizeof(Chunk)) / (steps * kStep));
    push(list, chunk);
  }
  Chunk* chunk = list;
  Block* block = chunk->free;
  if (block != nullptr) {
    chunk->free = block->next();
  } else {
    block = reinterpret_cast<Block*>(reinterpret_cast<std::byte*>(chunk + 1) + chunk->fresh++ * steps * kStep);
  }
  if (++chunk->used == chunk->num_blocks) remove(list, chunk);
  block->usable_bytes = steps * kStep - sizeof(Block);
  block->is_large = 0;
  return block + 1;
}

void BlockPool::free(void* pointer) noexcept {
  if (pointer == nullptr) return;
  Block* block = static_cast<Block*>(pointer) - 1;
  if (block->is_large != 0) {
    std::free(block);
    return;
  }
  auto* chunk = reinterpret_cast<Chunk*>(reinterpret_cast<uintptr_t>(block) & ~(kChunkBytes - 1));
  const std::lock_guard lock(mutex_);
  Chunk*& list = with_room_[chunk->class_];
  block->set_next(chunk->free);
  chunk->free = block;
  if (chunk->used-- == chunk->num_blocks) push(list, chunk);
  if (chunk->used == 0) {
    remove(list, chunk);
    push(empty_, chunk);
  }
}

size_t BlockPool::usable_bytes(const void* block) noexcept {
  return (static_cast<const Block*>(block) - 1)->usable_bytes;
}

size_t BlockPool::system_bytes() const {
  const std::lock_guard lock(mutex_);
  return regions_.size() * kRegionChunks * kChunkBytes;
}

}  // namespace damo
