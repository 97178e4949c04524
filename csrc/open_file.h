// One file that is read in extents: through the page cache, or past it in whole blocks.
#pragma once

#include <sys/stat.h>
#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>

namespace llfast {

// What O_DIRECT has offsets, sizes and addresses be multiples of. Devices may ask for less.
constexpr std::int64_t kBlock = 4096;

constexpr std::int64_t block_floor(std::int64_t offset) { return offset / kBlock * kBlock; }
constexpr std::int64_t block_ceil(std::int64_t offset) { return block_floor(offset + kBlock - 1); }

// The system refused something about a file.
class FileError : public std::system_error {
 public:
  // `place` is added to what the system says: " at byte 5".
  FileError(int error, const std::string& path, const std::string& place = "");

  const std::string& path() const { return path_; }
  const std::string& text() const { return text_; }

 private:
  std::string path_;
  std::string text_;
};

// Closes what it owns.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();

  int number() const { return number_; }

 private:
  int number_;
};

// Says which part of a file is in the page cache, without reading any of it.
//
// It asks mincore(2), for 10 us per MiB that is not there and 15 us per MiB that is (which then
// takes 130 us to copy). preadv2 with RWF_NOWAIT would tell as well, but starts to read ahead what
// it does not find: in a cold file, read in 8 MiB, that had the disk deliver each byte twice and
// brought 1.09 GB/s down to 0.9.
class CachedPages {
 public:
  CachedPages(int descriptor, std::int64_t file_bytes);
  CachedPages(const CachedPages&) = delete;
  CachedPages& operator=(const CachedPages&) = delete;
  ~CachedPages();

  // Whether all of [offset, offset + size) is there; false where the system does not say, which it
  // does to those only who own the file or may write to it. At most kAtOnce bytes.
  bool hold(std::int64_t offset, std::int64_t size) const;

  static constexpr std::int64_t kAtOnce = 1 << 20;

 private:
  std::int64_t page_bytes_;
  std::int64_t known_bytes_;  // from the beginning of the file
  std::size_t map_bytes_;
  std::byte* map_;  // never touched; null if there is none
};

// Open for as long as the object lives. All reads may run in several threads at once, and each
// returns how many bytes came: less than asked for only where the file ends.
class OpenFile {
 public:
  OpenFile(std::string path, bool direct);

  const std::string& path() const { return path_; }

  // The size now.
  std::int64_t size() const;

  // Whether the path now leads to another file, one that was written to, or nowhere.
  bool changed() const;

  // As many bytes as are in the page cache from `offset` on; stops at the first that are not.
  std::int64_t read_cached(std::byte* to, std::int64_t offset, std::int64_t size) const;

  // Through the page cache.
  std::int64_t read_buffered(std::byte* to, std::int64_t offset, std::int64_t size) const;

  // Whether the page cache can be gone past.
  bool direct() const { return direct_works_; }

  // Past the page cache, into up to kMaxParts parts one after the other; stops after `wanted` bytes
  // or more. Offset, addresses and sizes are whole blocks. Nothing if the file refuses.
  std::optional<std::int64_t> read_direct(const iovec* parts, int count, std::int64_t offset,
                                          std::int64_t wanted);

  static constexpr int kMaxParts = 3;

 private:
  [[noreturn]] void fail(int error, std::int64_t offset) const;

  std::string path_;
  Descriptor buffered_;
  Descriptor direct_;
  struct stat opened_;
  CachedPages cached_pages_;
  std::atomic<bool> direct_works_;
};

}  // namespace llfast
