// SPDX-License-Identifier: Apache-2.0
// Pointwise functions on the CPU. Threads share the elements in the order of the plan. A thread
// goes through its part in blocks that fit the first cache: inputs that are no dense run of the
// compute type are converted into one, the function is a loop over dense runs, and the result is
// converted on its way out. So a function is compiled once for each compute type, whatever the
// types and strides of its operands. Dense runs of f16 and bf16 have loops of their own, for speed.
#include "pointwise.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <span>

#include "fastkern/pointwise_plan.h"

namespace fastkern::cpu {
namespace {

constexpr std::int64_t kBlockBytes = 4096;
// Rows below this cost more to begin than to convert: their elements are brought together first.
constexpr std::int64_t kShort = 64;
// Elements of a run that goes through no buffer.
constexpr std::int64_t kLongRun = 65536;

constexpr const char* kDividedByZero = ": divisor must not be 0 where integers are divided";

/// A place in the elements of a plan.
struct Place {
  std::array<std::int64_t, kMaxDims> at{};

  Place(const PointwisePlan& plan, std::int64_t element) {
    for (int d = 0; d < plan.ndim; ++d) {
      at[d] = element % plan.sizes[d];
      element /= plan.sizes[d];
    }
  }
  std::int64_t offset(const PointwisePlan& plan, const PointwiseView& view) const {
    std::int64_t bytes = 0;
    for (int d = 0; d < plan.ndim; ++d) bytes += at[d] * view.strides[d];
    return bytes;
  }
  /// On by `count` elements, at most to the end of a row.
  void advance(const PointwisePlan& plan, std::int64_t count) {
    at[0] += count;
    for (int d = 0; d + 1 < plan.ndim && at[d] == plan.sizes[d]; ++d) {
      at[d] = 0;
      ++at[d + 1];
    }
  }
};

/// f(address, elements before, elements) for each row, or part of one, of n elements from `place`.
template <class F>
void each_run(const PointwisePlan& plan, const PointwiseView& view, Place place, std::int64_t n,
              const F& f) {
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t count = std::min(n - done, plan.sizes[0] - place.at[0]);
    f(view.data + place.offset(plan, view), done, count);
    place.advance(plan, count);
    done += count;
  }
}

/// Elements of kSize bytes of short rows, one after the other in `together`, or back from there.
template <std::size_t kSize, bool kBack>
void pack_elements(const PointwisePlan& plan, const PointwiseView& view, Place place,
                   std::int64_t n, char* together) {
  const std::int64_t row = plan.sizes[0], stride = view.strides[0];
  char* first = view.data + place.offset(plan, view) - place.at[0] * stride;
  for (std::int64_t done = 0; done < n;) {
    std::int64_t i = place.at[0];
    const std::int64_t end = std::min(row, i + n - done);
    for (char* at = first + i * stride; i < end; ++i, ++done, at += stride) {
      char* const packed = together + done * static_cast<std::int64_t>(kSize);
      std::memcpy(kBack ? at : packed, kBack ? packed : at, kSize);
    }
    place.at[0] = 0;
    for (int d = 1; d < plan.ndim; ++d) {
      first += view.strides[d];
      if (++place.at[d] < plan.sizes[d]) break;
      first -= view.strides[d] * plan.sizes[d];
      place.at[d] = 0;
    }
  }
}

template <bool kBack>
void pack(const PointwisePlan& plan, const PointwiseView& view, const Place& place, std::int64_t n,
          char* together) {
  switch (size_of(view.dtype)) {
    case 1:
      return pack_elements<1, kBack>(plan, view, place, n, together);
    case 2:
      return pack_elements<2, kBack>(plan, view, place, n, together);
    case 4:
      return pack_elements<4, kBack>(plan, view, place, n, together);
    case 8:
      return pack_elements<8, kBack>(plan, view, place, n, together);
    default:
      return pack_elements<16, kBack>(plan, view, place, n, together);
  }
}

/// A function, and what it is computed in.
struct Function {
  Evaluate evaluate = nullptr;
  const Number* scalars = nullptr;
  DType type = DType::f32;
  EvaluateStored stored = nullptr;  // of dense runs of the result's type, if there is such a loop
};

template <class T>
class Worker {
 public:
  Worker(const PointwisePlan& plan, const Function& function)
      : plan_(plan),
        evaluate_(function.evaluate),
        scalars_(function.scalars),
        type_(function.type),
        stored_(all_stored(function) ? function.stored : nullptr),
        short_rows_(plan.ndim > 1 && plan.sizes[0] < kShort),
        buffers_(new T[4 * kBlock]),
        packed_(new char[short_rows_ || plan.path == PointwisePath::transposed ? 16 * kBlock : 1]) {
    for (int i = 0; i < plan.inputs; ++i) {
      const PointwiseView& v = plan.in[i];
      const bool single = v.data && std::all_of(v.strides.begin(), v.strides.begin() + plan.ndim,
                                                [](std::int64_t stride) { return stride == 0; });
      filled_[i] = !v.data || single;
      if (!v.data) std::fill_n(buffer(i), kBlock, number_as<T>(v.number));
      if (single) load_block<T>(v.dtype, v.data, 0, kBlock, buffer(i));
      direct_ &= direct(v, true);
    }
    direct_ = (direct_ && direct(plan.out, true)) || stored_;
  }

