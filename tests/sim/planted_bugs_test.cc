// What the model is for: a handler with a bug is found out within a stated number of seeds, and one without
// passes.
//
// Two processes share a file of eight pages, each with a userfaultfd of its own, both served by one handler
// with a store behind it. Their threads read pages and give pages back. A page reads as the store's byte
// until it is given back and as zero ever after; nobody is left asleep.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

constexpr std::uint64_t kPages = 8;
constexpr std::uint64_t kWindow = 3;  // pages that are installed with the one that was asked for

enum class Bug {
  none,
  no_wake_after_present,
  fault_before_older_remove,  // a fault is answered as it is read, before the removes behind it in the queue
  stale_fetch,                // bytes that were fetched before a remove are installed after it
  short_copy_taken_for_whole,
};

std::byte stored(std::uint64_t page) {
  return static_cast<std::byte>(page + 1);
}

// One process that is served.
struct Client {
  Process* process;
  Uffd uffd;
  Address start;
  std::vector<Thread*> threads;
};

class Handler {
 public:
  Handler(std::vector<Client>& clients, Bug bug) : clients_(clients), bug_(bug) {}

  // One round: read all that waits, install what was fetched in the round before, fetch what is wanted now.
  // Returns whether anything is left to do.
  bool run_once() {
    for (Client& client : clients_) read_messages(client);
    // What was asked for beside a page is installed with it, so those faults are answered too.
    std::set<std::pair<Client*, std::uint64_t>> answered;
    for (Wanted& wanted : wanted_) {
      if (wanted.bytes.empty() || !install(wanted)) continue;
      for (std::uint64_t page = wanted.page; page < wanted.page + kWindow; ++page)
        answered.emplace(wanted.client, page);
    }
    std::erase_if(wanted_,
                  [&](const Wanted& wanted) { return answered.contains({wanted.client, wanted.page}); });
    for (Wanted& wanted : wanted_)
      if (wanted.bytes.empty()) fetch(wanted);
    return !wanted_.empty();
  }

 private:
  struct Wanted {
    Client* client;
    std::uint64_t page;
    std::vector<std::byte> bytes;  // empty: not fetched yet
  };

  void read_messages(Client& client) {
    std::array<abi::Msg, 8> messages;
    for (std::size_t count; (count = client.uffd.read(messages).messages) > 0;) {
      for (const abi::Msg& raw : std::span(messages).first(count)) {
        const Message message = decode(raw);
        if (const auto* fault = std::get_if<Fault>(&message)) {
          wanted_.push_back({&client, (fault->address - client.start).value / kPage, {}});
          if (bug_ == Bug::fault_before_older_remove) answer_at_once();
        } else if (const auto* event = std::get_if<RemoveEvent>(&message)) {
          remove((event->range.start - client.start).value / kPage);
        }
      }
    }
  }

  void answer_at_once() {
    fetch(wanted_.back());
    if (install(wanted_.back())) wanted_.pop_back();
  }

  void remove(std::uint64_t page) {
    removed_.insert(page);
    if (bug_ == Bug::stale_fetch || bug_ == Bug::fault_before_older_remove) return;
    for (Wanted& wanted : wanted_) wanted.bytes.clear();
  }

  void fetch(Wanted& wanted) {
    const std::uint64_t end = std::min(wanted.page + kWindow, kPages);
    for (std::uint64_t page = wanted.page; page < end; ++page)
      wanted.bytes.insert(wanted.bytes.end(), kPage, removed_.contains(page) ? std::byte{} : stored(page));
  }

  // True if the fault needs no more of us.
  bool install(Wanted& wanted) {
    Client& client = *wanted.client;
    const std::span<const std::byte> bytes(wanted.bytes);
    for (std::size_t done = 0; done < bytes.size();) {
      const Address to = at(client.start, wanted.page, done);
      const Outcome outcome = client.uffd.copy(to, bytes.subspan(done));
      done += outcome.done.value;
      if (outcome.stop == Stop::changing) return false;
      if (outcome.stop == Stop::cut_short && bug_ == Bug::short_copy_taken_for_whole) return true;
      if (outcome.stop != Stop::present) continue;
      if (bug_ != Bug::no_wake_after_present) {
        EXPECT_TRUE(client.uffd.wake(pages(to, 1)));
      }
      done += kPage;
    }
    return true;
  }

  std::vector<Client>& clients_;
  Bug bug_;
  std::vector<Wanted> wanted_;
  std::set<std::uint64_t> removed_;
};

// What the threads may see.
class Oracle {
 public:
  void remove_starts(std::uint64_t page) { leaving_.insert(page); }
  void remove_ends(std::uint64_t page) { gone_.insert(page); }
  bool surely_gone(std::uint64_t page) const { return gone_.contains(page); }
  bool is_right(std::uint64_t page, bool was_gone_before, int byte) const {
    if (byte == 0) return leaving_.contains(page);
    return byte == std::to_integer<int>(stored(page)) && !was_gone_before;
  }

