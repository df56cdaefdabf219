// SPDX-License-Identifier: Apache-2.0
//
// The end of a RocksDB table file: properties block, metaindex block, footer. As RocksDB's BlockBasedTable writes them
// in format_version 5 with XXH3 checksums, as all tables of ours are written:
//
//   ... properties block, trailer; metaindex block, trailer; footer (53 bytes)
//   trailer  u8 compression (0: neither block ever is), u32 checksum: low half of XXH3-64 over the block
//   footer   u8 checksum type (4); varint64 offset and size of the metaindex block, of the index block; zeros to byte
//   41;
//            u32 format_version (5); u64 magic 0x88e241b785f4cff7
//   metaindex: entries of varint32 shared and further bytes of the key, varint32 bytes of the value, key, value;
//            u32 restart points, u32 how many. The value of "rocksdb.properties" is where that block is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace damo {

// Reads up to `size` bytes at `offset` into `into`; fewer only at the end of the file.
using ReadTable = std::function<void(uint64_t offset, size_t size, std::string& into)>;

// CorruptionError, naming `path` and the offsets, unless all three are as they were written. What `read` throws passes.
void check_table_tail(const std::string& path, uint64_t file_bytes, const ReadTable& read);

}  // namespace damo