  /// Tiles of kTile elements along dimension 0 and some along dimension 1, along which an input is
  /// dense: both its rows and those of the result stay in the first cache.
  bool run_tiles(std::int64_t begin, std::int64_t end) {
    bool good = true;
    const std::int64_t tiles0 = (plan_.sizes[0] + kTile - 1) / kTile;
    const std::int64_t tiles1 = (plan_.sizes[1] + kTileRows - 1) / kTileRows;
    PointwisePlan tile = plan_;
    tile.ndim = 2;
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first[] = {t % tiles0 * kTile, t / tiles0 % tiles1 * kTileRows};
      Place place(plan_, 0);
      place.at[0] = first[0], place.at[1] = first[1];
      std::int64_t rest = t / tiles0 / tiles1;
      for (int d = 2; d < plan_.ndim; rest /= plan_.sizes[d], ++d)
        place.at[d] = rest % plan_.sizes[d];
      tile.sizes[0] = std::min(kTile, plan_.sizes[0] - first[0]);
      tile.sizes[1] = std::min(kTileRows, plan_.sizes[1] - first[1]);
      const auto move = [&](PointwiseView& to, const PointwiseView& from) {
        if (from.data) to.data = from.data + place.offset(plan_, from);
      };
      move(tile.out, plan_.out);
      for (int i = 0; i < plan_.inputs; ++i) move(tile.in[i], plan_.in[i]);
      good &= one_tile(tile);
    }
    return good;
  }
  static std::int64_t tiles(const PointwisePlan& plan) {
    return (plan.sizes[0] + kTile - 1) / kTile * ((plan.sizes[1] + kTileRows - 1) / kTileRows) *
           (plan.numel / (plan.sizes[0] * plan.sizes[1]));
  }

  /// False as Evaluate says.
  bool run(std::int64_t begin, std::int64_t end) {
    // Long rows one by one, for runs that need no copy; several short ones together.
    const bool by_rows = plan_.sizes[0] >= kBlock / 4;
    const std::int64_t most = by_rows && direct_ ? kLongRun : kBlock;
    bool good = true;
    Place place(plan_, begin);
    for (std::int64_t at = begin; at < end;) {
      std::int64_t n = std::min(most, end - at);
      if (by_rows) n = std::min(n, plan_.sizes[0] - place.at[0]);
      good &= block(place, n, n <= plan_.sizes[0] - place.at[0]);
      at += n;
      if (by_rows) {
        place.advance(plan_, n);
      } else {
        place = Place(plan_, at);
      }
    }
    return good;
  }

 private:
  static constexpr std::int64_t kBlock = kBlockBytes / sizeof(T);
  static constexpr std::int64_t kTile = 32, kTileRows = kBlock / kTile;

  bool one_tile(const PointwisePlan& tile) const {
    const void* in[kMaxInputs] = {};
    const std::int64_t n0 = tile.sizes[0], n1 = tile.sizes[1];
    for (int i = 0; i < tile.inputs; ++i) {
      const PointwiseView& v = tile.in[i];
      in[i] = buffer(i);
      if (filled_[i]) continue;
      if (v.strides[1] == size_of(v.dtype)) {
        turn(v, n0, n1);
        load_block<T>(v.dtype, packed_.get(), size_of(v.dtype), n0 * n1, buffer(i));
        continue;
      }
      for (std::int64_t r = 0; r < n1; ++r)
        load_block<T>(v.dtype, v.data + r * v.strides[1], v.strides[0], n0, buffer(i) + r * n0);
    }
    T* const result = buffer(kMaxInputs);
    const bool good = evaluate_(in, scalars_, result, n0 * n1);
    for (std::int64_t r = 0; r < n1; ++r) {
      store_block<T>(tile.out.dtype, result + r * n0, n0, tile.out.data + r * tile.out.strides[1],
                     tile.out.strides[0]);
    }
    return good;
  }

