#include "open_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

namespace llfast {
namespace {

std::string in_words(int error) { return std::generic_category().message(error); }

int open_or_fail(const std::string& path, int flags) {
  for (;;) {
    // A named pipe without a writer would have us wait; with regular files O_NONBLOCK does nothing.
    const int number = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);
    if (number >= 0) return number;
    if (errno != EINTR) throw FileError(errno, path);
  }
}

// -1 where the file system has no direct reads.
int open_direct(const std::string& path, bool direct) {
  if (!direct) return -1;
  try {
    return open_or_fail(path, O_DIRECT);
  } catch (const FileError& error) {
    if (error.code().value() == EINVAL || error.code().value() == EOPNOTSUPP) return -1;
    throw;
  }
}

struct stat state_of(int descriptor, const std::string& path) {
  struct stat state{};
  if (fstat(descriptor, &state) != 0) throw FileError(errno, path);
  if (S_ISDIR(state.st_mode)) throw FileError(EISDIR, path);
  if (!S_ISREG(state.st_mode)) throw FileError(EINVAL, path, ": not a regular file");
  return state;
}

}  // namespace

FileError::FileError(int error, const std::string& path, const std::string& place)
    : std::system_error(error, std::generic_category(), path + place),
      path_(path),
      text_(in_words(error) + place) {}

Descriptor::~Descriptor() {
  if (number_ >= 0) close(number_);
}

CachedPages::CachedPages(int descriptor, std::int64_t file_bytes)
    : page_bytes_(sysconf(_SC_PAGESIZE)),
      known_bytes_((file_bytes + page_bytes_ - 1) / page_bytes_ * page_bytes_),
      map_bytes_(static_cast<std::size_t>(known_bytes_ + page_bytes_)),
      map_(nullptr) {
  void* const map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_SHARED, descriptor, 0);
  if (map == MAP_FAILED) return;
  map_ = static_cast<std::byte*>(map);
  // To those who may not know it says that every page is there, even the one past the end.
  unsigned char past_end = 1;
  if (mincore(map_ + known_bytes_, 1, &past_end) != 0 || (past_end & 1) != 0) known_bytes_ = 0;
}

CachedPages::~CachedPages() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

bool CachedPages::hold(std::int64_t offset, std::int64_t size) const {
  if (map_ == nullptr || offset + size > known_bytes_) return false;
  const std::int64_t begin = offset / page_bytes_ * page_bytes_;
  const std::int64_t bytes = offset + size - begin;
  const std::int64_t pages = (bytes + page_bytes_ - 1) / page_bytes_;
  std::array<unsigned char, kAtOnce / kBlock + 1> there{};  // no system has smaller pages
  if (mincore(map_ + begin, static_cast<std::size_t>(bytes), there.data()) != 0) return false;
  return std::all_of(there.begin(), there.begin() + pages,
                     [](unsigned char page) { return (page & 1) != 0; });
}

OpenFile::OpenFile(std::string path, bool direct)
    : path_(std::move(path)),
      buffered_(open_or_fail(path_, 0)),
      direct_(open_direct(path_, direct)),
      opened_(state_of(buffered_.number(), path_)),
      cached_pages_(buffered_.number(), opened_.st_size),
      direct_works_(direct_.number() >= 0) {}

std::int64_t OpenFile::size() const { return state_of(buffered_.number(), path_).st_size; }

bool OpenFile::changed() const {
  struct stat now{};
  return stat(path_.c_str(), &now) != 0 || now.st_dev != opened_.st_dev ||
         now.st_ino != opened_.st_ino || now.st_size != opened_.st_size ||
         now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
         now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec;
}

std::int64_t OpenFile::read_cached(std::byte* to, std::int64_t offset, std::int64_t size) const {
  std::int64_t done = 0;
  while (done < size) {
    const std::int64_t step = std::min(CachedPages::kAtOnce, size - done);
    if (!cached_pages_.hold(offset + done, step)) break;
    const std::int64_t came = read_buffered(to + done, offset + done, step);
    done += came;
    if (came < step) break;
  }
  return done;
}

std::int64_t OpenFile::read_buffered(std::byte* to, std::int64_t offset, std::int64_t size) const {
  std::int64_t done = 0;
  while (done < size) {
    const ssize_t came =
        pread(buffered_.number(), to + done, static_cast<std::size_t>(size - done), offset + done);
    if (came > 0) {
      done += came;
    } else if (came == 0) {
      break;
    } else if (errno != EINTR) {
      fail(errno, offset + done);
    }
  }
  return done;
}

std::optional<std::int64_t> OpenFile::read_direct(const iovec* parts, int count,
                                                  std::int64_t offset, std::int64_t wanted) {
  std::array<iovec, kMaxParts> left{};
  std::copy_n(parts, count, left.begin());
  iovec* first = left.data();
  for (std::int64_t done = 0;;) {
    const ssize_t came = preadv(direct_.number(), first, count, offset + done);
    if (came < 0) {
      if (errno == EINTR) continue;
      if (errno != EINVAL) fail(errno, offset + done);
      direct_works_ = false;
      return std::nullopt;
    }
    // Less than a block comes where the file ends only.
    const std::int64_t whole = block_floor(came);
    if (done + came >= wanted || whole == 0) return done + came;
    done += whole;
    auto skip = static_cast<std::size_t>(whole);
    for (; skip >= first->iov_len; ++first, --count) skip -= first->iov_len;
    first->iov_base = static_cast<std::byte*>(first->iov_base) + skip;
    first->iov_len -= skip;
  }
}

void OpenFile::fail(int error, std::int64_t offset) const {
  throw FileError(error, path_, " at byte " + std::to_string(offset));
}

}  // namespace llfast
