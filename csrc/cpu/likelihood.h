// The likelihood kernels' work, cut into units that any thread may run; the ELBO runs it beside the latent's.
#pragma once

#include <cstdint>

#include "unit.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

template <typename T>
struct LikelihoodBuffers;

template <typename T>
class LikelihoodWork {
 public:
  // totals: total() will be asked for.
  LikelihoodWork(const LikelihoodArgs& args, Pass pass, double* partials, bool totals);

  // Doubles that the constructor's partials must have room for.
  static int64_t partials_needed(const LikelihoodArgs& args, Pass pass, bool totals);

  int64_t units() const { return cut_.units.count(); }
  void run(int64_t begin, int64_t end) const;
  // After all units, on one thread: what is left of the reductions.
  void finish() const;
  double total(int64_t sample, int64_t row) const;

 private:
  // One unit: which elements, and where its results lie among the partial ones.
  struct Piece {
    Range range;
    int64_t partial;
  };

  // What is cut into units: whole events, or the long runs of an event that share one logvar, as if each were a row.
  struct Cut {
    int64_t runs;
    Units units;
    static Cut of(const LikelihoodArgs& args, Pass pass);
    Piece piece(int64_t unit) const;
    // Partial results of a row.
    int64_t per_row() const { return runs * units.segments; }
    int64_t partials() const { return units.samples * units.rows * units.segments; }
  };

  static bool wants_value(const LikelihoodArgs& args, Pass pass);
  static bool sums_later(const LikelihoodArgs& args, Pass pass, const Cut& cut, bool totals);
  static bool wants_grad_logvar(const LikelihoodArgs& args, Pass pass);
  static bool splits_grad_logvar(const LikelihoodArgs& args, const Cut& cut);

  // next: the unit that this thread does afterwards, or again this one.
  void constant_unit(const Piece& piece, const Piece& next, LikelihoodBuffers<T>& buffers) const;
  double constant_elements(const Range& range, const Range& next, bool one_row, bool squares,
                           LikelihoodBuffers<T>& buffers) const;
  template <typename Stored>
  bool constant_in_place(const Range& range, const Range& next, bool one_row, bool squares, double* total,
                         LikelihoodBuffers<T>& buffers) const;

  void elementwise_unit(const Piece& piece, const Piece& next, LikelihoodBuffers<T>& buffers) const;
  const T* elementwise_row(const Range& range, const Range& next, double* total, LikelihoodBuffers<T>& buffers) const;
  const T* elementwise_rows(const Range& range, LikelihoodBuffers<T>& buffers) const;
  const T* logvars(const Range& range, LikelihoodBuffers<T>& buffers) const;
  template <typename Stored>
  bool elementwise_in_place(const Range& range, const Range& next, T upstream, double* total) const;

  void store_grad_mean(const Range& range, const T* grad_mean, LikelihoodBuffers<T>& buffers) const;
  const T* upstream(const Range& range, LikelihoodBuffers<T>& buffers) const;
  void read_upstream(const Range& range, LikelihoodBuffers<T>& buffers) const;
  void reduce_values(const Piece& piece, const double* values) const;
  void reduce_grad_logvar(const Piece& piece, const double* values) const;

  const LikelihoodArgs& args_;
  Cut cut_;
  bool value_, grad_mean_wanted_, grad_logvar_wanted_;
  bool constant_;    // one logvar per row of units_, and sums are wanted: squares are summed, all else is per unit
  bool one_logvar_;  // one logvar in the whole call
  bool reversed_;    // blocks of units from the last to the first
  bool streams_;     // gradients written in place go past the caches
  double logvar_value_ = 0, precision_ = 0;  // that one
  double* partials_;                         // [samples, rows, runs, segments]
  double* logvar_partials_;                  // likewise, of the gradient of logvar
  View x_, mean_, logvar_, mask_, ll_, grad_ll_, grad_mean_, grad_x_, grad_logvar_;
};

void likelihood(const LikelihoodArgs& args, Pass pass, void* workspace, const Context& context);
int64_t likelihood_workspace_bytes(const LikelihoodArgs& args, Pass pass);

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