  /// A tile that is dense along dimension 1, its elements along dimension 0 together.
  void turn(const PointwiseView& v, std::int64_t n0, std::int64_t n1) const {
    const auto turn_sized = [&]<class Bytes>() {
      char* const to = packed_.get();
      for (std::int64_t c = 0; c < n0; ++c) {
        const char* const from = v.data + c * v.strides[0];
        for (std::int64_t r = 0; r < n1; ++r)
          std::memcpy(to + (r * n0 + c) * static_cast<std::int64_t>(sizeof(Bytes)),
                      from + r * static_cast<std::int64_t>(sizeof(Bytes)), sizeof(Bytes));
      }
    };
    switch (size_of(v.dtype)) {
      case 1:
        return turn_sized.template operator()<std::uint8_t>();
      case 2:
        return turn_sized.template operator()<std::uint16_t>();
      case 4:
        return turn_sized.template operator()<std::uint32_t>();
      case 8:
        return turn_sized.template operator()<std::uint64_t>();
      default:
        return turn_sized.template operator()<Complex<double>>();
    }
  }

  T* buffer(int i) const { return buffers_.get() + i * kBlock; }
  bool direct(const PointwiseView& v, bool one_row) const {
    return one_row && v.data && v.dtype == type_ && dense(v);
  }
  /// Whether rows are runs of elements at addresses that suit their type.
  static bool dense(const PointwiseView& v) {
    return v.strides[0] == size_of(v.dtype) &&
           reinterpret_cast<std::uintptr_t>(v.data) % size_of(v.dtype) == 0;
  }
  /// Whether all rows are such runs of the result's type, but for inputs after the first that are
  /// numbers, all of them.
  bool all_stored(const Function& function) const {
    const auto fits = [&](const PointwiseView& v) {
      return v.data && v.dtype == plan_.out.dtype && dense(v);
    };
    if (!function.stored || !fits(plan_.out) || !fits(plan_.in[0])) return false;
    const auto rest = std::span(plan_.in).subspan(1, plan_.inputs - 1);
    return std::ranges::all_of(rest, fits) ||
           std::ranges::none_of(rest, [](const PointwiseView& v) { return v.data != nullptr; });
  }

  bool block(const Place& place, std::int64_t n, bool one_row) const {
    const void* in[kMaxInputs] = {};
    if (stored_ && one_row) {
      float numbers[kMaxInputs - 1] = {};
      for (int i = 0; i < plan_.inputs; ++i) {
        const PointwiseView& v = plan_.in[i];
        if (v.data) in[i] = v.data + place.offset(plan_, v);
        if (!v.data) numbers[i - 1] = number_as<float>(v.number);
      }
      stored_(in, plan_.inputs > 1 && !in[1] ? numbers : nullptr, scalars_,
              plan_.out.data + place.offset(plan_, plan_.out), n);
      return true;
    }
    for (int i = 0; i < plan_.inputs; ++i) {
      const PointwiseView& v = plan_.in[i];
      if (direct(v, one_row)) {
        in[i] = v.data + place.offset(plan_, v);
        continue;
      }
      in[i] = buffer(i);
      if (filled_[i]) continue;
      if (short_rows_) {
        pack<false>(plan_, v, place, n, packed_.get());
        load_block<T>(v.dtype, packed_.get(), size_of(v.dtype), n, buffer(i));
        continue;
      }
      each_run(plan_, v, place, n, [&](const char* from, std::int64_t done, std::int64_t count) {
        load_block<T>(v.dtype, from, v.strides[0], count, buffer(i) + done);
      });
    }
    const PointwiseView& out = plan_.out;
    if (direct(out, one_row))
      return evaluate_(in, scalars_, out.data + place.offset(plan_, out), n);
    T* const result = buffer(kMaxInputs);
    const bool good = evaluate_(in, scalars_, result, n);
    if (short_rows_) {
      store_block<T>(out.dtype, result, n, packed_.get(), size_of(out.dtype));
      pack<true>(plan_, out, place, n, packed_.get());
      return good;
    }
    each_run(plan_, out, place, n, [&](char* to, std::int64_t done, std::int64_t count) {
      store_block<T>(out.dtype, result + done, count, to, out.strides[0]);
    });
    return good;
  }

