// Work that is done by several threads, and whose results are wanted in order.
#pragma once

#include <uffdkit/error.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace uffdkit::image {

// As many threads as this process may use CPUs at once.
unsigned usable_cpus();

// Takes jobs from `next` until that gives none, does them by `work` on `threads` threads, and hands what
// comes of them to `take` on the calling thread, in the jobs' order. At most 2 * threads + 1 jobs are under
// way.
//
//   next:  Result<std::optional<Job>>()   one thread at a time, any of them
//   work:  Result<Done>(Job)              several at once
//   take:  Result<void>(Done)
//
// Ends with the first error in the jobs' order.
template <class Job, class Done, class Next, class Work, class Take>
Result<void> in_order(unsigned threads, Next next, Work work, Take take) {
  std::mutex source;  // held while next() runs
  std::uint64_t jobs = 0;

  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::uint64_t, Result<std::optional<Done>>> done;  // by job; without a value: there was no more
  unsigned under_way = 0;
  bool stop = false;

  const auto run = [&] {
    for (;;) {
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return stop || under_way < 2 * threads + 1; });
        if (stop) return;
        ++under_way;
      }
      std::unique_lock turn(source);
      const std::uint64_t number = jobs++;
      Result<std::optional<Job>> job = next();
      turn.unlock();
      Result<std::optional<Done>> result = std::nullopt;
      if (!job) {
        result = Failure(std::move(job).error());
      } else if (*job) {
        Result<Done> one = work(std::move(**job));
        if (one) {
          result = std::optional<Done>(std::move(*one));
        } else {
          result = Failure(std::move(one).error());
        }
      }
      const bool last = !result || !*result;
      const std::lock_guard lock(mutex);
      done.emplace(number, std::move(result));
      changed.notify_all();
      if (last) return;
    }
  };

  Result<void> outcome;
  {
    std::vector<std::jthread> running;
    running.reserve(threads);
    for (unsigned i = 0; i < threads; ++i) running.emplace_back(run);
    for (std::uint64_t number = 0;; ++number) {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return done.contains(number); });
      Result<std::optional<Done>> result = std::move(done.extract(number).mapped());
      --under_way;
      changed.notify_all();
      lock.unlock();
      if (!result) {
        outcome = Failure(std::move(result).error());
        break;
      }
      std::optional<Done>& one = *result;
      if (!one) break;
      outcome = take(*std::move(one));
      if (!outcome) break;
    }
    const std::lock_guard lock(mutex);
    stop = true;
    changed.notify_all();
  }
  return outcome;
}

}  // namespace uffdkit::image
