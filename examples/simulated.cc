// Tests a fault handler of one's own without the kernel: the same handler, on a simulated machine, under many
// seeds.
//
// Four threads of a simulated process read and write eight pages while a fifth discards them; the handler
// serves what is read. After every step the machine is checked; at the end every thread must have got
// through. A failure names its seed, and that seed repeats it.
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>

#include <array>
#include <cstdio>
#include <span>
#include <vector>

using namespace uffdkit;

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kPages = 8;

// The handler under test. It knows nothing of the simulation: give it a Uffd of the running kernel and it
// works there.
class Handler {
 public:
  explicit Handler(Uffd& uffd) : uffd_(uffd) {}

  // Reads what waits, and serves all that can be served. Returns whether there was anything to do.
  bool run_once() {
    if (!uffd_.wait_readable(waiting_.empty() ? 1000 : 0).value_or(false) && waiting_.empty()) return false;
    std::array<abi::Msg, 16> messages;
    const std::size_t count = uffd_.read(messages).messages;
    for (const abi::Msg& raw : std::span(messages).first(count)) {
      const Message message = decode(raw);
      if (const auto* fault = std::get_if<Fault>(&message)) waiting_.push_back(fault->address);
    }
    // A page that is refused because memory is changing stays here: nobody will ask for it again.
    std::erase_if(waiting_, [&](Address page) { return serve(page); });
    return true;
  }

 private:
  bool serve(Address page) {
    const std::array<std::byte, kPage> bytes = {};
    const Outcome outcome = uffd_.copy(page, bytes);
    // A page that is there already wakes nobody by itself.
    if (outcome.stop == Stop::present) return uffd_.wake({page, ByteCount(kPage)}).has_value();
    return outcome.stop != Stop::changing;
  }

  Uffd& uffd_;
  std::vector<Address> waiting_;
};

// Runs one seed. Returns what went wrong; empty if nothing did.
std::string run(std::uint64_t seed) {
  sim::Kernel kernel({.seed = seed, .turns_before_calls = 4});
  sim::Process& process = kernel.spawn();
  auto uffd = Uffd::create({.required = Features(abi::kFeatureEventRemove)}, process.system_calls());
  if (!uffd) return uffd.error().text();
  const Address start = process.map({.length = ByteCount(kPages * kPage)}).value();
  const AddressRange range{start, ByteCount(kPages * kPage)};
  if (auto registered = uffd->register_range(range, kMissing); !registered) return registered.error().text();

  std::vector<sim::Thread*> threads;
  threads.reserve(5);
  for (std::uint64_t i = 0; i < 5; ++i) threads.push_back(&process.spawn_thread());
  Handler handler(*uffd);
  for (std::uint64_t round = 0; round < 40; ++round) {
    for (std::size_t i = 0; i < threads.size(); ++i) {
      if (threads[i]->state() != sim::Thread::State::idle) continue;
      const Address page = start + ByteCount((round * 3 + i * 5) % kPages * kPage);
      if (i == 4)
        threads[i]->advise({page, ByteCount(kPage)}, sim::Advice::dont_need);
      else
        threads[i]->access({.address = page, .write = i % 2 == 0, .value = std::byte{1}});
    }
    handler.run_once();
    for (const std::string& wrong : kernel.violations()) return wrong;
  }
  while (handler.run_once()) {
  }
  for (const sim::Thread* thread : threads)
    if (thread->state() != sim::Thread::State::idle)
      return "a thread was left " + sim::to_string(thread->state());
  return {};
}

}  // namespace

int main() {
  constexpr std::uint64_t kSeeds = 200;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    if (const std::string wrong = run(seed); !wrong.empty()) {
      std::printf("seed %lu: %s\n", static_cast<unsigned long>(seed), wrong.c_str());
      return 1;
    }
  }
  std::printf("%lu seeds, and every thread got through\n", static_cast<unsigned long>(kSeeds));
  return 0;
}
