#include "base/threads.h"

#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "base/signals_blocked.h"

namespace uffdkit {

Result<Thread> Threads::start(const char* what, std::function<void()> run) const {
  if (scheduler_ != nullptr) return Thread(*scheduler_, scheduler_->start(std::move(run)));
  const SignalsBlocked blocked;
  try {
    return Thread(std::thread(std::move(run)));
  } catch (const std::system_error& error) {
    return Failure(Error::from_errno(what, error.code().value())
                       .with_remedy("raise the limit on threads (ulimit -u, TasksMax=)"));
  }
}

bool Threads::start_detached(std::function<void()> run) const {
  if (scheduler_ != nullptr) {
    scheduler_->start(std::move(run));
    return true;
  }
  const SignalsBlocked blocked;
  try {
    std::thread(std::move(run)).detach();
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

Timer::Timer(Threads threads)
    : threads_(threads),
      fd_(threads.scheduler_ != nullptr
              ? threads.scheduler_->make_timer()
              : UniqueFd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK))) {}

Timer::~Timer() {
  if (threads_.scheduler_ != nullptr) threads_.scheduler_->forget_timer(fd_.get());
}

void Timer::set(std::int64_t when_ns) const {
  if (threads_.scheduler_ != nullptr) return threads_.scheduler_->set_timer(fd_.get(), when_ns);
  const itimerspec at{.it_interval = {}, .it_value = {when_ns / 1'000'000'000, when_ns % 1'000'000'000}};
  (void)::timerfd_settime(fd_.get(), TFD_TIMER_ABSTIME, &at, nullptr);
}

void Timer::clear() const {
  std::uint64_t expirations = 0;
  (void)!::read(fd_.get(), &expirations, sizeof expirations);
}

}  // namespace uffdkit
