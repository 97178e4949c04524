// Reads extents of files into memory, as fast as the disk delivers them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "open_file.h"
#include "read_plan.h"

namespace llfast {

// A file ends before an extent does.
class UnexpectedEnd : public std::runtime_error {
 public:
  UnexpectedEnd(const std::string& path, std::int64_t end, std::int64_t expected);
};

// Somebody called FileReader::cancel.
class Cancelled : public std::runtime_error {
 public:
  Cancelled() : std::runtime_error("the reader was cancelled") {}
};

struct ReadStatistics {
  std::int64_t bytes;         // that were asked for
  std::int64_t read_bytes;    // that came from the disk, in whole blocks where it was direct
  std::int64_t cached_bytes;  // that came from the page cache
  double seconds;             // on the wall
};

// Holds files open. What the page cache has is copied from there; everything else is read past it,
// so that weights that are used once push nothing out of it.
//
// Several threads may read at once.
class FileReader {
 public:
  // A cold file of 3 GB on a virtual disk and two cores, in GB/s (dd with O_DIRECT: 1.0): 2.4 with
  // one thread, 2.5 with two, 2.8 with four and eight, 2.6 with sixteen, all in 8 MiB; with eight
  // threads 2.4 in 1 MiB, 2.7 in 4 or 16 MiB.
  struct Options {
    int threads;
    std::int64_t chunk_bytes;  // the most that one read asks for, in whole blocks
    bool direct;               // whether to go past the page cache where the file system can
  };

  FileReader(const std::vector<std::string>& paths, const Options& options);

  // Writes each extent's bytes to its destination in memory, and nothing else. Extents may overlap
  // in a file; what overlaps in memory gets the bytes of any of them. Nothing if `interrupted`,
  // which is called in the calling thread only, says so between two reads.
  std::optional<ReadStatistics> read(std::byte* memory, std::int64_t memory_bytes,
                                     std::vector<Extent> extents,
                                     const std::function<bool()>& interrupted);

  // Has all reads, those that run and those to come, throw Cancelled.
  void cancel() { cancelled_ = true; }

  // The first path whose file is not what it was when opened, or "".
  std::string changed() const;

 private:
  void check(const std::vector<Extent>& extents, std::int64_t memory_bytes) const;

  Options options_;
  std::deque<OpenFile> files_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace llfast
