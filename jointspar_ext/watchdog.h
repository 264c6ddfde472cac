// A thread that ends the process when something takes too long, whoever holds the GIL.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace jointspar {

class Watchdog {
  public:
    // The only one. It is never destroyed: its thread runs until the process ends. A forked child, which has no such
    // thread, gets one of its own, without the parent's watches.
    static Watchdog& instance();

    // Returns a number for `end`. Unless that comes within `seconds`, the message goes to stderr and the process ends
    // by _exit(1). More than a year counts as a year. Throws std::invalid_argument unless seconds > 0.
    std::uint64_t start(double seconds, const std::string& message);
    void end(std::uint64_t watch);

  private:
    using Clock = std::chrono::steady_clock;
    struct Watch {
        Clock::time_point deadline;
        std::string message;
    };

    explicit Watchdog(std::uint64_t last) : last_(last) {}
    static void begin_anew();
    void start_thread();
    void run();
    Clock::time_point next_deadline() const;

    static Watchdog* only_;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::map<std::uint64_t, Watch> watches_;
    std::uint64_t last_;
    Clock::time_point sleeps_until_{};
    bool is_running_ = false;
};

}  // namespace jointspar
