#include "read_plan.h"

#include <algorithm>
#include <tuple>

#include "open_file.h"

namespace llfast {
namespace {

bool comes_before(const Extent& a, const Extent& b) {
  return std::tie(a.file, a.offset, a.destination) < std::tie(b.file, b.offset, b.destination);
}

// Makes one of extents that follow each other in the file and in memory, too.
void join_neighbours(std::vector<Extent>& extents) {
  std::size_t kept = 0;
  for (const Extent& extent : extents) {
    if (kept > 0) {
      Extent& last = extents[kept - 1];
      if (last.file == extent.file && last.end() == extent.offset &&
          last.destination + last.size == extent.destination) {
        last.size += extent.size;
        continue;
      }
    }
    extents[kept++] = extent;
  }
  extents.resize(kept);
}

}  // namespace

ReadPlan plan_reads(std::vector<Extent> extents, std::int64_t chunk_bytes) {
  extents.erase(std::remove_if(extents.begin(), extents.end(),
                               [](const Extent& extent) { return extent.size == 0; }),
                extents.end());
  if (!std::is_sorted(extents.begin(), extents.end(), comes_before)) {
    std::sort(extents.begin(), extents.end(), comes_before);
  }
  join_neighbours(extents);

  ReadPlan plan;
  bool open = false;  // whether the last task takes more pieces
  std::int64_t begin = 0;
  std::int64_t end = 0;
  const auto fits = [&](std::int64_t from, std::int64_t to) {
    return block_ceil(to) - block_floor(from) <= chunk_bytes;
  };
  for (const Extent& extent : extents) {
    const bool small = extent.size <= kSmallExtent && fits(extent.offset, extent.end());
    if (small && open && plan.pieces.back().file == extent.file && extent.offset - end <= kGap &&
        fits(begin, extent.end())) {
      plan.pieces.push_back(extent);
      end = std::max(end, extent.end());
      continue;
    }
    for (std::int64_t offset = extent.offset; offset < extent.end();) {
      const std::int64_t next = std::min(extent.end(), block_floor(offset) + chunk_bytes);
      plan.tasks.push_back(plan.pieces.size());
      plan.pieces.push_back(
          {extent.file, offset, next - offset, extent.destination + offset - extent.offset});
      offset = next;
    }
    open = small;
    begin = extent.offset;
    end = extent.end();
  }
  plan.tasks.push_back(plan.pieces.size());
  return plan;
}

}  // namespace llfast
