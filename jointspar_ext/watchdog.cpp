#include "watchdog.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

namespace jointspar {

namespace {

constexpr double kYear = 365.0 * 86400.0;

[[noreturn]] void end_process(const std::string& message) {
    // Neither Python nor stdio: a thread that holds their locks may be the one that never comes back.
    const auto written = ::write(STDERR_FILENO, message.data(), message.size());
    static_cast<void>(written);
    ::_exit(1);
}

// Signals are the program's own affair: they go to its threads.
void block_signals(sigset_t* before) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

}  // namespace

Watchdog* Watchdog::only_ = new Watchdog(0);

Watchdog& Watchdog::instance() {
    static const int is_registered = pthread_atfork(nullptr, nullptr, begin_anew);
    static_cast<void>(is_registered);
    return *only_;
}

// In a forked child: the parent's thread may have held the lock. Numbers go on, so that the end of a watch that the
// parent started ends none of the child's.
void Watchdog::begin_anew() { only_ = new Watchdog(only_->last_); }

std::uint64_t Watchdog::start(double seconds, const std::string& message) {
    if (!(seconds > 0.0)) throw std::invalid_argument("seconds must be positive, not " + std::to_string(seconds));
    const auto wait =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, kYear)));
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto deadline = Clock::now() + wait;
    if (!is_running_) start_thread();
    watches_.emplace(++last_, Watch{deadline, message});
    if (deadline < sleeps_until_) changed_.notify_one();
    return last_;
}

void Watchdog::start_thread() {
    sigset_t before;
    block_signals(&before);
    try {
        std::thread([this] { run(); }).detach();
    } catch (...) {  // the system has no thread left
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    is_running_ = true;
}

void Watchdog::end(std::uint64_t watch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    watches_.erase(watch);  // the thread looks again when it would have ended the process
}

Watchdog::Clock::time_point Watchdog::next_deadline() const {
    auto next = Clock::now() + std::chrono::hours(1);
    for (const auto& [number, watch] : watches_) next = std::min(next, watch.deadline);
    return next;
}

void Watchdog::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        for (const auto& [number, watch] : watches_) {
            if (watch.deadline <= Clock::now()) end_process(watch.message);
        }
        sleeps_until_ = next_deadline();
        changed_.wait_until(lock, sleeps_until_);
    }
}

}  // namespace jointspar
