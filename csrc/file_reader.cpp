#include "file_reader.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "aligned_memory.h"
#include "parallel.h"

namespace llfast {
namespace {

struct Totals {
  std::atomic<std::int64_t> read_bytes{0};
  std::atomic<std::int64_t> cached_bytes{0};
};

std::size_t as_size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

// What one thread reads with.
class TaskReader {
 public:
  TaskReader(std::deque<OpenFile>& files, const ReadPlan& plan, std::byte* memory,
             std::int64_t chunk_bytes, Totals& totals)
      : files_(files), plan_(plan), memory_(memory), chunk_bytes_(chunk_bytes), totals_(totals) {}

  void read(std::size_t task) {
    const Extent* first = &plan_.pieces[plan_.tasks[task]];
    const Extent* const last = first + (plan_.tasks[task + 1] - plan_.tasks[task]);
    const OpenFile& file = files_[as_size(first->file)];
    std::int64_t cached = 0;
    for (; first != last; ++first) {
      cached = file.read_cached(memory_ + first->destination, first->offset, first->size);
      totals_.cached_bytes += cached;
      if (cached < first->size) break;
    }
    if (first == last) return;
    if (last - first > 1) {
      read_scattered(first, last);
      return;
    }
    const Extent rest{first->file, first->offset + cached, first->size - cached,
                      first->destination + cached};
    if (!read_in_place(rest)) read_scattered(&rest, &rest + 1);
  }

 private:
  static constexpr std::int64_t kEndBlocks = 2 * kBlock;

  // Whole blocks go where they belong, the rest of the first and of the last block beside them into
  // the bounce buffer, all in one call. False if the extent does not lie in memory as its blocks
  // do, or has no whole block.
  bool read_in_place(const Extent& extent) {
    std::byte* const to = memory_ + extent.destination;
    const std::int64_t begin = block_ceil(extent.offset);  // of the whole blocks
    const std::int64_t end = block_floor(extent.end());
    std::byte* const whole = to + (begin - extent.offset);
    if (!files_[as_size(extent.file)].direct() || begin >= end) return false;
    if (reinterpret_cast<std::uintptr_t>(whole) % kBlock != 0) return false;
    const std::int64_t head = begin - extent.offset;
    const std::int64_t tail = extent.end() - end;
    std::byte* const head_block = bounce();  // no memory until it is written to
    std::byte* const tail_block = head_block + kBlock;
    std::array<iovec, OpenFile::kMaxParts> parts{};
    int count = 0;
    const auto add = [&](std::byte* part, std::int64_t bytes) {
      parts[static_cast<std::size_t>(count++)] = {part, as_size(bytes)};
    };
    if (head > 0) add(head_block, kBlock);
    add(whole, end - begin);
    if (tail > 0) add(tail_block, kBlock);
    const std::int64_t from = block_floor(extent.offset);
    if (!read_blocks(extent.file, parts.data(), count, from, extent.end())) return false;
    if (head > 0) std::memcpy(to, head_block + (kBlock - head), as_size(head));
    if (tail > 0) std::memcpy(to + (end - extent.offset), tail_block, as_size(tail));
    return true;
  }

  // All blocks of the pieces and between them go into the bounce buffer, the pieces from there to
  // their places; without direct reads each piece is read by itself.
  void read_scattered(const Extent* first, const Extent* last) {
    const OpenFile& file = files_[as_size(first->file)];
    std::int64_t end = 0;
    for (const Extent* piece = first; piece != last; ++piece) end = std::max(end, piece->end());
    const std::int64_t begin = block_floor(first->offset);
    bool direct = file.direct();
    if (direct) {
      const iovec cover{bounce(), as_size(block_ceil(end) - begin)};
      direct = read_blocks(first->file, &cover, 1, begin, end);
    }
    for (const Extent* piece = first; piece != last; ++piece) {
      std::byte* const to = memory_ + piece->destination;
      if (direct) {
        std::memcpy(to, bounce() + (piece->offset - begin), as_size(piece->size));
      } else {
        const std::int64_t came = file.read_buffered(to, piece->offset, piece->size);
        totals_.read_bytes += came;
        if (came < piece->size) throw too_short(piece->file, piece->offset + came);
      }
    }
  }