  const PointwisePlan& plan_;
  Evaluate evaluate_;
  const Number* scalars_;
  DType type_;
  EvaluateStored stored_;
  bool direct_ = true;  // no run of a row goes through a buffer
  bool short_rows_;
  std::unique_ptr<T[]> buffers_;
  std::unique_ptr<char[]> packed_;
  bool filled_[kMaxInputs] = {};
};

/// The dimension along which the first transposed input is dense becomes dimension 1.
void bring_dense_to_1(PointwisePlan& plan) {
  for (int i = 0; i < plan.inputs; ++i) {
    const std::int64_t size = size_of(plan.in[i].dtype);
    if (!plan.in[i].data || plan.in[i].strides[0] == size || plan.in[i].strides[0] == 0) continue;
    for (int d = 1; d < plan.ndim; ++d) {
      if (plan.in[i].strides[d] != size) continue;
      std::swap(plan.sizes[1], plan.sizes[d]);
      std::swap(plan.out.strides[1], plan.out.strides[d]);
      for (PointwiseView& v : plan.in) std::swap(v.strides[1], v.strides[d]);
      return;
    }
  }
}

template <class T>
void run(const char* op, const PointwisePlan& plan, const Function& function) {
  if (plan.path == PointwisePath::empty) return;
  std::atomic<bool> good{true};
  if (plan.path == PointwisePath::transposed) {
    PointwisePlan turned = plan;
    bring_dense_to_1(turned);
    parallel_for(Worker<T>::tiles(turned), 16, [&](std::int64_t begin, std::int64_t end) {
      Worker<T> worker(turned, function);
      if (!worker.run_tiles(begin, end)) good = false;
    });
    FK_CHECK(good, op, kDividedByZero);
    return;
  }
  parallel_for(plan.numel, 32768, [&](std::int64_t begin, std::int64_t end) {
    Worker<T> worker(plan, function);
    if (!worker.run(begin, end)) good = false;
  });
  FK_CHECK(good, op, kDividedByZero);
}

void run(const char* op, const PointwisePlan& plan, const Function& function) {
  switch (function.type) {
    case DType::f32:
      return run<float>(op, plan, function);
    case DType::f64:
      return run<double>(op, plan, function);
    case DType::i64:
      return run<std::int64_t>(op, plan, function);
    case DType::c64:
      return run<Complex<float>>(op, plan, function);
    default:
      return run<Complex<double>>(op, plan, function);
  }
}

Evaluate evaluate_of(const PointwiseCall& call) {
  switch (call.compute) {
    case DType::f32:
      return evaluate_f32(call.function);
    case DType::f64:
      return evaluate_f64(call.function);
    case DType::i64:
      return evaluate_i64(call.function);
    case DType::c64:
      return evaluate_c64(call.function);
    case DType::c128:
      return evaluate_c128(call.function);
    default:
      fail(call.op, ": compute must be f32, f64, i64, boolean, c64 or c128, got ",
           name_of(call.compute));
  }
}

}  // namespace

void pointwise(const PointwiseCall& original) {
  const PointwiseCall call = pointwise_simplified(original);
  const Evaluate evaluate = evaluate_of(call);
  FK_CHECK(evaluate, call.op, ": ", pointwise_info(call.function).name, " is not computed in ",
           name_of(call.compute));
  const std::span in(call.in.data(), pointwise_info(call.function).inputs);
  Function function{evaluate, call.scalars.data(), call.compute};
  if (call.compute == DType::f32) function.stored = evaluate_stored(call.function, call.out.dtype);
  run(call.op, pointwise_plan(call.op, call.out, in), function);
}

void pointwise_loop(const char* op, const TensorRef& out, std::span<const Operand> in,
                    DType compute, const PointwiseScalars& scalars, Evaluate evaluate) {
  FK_CHECK(compute == DType::f32 || compute == DType::f64, op, ": compute must be f32 or f64, got ",
           name_of(compute));
  run(op, pointwise_plan(op, out, in), {evaluate, scalars.data(), compute});
}

}  // namespace fastkern::cpu
