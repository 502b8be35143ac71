#include "engine/condemned_child.h"

#include <uffdkit/message.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>
#include <variant>

namespace uffdkit {
namespace {

// How often the kernel may put it off, and how long it is left alone then: a second in all.
constexpr int kPutOffMax = 10'000;
constexpr unsigned kPauseUs = 100;

struct Condemned {
  Uffd uffd;
  std::vector<MissingPages> missing;
};

// The same pages after mremap(2) has moved what lies in `from`. Without a length it is a second mapping of a
// file, as far as it goes.
void follow_move(std::vector<MissingPages>& missing, const RemapEvent& move) {
  const bool is_copy = move.from.length.value == 0;
  const std::size_t count = missing.size();
  for (std::size_t i = 0; i < count; ++i) {
    const MissingPages pages = missing[i];
    if (is_copy ? !pages.memory.contains(move.from.start) : !pages.memory.overlaps(move.from)) continue;
    const Address first = std::max(pages.memory.start, move.from.start);
    const Address end = is_copy ? pages.memory.end() : std::min(pages.memory.end(), move.from.end());
    missing.push_back({{move.to + (first - move.from.start), end - first}, pages.page_size});
  }
}

// Reads what the child does meanwhile: it goes on only when that has been read.
void follow(Condemned& child, std::vector<Condemned>& more) {
  std::array<abi::Msg, 16> messages;
  const std::size_t count = child.uffd.read(messages).messages;
  for (const abi::Msg& raw : std::span(messages).first(count)) {
    const Message message = decode(raw);
    if (const auto* move = std::get_if<RemapEvent>(&message))
      follow_move(child.missing, *move);
    else if (const auto* fork = std::get_if<ForkEvent>(&message))
      more.push_back({child.uffd.adopt_child(fork->child_fd), child.missing});
  }
}

enum class Done : std::uint8_t { yes, put_off, impossible };

Done poison(const Uffd& uffd, const MissingPages& pages) {
  std::vector<AddressRange> left = {pages.memory};
  const ByteCount page = pages.page_size.bytes();
  while (!left.empty()) {
    AddressRange& range = left.back();
    if (range.length.value == 0) {
      left.pop_back();
      continue;
    }
    const Outcome outcome = uffd.poison(range);
    range = {range.start + outcome.done, range.length - outcome.done};
    switch (outcome.stop) {
      case Stop::complete:
      case Stop::cut_short:
        break;
      case Stop::not_ready:
        if (range.length > page) {
          // It may cross from one mapping into the next, or one of the pages is not mapped any more.
          const ByteCount half(pages.page_size.round_down(range.length.value / 2));
          const AddressRange behind{range.start + half, range.length - half};
          range.length = half;
          left.push_back(behind);
          break;
        }
        [[fallthrough]];
      case Stop::present:
      case Stop::bad_memory:
        (void)uffd.wake({range.start, page});
        range = {range.start + page, range.length - page};
        break;
      case Stop::changing:
      case Stop::no_memory:
        return Done::put_off;
      case Stop::gone:
        return Done::yes;
      default:
        return Done::impossible;
    }
  }
  return Done::yes;
}

bool condemn(Condemned& child, std::vector<Condemned>& more) {
  int put_off = 0;
  for (std::size_t next = 0; next < child.missing.size();) {
    switch (poison(child.uffd, child.missing[next])) {
      case Done::yes:
        ++next;
        break;
      case Done::put_off:
        if (++put_off > kPutOffMax) return false;
        follow(child, more);
        ::usleep(kPauseUs);
        break;
      case Done::impossible:
        return false;
    }
  }
  return true;
}

}  // namespace

bool condemn_child(Uffd child, std::vector<MissingPages> missing) {
  std::vector<Condemned> children;
  children.push_back({std::move(child), std::move(missing)});
  bool done = true;
  while (!children.empty()) {
    Condemned now = std::move(children.back());
    children.pop_back();
    if (condemn(now, children)) continue;
    done = false;
    (void)now.uffd.release();
  }
  return done;
}

}  // namespace uffdkit