  // Reads up to byte `end` of the file and a bit further. False if the file refuses.
  bool read_blocks(std::int64_t file, const iovec* parts, int count, std::int64_t begin,
                   std::int64_t end) {
    const auto came = files_[as_size(file)].read_direct(parts, count, begin, end - begin);
    if (!came) return false;
    totals_.read_bytes += *came;
    if (*came < end - begin) throw too_short(file, begin + *came);
    return true;
  }

  UnexpectedEnd too_short(std::int64_t number, std::int64_t end) const {
    const OpenFile& file = files_[as_size(number)];
    std::int64_t expected = 0;
    for (const Extent& piece : plan_.pieces) {
      if (piece.file == number) expected = std::max(expected, piece.end());
    }
    return {file.path(), std::min(end, file.size()), expected};
  }

  // There is none until it is needed. Nothing covers more than a chunk.
  std::byte* bounce() {
    if (!bounce_) {
      bounce_ = std::make_unique<AlignedMemory>(std::max(chunk_bytes_, kEndBlocks));
    }
    return bounce_->data();
  }

  std::deque<OpenFile>& files_;
  const ReadPlan& plan_;
  std::byte* memory_;
  std::int64_t chunk_bytes_;
  Totals& totals_;
  std::unique_ptr<AlignedMemory> bounce_;
};

}  // namespace

UnexpectedEnd::UnexpectedEnd(const std::string& path, std::int64_t end, std::int64_t expected)
    : std::runtime_error(path + " ends at byte " + std::to_string(end) + ", where " +
                         std::to_string(expected) + " were expected") {}

FileReader::FileReader(const std::vector<std::string>& paths, const Options& options)
    : options_(options) {
  if (options.threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " +
                                std::to_string(options.threads));
  }
  if (options.chunk_bytes < kBlock || options.chunk_bytes % kBlock != 0) {
    throw std::invalid_argument("chunk_bytes must be a multiple of 4096, got " +
                                std::to_string(options.chunk_bytes));
  }
  for (const std::string& path : paths) files_.emplace_back(path, options.direct);
}

std::optional<ReadStatistics> FileReader::read(std::byte* memory, std::int64_t memory_bytes,
                                               std::vector<Extent> extents,
                                               const std::function<bool()>& interrupted) {
  const auto start = std::chrono::steady_clock::now();
  check(extents, memory_bytes);
  if (cancelled_) throw Cancelled();
  std::int64_t bytes = 0;
  for (const Extent& extent : extents) bytes += extent.size;
  const ReadPlan plan = plan_reads(std::move(extents), options_.chunk_bytes);
  Totals totals;
  const auto make_worker = [&]() -> Worker {
    // Shared because a Worker can be copied.
    const auto reader =
        std::make_shared<TaskReader>(files_, plan, memory, options_.chunk_bytes, totals);
    return [this, reader](std::int64_t task) {
      if (cancelled_) throw Cancelled();
      reader->read(static_cast<std::size_t>(task));
    };
  };
  const auto tasks = static_cast<std::int64_t>(plan.tasks.size()) - 1;
  const bool finished = run_tasks(tasks, options_.threads, Helpers::kNew, make_worker, interrupted);
  if (!finished) return std::nullopt;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return ReadStatistics{bytes, totals.read_bytes, totals.cached_bytes, elapsed.count()};
}

std::string FileReader::changed() const {
  const auto found = std::find_if(files_.begin(), files_.end(),
                                  [](const OpenFile& file) { return file.changed(); });
  return found == files_.end() ? "" : found->path();
}

void FileReader::check(const std::vector<Extent>& extents, std::int64_t memory_bytes) const {
  constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max() - kBlock;
  for (std::size_t i = 0; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    const std::string name = "extent " + std::to_string(i);
    if (extent.file < 0 || as_size(extent.file) >= files_.size()) {
      throw std::invalid_argument(name + " must be of one of " + std::to_string(files_.size()) +
                                  " files, got number " + std::to_string(extent.file));
    }
    if (extent.offset < 0 || extent.size < 0 || extent.size > kLast - extent.offset) {
      throw std::invalid_argument(name + " must lie in a file, got offset " +
                                  std::to_string(extent.offset) + " and size " +
                                  std::to_string(extent.size));
    }
    if (extent.destination < 0 || extent.size > memory_bytes - extent.destination) {
      throw std::invalid_argument(name + " must go into " + std::to_string(memory_bytes) +
                                  " bytes, got destination " + std::to_string(extent.destination) +
                                  " and size " + std::to_string(extent.size));
    }
  }
}

}  // namespace llfast
