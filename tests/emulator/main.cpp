// SPDX-License-Identifier: Apache-2.0
// The driver: CUDA kernels in the emulator against the CPU kernels.
#include <signal.h>

#include <chrono>
#include <cstdio>
#include <utility>

#include "options.h"

namespace {

using namespace emulator;

void print_case() { std::fprintf(stderr, "  %s\n", current_case.c_str()); }

void on_signal(int number, siginfo_t* info, void*) {
  // -fsanitize=alignment traps by an instruction that there is not.
  const char* const what = number == SIGILL ? "misaligned access, or a trap"
                                            : "access behind a tensor, shared memory or the stack";
  std::fprintf(stderr, "\nFAULT: signal %d at %p (%s)", number, info->si_addr, what);
  if (running) std::fprintf(stderr, ", block %u, thread %u", running->block.x, running->thread.x);
  std::fputc('\n', stderr);
  print_case();
  signal(number, SIG_DFL);
  raise(number);
}

/// On a stack of its own: that of a fiber may be what is broken.
void catch_signals() {
  static char stack[64 * 1024];
  stack_t place{};
  place.ss_sp = stack, place.ss_size = sizeof stack;
  sigaltstack(&place, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(number, &action, nullptr);
}

/// So that a time limit cuts all operators alike.
void shuffle_cases(std::vector<Case>& cases, unsigned seed) {
  std::uint64_t state = seed * 12345ull + 1;
  for (std::size_t i = cases.size(); i > 1; --i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(cases[i - 1], cases[(state >> 33) % i]);
  }
}

/// Every order with every arrival, late twice as often as the others: it is the one that finds
/// most.
Settings settings_of(const Options& options, std::size_t number) {
  constexpr Arrival kTurns[] = {Arrival::late, Arrival::random, Arrival::late,
                                Arrival::late, Arrival::random, Arrival::early};
  const unsigned hash = static_cast<unsigned>(number * 2654435761u) >> 7;
  Settings s = settings;
  s.order = options.order.value_or(static_cast<Order>(hash % 5));
  s.arrival = options.arrival.value_or(kTurns[hash / 5 % std::size(kTurns)]);
  s.seed = options.seed + static_cast<unsigned>(number);
  return s;
}

std::string text_of(const Case& c, const Settings& s, std::size_t number) {
  constexpr const char* kOrders[] = {"forward", "backward", "lowest", "highest", "random"};
  constexpr const char* kArrivals[] = {"late", "early", "random"};
  return "case " + std::to_string(number) + ": " + c.text + " | order " +
         kOrders[static_cast<int>(s.order)] + ", arrival " + kArrivals[static_cast<int>(s.arrival)];
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv);
  fastkern::set_parallel_for(
      [](std::int64_t count, std::int64_t, fastkern::ParallelBody body, void* context) {
        if (count > 0) body(context, 0, count);
      });
  on_fault = print_case;
  catch_signals();

  const auto alone = [&](const char* family) {
    for (const char* other :
         {"attention", "fp8", "softmax", "loss", "rope", "pointwise", "activation", "optim"}) {
      if (family != std::string(other) && options.names.count(other) > 0) return false;
    }
    return true;
  };
  std::vector<Case> cases;
  const auto add = [&](const char* family, std::vector<Case> (*more)(const Options&)) {
    if (!alone(family)) return;
    for (Case& one : more(options)) cases.push_back(std::move(one));
  };
  add("norm", norm_cases);
  add("norm", group_norm_cases);
  add("attention", attention_cases);
  add("fp8", attention_fp8_cases);
  add("softmax", softmax_cases);
  add("loss", loss_cases);
  add("rope", rope_cases);
  add("pointwise", pointwise_cases);
  add("activation", activation_cases);
  add("optim", optim_cases);
  if (cases.empty()) {
    std::puts("no such cases (those of f16 need a build with F16=1)");
    return 2;
  }
  shuffle_cases(cases, options.seed);

  const double begin = now();
  const std::size_t wanted = options.only ? 1 : cases.size();
  std::size_t done = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    if (i != static_cast<std::size_t>(options.only.value_or(static_cast<int>(i)))) continue;
    settings = settings_of(options, i);
    current_case = text_of(cases[i], settings, i);
    const double start = now();
    if (start - begin > options.seconds || failures >= options.most_failures) break;
    if (options.list) {
      std::printf("%s\n", current_case.c_str());
    } else {
      cases[i].check();
    }
    if (options.verbose) {
      std::printf("%5.2f s  %s\n", now() - start, current_case.c_str());
      std::fflush(stdout);
    }
    ++done;
  }
  std::printf("%zu of %zu cases, %d failures, %.1f s, %ld launches, %ld of them of clusters\n",
              done, wanted, failures, now() - begin, counts.launches, counts.cluster_launches);
  if (done < wanted) std::puts("not all cases ran");
  return failures != 0 || done < wanted;
}
