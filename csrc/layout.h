// From sizes and strides of any tensor to the few dimensions that a kernel loops over.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "args.h"

namespace fused_elbo {

// torch's limit on the dimensions that its own strided kernels take.
constexpr int kMaxDims = 25;

// Sizes of a tensor, on the stack: a call on a few elements takes no longer than a few allocations.
class Sizes {
 public:
  Sizes() = default;
  Sizes(std::initializer_list<int64_t> values) : Sizes(values.begin(), values.end()) {}
  Sizes(const int64_t* begin, const int64_t* end) {
    for (; begin != end; ++begin) push_back(*begin);
  }

  void push_back(int64_t value) { values_[count_++] = value; }
  void push_front(int64_t value) {
    std::copy_backward(begin(), end(), end() + 1);
    values_[0] = value;
    ++count_;
  }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  const int64_t* data() const { return values_.data(); }
  int64_t* begin() { return values_.data(); }
  int64_t* end() { return values_.data() + count_; }
  const int64_t* begin() const { return values_.data(); }
  const int64_t* end() const { return values_.data() + count_; }
  int64_t& operator[](size_t i) { return values_[i]; }
  int64_t operator[](size_t i) const { return values_[i]; }
  bool operator==(const Sizes& other) const {
    return count_ == other.count_ && std::equal(begin(), end(), other.begin());
  }

 private:
  std::array<int64_t, kMaxDims + 1> values_;  // one more: a sample dimension in front
  size_t count_ = 0;
};

// A tensor's strides against the full index space [batch..., event...]; broadcast dimensions have stride 0.
using Strides = std::array<int64_t, kMaxDims>;

// Aligns sizes/strides right with the full shape, as broadcasting does.
inline Strides broadcast_strides(const int64_t* sizes, const int64_t* strides, int64_t dims, const Sizes& full) {
  Strides result{};
  const int64_t shift = static_cast<int64_t>(full.size()) - dims;
  for (int64_t d = 0; d < dims; ++d) result[d + shift] = sizes[d] == 1 ? 0 : strides[d];
  return result;
}

// Collapses the event dimensions of several operands jointly, in logical order: two neighbors become one where every
// operand steps through them as through one. Sizes of 1 vanish.
class EventLayout {
 public:
  EventLayout(const Sizes& full, int batch_dims, std::initializer_list<const Strides*> operands)
      : full_(full), batch_dims_(batch_dims) {
    for (size_t d = batch_dims; d < full.size(); ++d) {
      if (full[d] == 1) continue;
      if (count_ > 0 && merges(operands, dims_[count_ - 1].last, d)) {
        dims_[count_ - 1].size *= full[d];
        dims_[count_ - 1].last = d;
      } else {
        dims_[count_++] = {full[d], d};
      }
    }
    if (count_ == 0) dims_[count_++] = {1, full.size()};  // an event of one element: strides do not matter
  }

  bool fits() const { return count_ <= kMaxEventDims; }

  void describe(Shape& shape) const {
    shape.samples = batch_dims_ == 2 ? full_[0] : 1;
    shape.rows = full_[batch_dims_ - 1];
    shape.event_dims = static_cast<int32_t>(count_);
    shape.event = 1;
    for (size_t i = 0; i < count_; ++i) {
      shape.size[i] = dims_[i].size;
      shape.event *= dims_[i].size;
    }
  }

  void describe(Operand& operand, const Strides& strides) const {
    operand.sample_stride = batch_dims_ == 2 ? strides[0] : 0;
    operand.row_stride = strides[batch_dims_ - 1];
    for (size_t i = 0; i < count_; ++i) {
      operand.stride[i] = dims_[i].last < full_.size() ? strides[dims_[i].last] : 1;
    }
  }

  // How many consecutive event elements share one value of an operand: the product of its trailing stride-0 dimensions.
  int64_t constant_run(const Strides& strides) const {
    int64_t run = 1;
    for (size_t d = full_.size(); d-- > static_cast<size_t>(batch_dims_);) {
      if (full_[d] != 1 && strides[d] != 0) break;
      run *= full_[d];
    }
    return run;
  }

 private:
  struct Dim {
    int64_t size;
    size_t last;  // the innermost full dimension it covers: the one whose strides it has
  };

  bool merges(std::initializer_list<const Strides*> operands, size_t outer, size_t inner) const {
    return std::all_of(operands.begin(), operands.end(),
                       [&](const Strides* strides) { return (*strides)[outer] == (*strides)[inner] * full_[inner]; });
  }

  const Sizes& full_;
  int batch_dims_;
  std::array<Dim, kMaxDims> dims_;
  size_t count_ = 0;
};

}  // namespace fused_elbo
