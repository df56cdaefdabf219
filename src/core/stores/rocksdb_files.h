// SPDX-License-Identifier: Apache-2.0
//
// The file system as RocksDB may use it: it opens no table whose end is damaged, deletes no table that its manifest may
// still need, leaves a directory alone that is another store's by now, and changes nothing when it is to read only.
#pragma once

#include <atomic>
#include <memory>

namespace rocksdb {
class FileSystem;
}

namespace damo {

// `forsaken` becomes true when the directory is no longer this store's (Store::forsake); nothing is changed from then
// on.
std::shared_ptr<rocksdb::FileSystem> rocksdb_files(bool read_only, std::shared_ptr<std::atomic<bool>> forsaken);

}  // namespace damo
