// Which reads bring a list of extents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llfast {

// Bytes [offset, offset + size) of a file, and where in memory they go.
struct Extent {
  std::int64_t file;
  std::int64_t offset;
  std::int64_t size;
  std::int64_t destination;

  std::int64_t end() const { return offset + size; }
};

// Extents that are no larger are read together if no more than that is between them.
constexpr std::int64_t kSmallExtent = 128 << 10;
constexpr std::int64_t kGap = 32 << 10;

struct ReadPlan {
  // The extents in pieces, sorted by file and offset.
  std::vector<Extent> pieces;
  // One read is pieces [tasks[i], tasks[i + 1]), all of one file, and covers at most chunk_bytes in
  // whole blocks.
  std::vector<std::size_t> tasks;
};

// `chunk_bytes` is a number of whole blocks.
ReadPlan plan_reads(std::vector<Extent> extents, std::int64_t chunk_bytes);

}  // namespace llfast
