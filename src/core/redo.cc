// SPDX-License-Identifier: Apache-2.0
//
// Redo: at open, the log's records are done again, in order. A record changes a row only when the row's own sequence
// number is older, so it does not matter how much of it had reached the cold tier. Needs the log, the manifest and the
// filters' files alone: the numbers of an update are in its record.
#include <set>

#include "error.h"
#include "planted.h"
#include "storage.h"

namespace damo {

void Storage::redo(const LogRecord& record) {
  ++redone_records_;
  redo_sequence_ = record.sequence;
  ByteReader body(record.body, record.source, record.offset);
  std::vector<uint64_t> keys;
  // None for a table that was dropped since: the manifest knows it no more.
  const auto table_of = [&](uint32_t table_id) {
    Table* table = table_by_id(table_id);
    if (table == nullptr && table_id >= next_table_id_)
      body.corrupt("it names table " + std::to_string(table_id) + ", which the manifest has never known");
    return table;
  };
  switch (record.type) {
    case RecordType::kApply: {
      const ApplyRecord apply = decode_apply(body, keys);
      clock_ = std::max(clock_.load(), apply.time);
      if (Table* table = table_of(apply.table_id))
        table->redo_apply(record.sequence, apply, record.source, record.offset);
      return;
    }
    case RecordType::kApplyTogether: {
      std::set<uint32_t> named;
      for (ByteReader& part : decode_together(body)) {
        const ApplyRecord apply = decode_apply(part, keys);
        clock_ = std::max(clock_.load(), apply.time);
        // The second would be passed over, as what is in the rows already.
        if (!named.insert(apply.table_id).second)
          body.corrupt("it names table " + std::to_string(apply.table_id) + " twice");
        if (planted("redo of the first group alone") && named.size() > 1) continue;
        if (Table* table = table_of(apply.table_id))
          table->redo_apply(record.sequence, apply, record.source, record.offset);
      }
      return;
    }
    case RecordType::kInsert: {
      const KeysRecord insert = decode_keys(body, keys);
      clock_ = std::max(clock_.load(), insert.time);
      if (Table* table = table_of(insert.table_id)) table->redo_insert(record.sequence, insert);
      return;
    }
    case RecordType::kErase: {
      const KeysRecord erase = decode_keys(body, keys);
      clock_ = std::max(clock_.load(), erase.time);
      if (Table* table = table_of(erase.table_id)) table->redo_erase(record.sequence, erase);
      return;
    }
    case RecordType::kCount: {
      const CountRecord count = decode_count(body, keys);
      clock_ = std::max(clock_.load(), count.time);
      if (Table* table = table_of(count.table_id))
        table->redo_count(record.sequence, count, record.source, record.offset);
      return;
    }
    case RecordType::kImport: {
      const ImportRecord import = decode_import(body, keys);
      clock_ = std::max(clock_.load(), import.time);
      if (Table* table = table_of(import.table_id))
        table->redo_import(record.sequence, import, record.source, record.offset);
      return;
    }
    case RecordType::kExpire:
      if (!planted("expire not redone")) clock_ = std::max(clock_.load(), decode_expire(body).time);
      return;
    case RecordType::kCommit:
      last_commit_ = decode_commit(body);
      return;
  }
  throw NewerVersionError("[open] " + record.source + " has a record of type " +
                          std::to_string(static_cast<int>(record.type)) + " at offset " +
                          std::to_string(record.offset) + ", written by a newer version: upgrade damo-embedding");
}

}  // namespace damo
