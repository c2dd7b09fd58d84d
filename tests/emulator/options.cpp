// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace emulator {
namespace {

constexpr char kUsage[] = R"(usage: tools/run_emulator.sh [names, sizes and options]

  names        fwd bwd quant group attention fp8 softmax loss rope pointwise activation optim
               | rms layer | f32 bf16 mixed mixed2 mixed3 f16
               cases of these; of each of the three lists all, if none of it is named
  sizes        N, any number of them, for the row norms
  --rows M     as many rows; may be given again
  --layout L   0 dense, 1 padded rows, 2 one element off, 3 stride N + 1, 4 two levels,
               5 two levels and odd, 6 each operand its own
  --device D   an index of kDevices in emulator.h
  --order O    forward backward lowest highest random: the next thread that runs
  --arrival A  late early random: of asynchronous copies and stores
  --seed S     of the random ones; also selects other cases
  --per K      variants of each operator, type and size (1)
  --full       all of them        --variant I  the one of this number
  --bits       also: the same bits with dense operands and the plain order
  --time T     seconds, then what is left does not run and the run has failed (600)
  --stop K     ends after so many failures (20)
  --case I     the one that a failure names, alone; with the other arguments as they were
  --list  --verbose  --trace (every launch)
)";

[[noreturn]] void usage(const std::string& why) {
  if (!why.empty()) std::fprintf(stderr, "%s\n\n", why.c_str());
  std::fputs(kUsage, why.empty() ? stdout : stderr);
  std::exit(why.empty() ? 0 : 2);
}

template <class T>
T choice(const std::map<std::string, T>& known, const std::string& word) {
  const auto found = known.find(word);
  if (found == known.end()) usage("there is no " + word);
  return found->second;
}

std::int64_t number(const std::string& word) {
  char* end = nullptr;
  const std::int64_t value = std::strtoll(word.c_str(), &end, 10);
  if (word.empty() || *end != '\0' || value < 0) usage("not a number: " + word);
  return value;
}

const std::set<std::string> kNames = {"fwd",   "bwd",   "attention", "fp8",        "softmax",
                                      "loss",  "rope",  "pointwise", "activation", "optim",
                                      "quant", "group", "rms",       "layer",      "f32",
                                      "bf16",  "mixed", "mixed2",    "mixed3",     "f16"};

const std::map<std::string, Order> kOrders = {{"forward", Order::forward},
                                              {"backward", Order::backward},
                                              {"lowest", Order::lowest},
                                              {"highest", Order::highest},
                                              {"random", Order::random}};
const std::map<std::string, Arrival> kArrivals = {
    {"late", Arrival::late}, {"early", Arrival::early}, {"random", Arrival::random}};

}  // namespace

bool Options::wants(const char* name, std::initializer_list<const char*> group) const {
  bool any = false;
  for (const char* other : group) any = any || names.count(other);
  return !any || names.count(name);
}

Options parse_options(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto next = [&]() -> std::string {
      if (i + 1 == argc) usage(word + " wants a value");
      return argv[++i];
    };
    const auto next_int = [&] { return static_cast<int>(number(next())); };
    if (kNames.count(word)) {
      o.names.insert(word);
    } else if (std::isdigit(static_cast<unsigned char>(word[0]))) {
      o.sizes.insert(number(word));
    } else if (word == "--help") {
      usage("");
    } else if (word == "--rows") {
      o.rows.insert(next_int());
    } else if (word == "--layout") {
      o.layout = next_int();
    } else if (word == "--device") {
      o.device = next_int();
    } else if (word == "--order") {
      o.order = choice(kOrders, next());
    } else if (word == "--arrival") {
      o.arrival = choice(kArrivals, next());
    } else if (word == "--case") {
      o.only = next_int();
    } else if (word == "--seed") {
      o.seed = next_int();
    } else if (word == "--per") {
      o.per = next_int();
    } else if (word == "--full") {
      o.full = true;
    } else if (word == "--variant") {
      o.variant = next_int();
    } else if (word == "--bits") {
      o.same_bits = true;
    } else if (word == "--time") {
      o.seconds = next_int();
    } else if (word == "--stop") {
      o.most_failures = next_int();
    } else if (word == "--list") {
      o.list = true;
    } else if (word == "--verbose") {
      o.verbose = true;
    } else if (word == "--trace") {
      settings.trace = true;
    } else {
      usage("not known: " + word);
    }
  }
  if (o.layout.value_or(0) > 6) usage("there are layouts 0 to 6");
  if (o.device.value_or(0) >= static_cast<int>(std::size(kDevices))) usage("no such device");
  return o;
}

}  // namespace emulator