 private:
  std::set<std::uint64_t> leaving_;
  std::set<std::uint64_t> gone_;
};

struct Doing {
  bool reads;
  std::uint64_t page;
  bool was_gone_before;
};

Client make_client(Kernel& kernel, const ObjectPtr& file) {
  Process& process = kernel.spawn();
  auto uffd = Uffd::create({.required = Features(abi::kFeatureEventRemove)}, process.system_calls());
  const Address start =
      process.map({.memory = Memory::shmem_shared, .length = ByteCount(kPages * kPage), .object = file})
          .value();
  uffd->register_range(pages(start, kPages), kMissing).value();
  Client client{.process = &process, .uffd = std::move(*uffd), .start = start, .threads = {}};
  for (int i = 0; i < 3; ++i) client.threads.push_back(&process.spawn_thread());
  return client;
}

// What went wrong under this seed; empty if nothing.
std::string run(std::uint64_t seed, Bug bug) {
  Kernel kernel({.seed = seed, .turns_before_calls = 3});
  std::mt19937_64 random(seed);
  const ObjectPtr file = kernel.make_shmem(ByteCount(kPages * kPage));
  std::vector<Client> clients;
  clients.push_back(make_client(kernel, file));
  clients.push_back(make_client(kernel, file));
  Handler handler(clients, bug);
  Oracle oracle;
  std::map<Thread*, Doing> doing;

  const auto look_at_the_finished = [&]() -> std::string {
    for (auto it = doing.begin(); it != doing.end();) {
      const auto [thread, what] = *it;
      if (thread->state() != Thread::State::idle) {
        ++it;
        continue;
      }
      if (!what.reads)
        oracle.remove_ends(what.page);
      else if (!oracle.is_right(what.page, what.was_gone_before, byte_of(*thread)))
        return "wrong byte";
      it = doing.erase(it);
    }
    return kernel.violations().empty() ? "" : kernel.violations().front();
  };

  for (int round = 0; round < 60; ++round) {
    for (Client& client : clients) {
      for (Thread* thread : client.threads) {
        if (thread->state() != Thread::State::idle || random() % 2 == 0) continue;
        const std::uint64_t page = random() % kPages;
        const bool reads = random() % 5 != 0;
        doing[thread] = {.reads = reads, .page = page, .was_gone_before = oracle.surely_gone(page)};
        if (reads) {
          thread->access({.address = at(client.start, page)});
        } else {
          oracle.remove_starts(page);
          thread->advise(pages(at(client.start, page), 1), Advice::remove);
        }
      }
    }
    for (std::uint64_t turns = random() % 8; turns > 0; --turns) kernel.step();
    handler.run_once();
    if (const std::string wrong = look_at_the_finished(); !wrong.empty()) return wrong;
  }
  for (int round = 0; round < 200; ++round) {
    kernel.run();
    handler.run_once();
  }
  if (const std::string wrong = look_at_the_finished(); !wrong.empty()) return wrong;
  return doing.empty() ? "" : "a thread sleeps for ever";
}

// The first seed that finds it, from 1; 0 if none up to `most` does.
std::uint64_t seeds_to_find(Bug bug, std::uint64_t most, std::string& wrong) {
  for (std::uint64_t seed = 1; seed <= most; ++seed)
    if (wrong = run(seed, bug); !wrong.empty()) return seed;
  return 0;
}

TEST(SimPlantedBug, NoneIsFoundInASoundHandler) {
  std::string wrong;
  const std::uint64_t seed = seeds_to_find(Bug::none, 300, wrong);
  EXPECT_EQ(seed, 0u) << "seed " << seed << ": " << wrong;
}

TEST(SimPlantedBug, NoWakeAfterPresentIsFoundWithin20Seeds) {
  std::string wrong;
  EXPECT_NE(seeds_to_find(Bug::no_wake_after_present, 20, wrong), 0u);
  EXPECT_EQ(wrong, "a thread sleeps for ever");
}

TEST(SimPlantedBug, AFaultServedBeforeAnOlderRemoveIsFoundWithin20Seeds) {
  std::string wrong;
  EXPECT_NE(seeds_to_find(Bug::fault_before_older_remove, 20, wrong), 0u);
  EXPECT_EQ(wrong, "wrong byte");
}

TEST(SimPlantedBug, AStaleFetchIsFoundWithin20Seeds) {
  std::string wrong;
  EXPECT_NE(seeds_to_find(Bug::stale_fetch, 20, wrong), 0u);
  EXPECT_EQ(wrong, "wrong byte");
}

TEST(SimPlantedBug, AShortCopyTakenForAWholeOneIsFoundWithin20Seeds) {
  std::string wrong;
  EXPECT_NE(seeds_to_find(Bug::short_copy_taken_for_whole, 20, wrong), 0u);
  EXPECT_EQ(wrong, "a thread sleeps for ever");
}

}  // namespace
}  // namespace uffdkit::sim::test
