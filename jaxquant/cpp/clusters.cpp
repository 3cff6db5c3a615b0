#include "clusters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace jaxquant {
namespace {

constexpr int kCappings = 6;     // of cells, as in jaxquant/clustering/optimum.py
constexpr int kSettles = 3;      // as in jaxquant/clustering/clusters.py
constexpr float kUnits = 0x1p40f;  // largest magnitude in the dynamic program: squares stay normal
constexpr double kRounding = 1e-6;  // of a sum of cells, at most
constexpr int64_t kTaskWeights = 1 << 12;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Order ---------------------------------------------------------------------------------------------

// Unsigned integers in the order of floats; NaN has the outermost ones.
uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

float float_of(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sorts keys, and what belongs to them, by counting: digits of 8 bits, or of 11 where there are many.
class Sorter {
 public:
  Sorter(int64_t size, bool with_weights)
      : digits_(size < 2048 ? 4 : 3), bits_(size < 2048 ? 8 : 11), starts_(digits_ << bits_) {
    other_keys_.resize(size);
    if (with_weights) other_weights_.resize(size);
  }

  void sort(std::vector<uint32_t>& keys, std::vector<float>& weights) {
    const uint32_t mask = (1u << bits_) - 1;
    const int64_t size = static_cast<int64_t>(keys.size());
    std::fill(starts_.begin(), starts_.end(), 0);
    for (const uint32_t key : keys) {
      for (int digit = 0; digit < digits_; ++digit) {
        ++starts_[(digit << bits_) + (key >> (digit * bits_) & mask)];
      }
    }
    for (int digit = 0; digit < digits_; ++digit) {
      uint32_t* starts = starts_.data() + (digit << bits_);
      const int shift = digit * bits_;
      if (starts[keys[0] >> shift & mask] == size) continue;  // all have the same
      uint32_t before = 0;
      for (uint32_t i = 0; i <= mask; ++i) before += std::exchange(starts[i], before);
      for (int64_t i = 0; i < size; ++i) {
        const uint32_t place = starts[keys[i] >> shift & mask]++;
        other_keys_[place] = keys[i];
        if (!weights.empty()) other_weights_[place] = weights[i];
      }
      keys.swap(other_keys_);
      if (!weights.empty()) weights.swap(other_weights_);
    }
  }

 private:
  const int digits_, bits_;
  std::vector<uint32_t> starts_, other_keys_;
  std::vector<float> other_weights_;
};

float next_below(float x) { return std::nextafter(x, -kInfinity); }

// The last float that is not above the middle of two: it is still nearest to the lower.
float last_below_middle(float lower, float upper) {
  const double a = lower, b = upper, total = a + b, rest = total - a;
  const double error = (a - (total - rest)) + (b - rest), middle = 0.5 * total;
  float last = static_cast<float>(middle);
  if (last > middle || (last == middle && error < 0)) last = next_below(last);
  return std::min(std::max(last, lower), std::max(lower, next_below(upper)));
}

float rounded(float x, const Format& format) {
  if (format.digits == 23 || x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.least_exponent);
  const double unit = std::ldexp(1.0, exponent - format.digits);
  const float nearest = static_cast<float>(std::nearbyint(x / unit) * unit);
  return std::min(std::max(nearest, format.least), format.largest);
}

// What a thread works with ---------------------------------------------------------------------------

class Solver {
 public:
  explicit Solver(const Blocks1D& problem)
      : p_(problem),
        k_(problem.k),
        sorter_(problem.size, problem.weights),
        order_(problem.k),
        fixed_(problem.k),
        centroids_(problem.k),
        ascending_(problem.k),
        edges_(problem.k + 1),
        begins_(problem.k),
        ends_(problem.k) {}

  void solve(int64_t block) {
    const float* x = p_.x + block * p_.size;
    const float* weights = p_.weights ? p_.weights + block * p_.size : nullptr;
    float* centroids = p_.centroids + block * k_;
    if (!(p_.finite[block] = read(x, weights))) {
      std::fill_n(centroids, k_, 0.0f);
      std::fill_n(p_.counts + block * k_, k_, 0);
      std::fill_n(p_.losses + block * k_, k_, 0.0f);
      p_.norms[block] = 0.0f;
      return;
    }
    sum_up();
    const float* start = p_.start + block * k_;
    const bool* frozen = p_.frozen + block * k_;
    if (std::find(frozen, frozen + k_, true) == frozen + k_) {
      find_start();
    } else {
      std::copy_n(start, k_, centroids_.begin());
    }
    pin(frozen);
    pass();
    for (int64_t i = 0; i < k_; ++i) {
      centroids_[i] = frozen[i] ? start[i] : rounded(centroids_[i], p_.format);
      if (p_.iterations == 0) fixed_[i] = true;
    }
    settle();
    std::copy_n(centroids_.begin(), k_, centroids);
    measure(block);
  }

 private:
  // Sort the entries; of those that weigh, keep the values and masses. False if they are no numbers.
  bool read(const float* x, const float* weights) {
    const int64_t size = p_.size;
    keys_.resize(size);
    for (int64_t i = 0; i < size; ++i) keys_[i] = key_of(x[i]);
    float largest = 0.0f;
    if (weights) {
      own_weights_.assign(weights, weights + size);
      for (int64_t i = 0; i < size; ++i) {
        if (!(weights[i] >= 0 && weights[i] < kInfinity)) return false;
        largest = std::max(largest, weights[i]);
      }
    }
    sorter_.sort(keys_, own_weights_);
    values_.resize(size);
    for (int64_t i = 0; i < size; ++i) values_[i] = float_of(keys_[i]);
    if (!std::isfinite(values_.front()) || !std::isfinite(values_.back())) return false;
    unit_weight_ = 1.0;
    mass_.clear();
    entries_.clear();
    if (largest > 0) {
      unit_weight_ = largest;
      entries_ = values_;
      int64_t kept = 0;
      for (int64_t i = 0; i < size; ++i) {
        const float share = own_weights_[i] / largest;
        if (!(share > 0)) continue;
        mass_.push_back(share);
        values_[kept++] = values_[i];
      }
      values_.resize(kept);
    }
    return true;
  }

  float mass(int64_t i) const { return mass_.empty() ? 1.0f : mass_[i]; }

  void sum_up() {
    const int64_t size = static_cast<int64_t>(values_.size());
    moments_.resize(size + 1);
    double moment = moments_[0] = 0;
    if (mass_.empty()) {
      for (int64_t i = 0; i < size; ++i) moments_[i + 1] = moment += values_[i];
      return;
    }
    masses_.resize(size + 1);
    double mass = masses_[0] = 0;
    for (int64_t i = 0; i < size; ++i) {
      masses_[i + 1] = mass += mass_[i];
      moments_[i + 1] = moment += static_cast<double>(mass_[i]) * values_[i];
    }
  }

  double mass_between(int64_t begin, int64_t end) const {
    return mass_.empty() ? static_cast<double>(end - begin) : masses_[end] - masses_[begin];
  }

  // Of a run that has entries; within them, as rounding keeps order.
  float mean(int64_t begin, int64_t end) const {
    const double own = (moments_[end] - moments_[begin]) / mass_between(begin, end);
    return std::min(std::max(static_cast<float>(own), values_[begin]), values_[end - 1]);
  }

  // Where a codebook starts: jaxquant/clustering/starts.py, in the same order ------------------------

  // Merge neighbouring values into cells, equal in a mix of mass and range; see `coarsen`.
  void coarsen() {
    const int64_t size = static_cast<int64_t>(values_.size());
    cell_edges_.assign(1, 0);
    int64_t distinct = 1;
    for (int64_t i = 1; i < size; ++i) distinct += values_[i] > values_[i - 1];
    if (distinct <= p_.cells) {
      for (int64_t i = 1; i < size; ++i) {
        if (values_[i] > values_[i - 1]) cell_edges_.push_back(i);
      }
      cell_edges_.push_back(size);
      return;
    }
    efforts_.assign((size + 15) / 16 * 16, 0.0f);
    const double range = static_cast<double>(values_.back()) - values_.front();
    for (int64_t i = 1; i < size; ++i) {
      const float gap = static_cast<float>((static_cast<double>(values_[i]) - values_[i - 1]) / range);
      efforts_[i] = cube_root(mass(i) * gap * gap);
    }
    // The cap falls from one step to the next, so that there are never more shares than this. A share
    // of 1 begins a cell.
    const double shares = static_cast<double>(p_.cells) - 0.5;
    double cap = sum_capped(kInfinity) / std::max(shares - 1.0, 0.5);
    efforts_[0] = kInfinity;  // begins a cell
    for (int i = 0; i < kCappings; ++i) cap = sum_capped(cap) / shares;
    double level = -kRounding;
    int64_t cell = 0;
    for (int64_t i = 0; i < size; ++i) {
      level += cap > 0 ? std::min<double>(efforts_[i], cap) / cap : 1.0;
      const int64_t own = std::min(static_cast<int64_t>(std::ceil(level)) - 1, p_.cells - 1);
      if (own > cell) cell_edges_.push_back(i), cell = own;
    }
    cell_edges_.push_back(size);
  }

  static float cube_root(float x) {  // to a few percent
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = bits / 3 + 709921077;
    float root;
    std::memcpy(&root, &bits, 4);
    return x > 0 ? root : 0.0f;
  }

  double sum_capped(double cap) const {
    double sums[16] = {};
    for (size_t i = 0; i < efforts_.size(); i += 16) {
      for (int j = 0; j < 16; ++j) sums[j] += std::min<double>(efforts_[i + j], cap);
    }
    return std::accumulate(sums, sums + 16, 0.0);
  }

  // The costs [longest, cells] of clusters of 1, 2, ... cells from each on: about their mean, and
  // about zero. Means are counted from the first cell on: far from zero floats are too coarse.
  void fill_costs() {
    const int64_t cells = p_.cells, used = static_cast<int64_t>(cell_edges_.size()) - 1;
    cell_means_.assign(cells + longest_, 0.0f);
    cell_rests_.assign(cells + longest_, 0.0f);
    cell_masses_.assign(cells + longest_, 0.0f);
    const float largest = std::max(std::abs(values_.front()), std::abs(values_.back()));
    const double unit = largest > 0 ? kUnits / static_cast<double>(largest) : 1.0;
    for (int64_t i = 0; i < used; ++i) {
      const double own = mass_between(cell_edges_[i], cell_edges_[i + 1]);
      const double moment = moments_[cell_edges_[i + 1]] - moments_[cell_edges_[i]];
      cell_masses_[i] = static_cast<float>(own);
      const double middle = moment / own * unit;
      cell_means_[i] = static_cast<float>(middle);
      cell_rests_[i] = static_cast<float>(middle - cell_means_[i]);
    }
    for (auto* array : {&grown_mass_, &grown_mean_, &grown_cost_, &grown_about_zero_}) {
      array->assign(cells, 0.0f);
    }
    float *mass = grown_mass_.data(), *mean = grown_mean_.data(), *cost = grown_cost_.data();
    float* about_zero = grown_about_zero_.data();
    const float *first_mean = cell_means_.data(), *first_rest = cell_rests_.data();
    for (int64_t length = 0; length < longest_; ++length) {
      const float *new_mass = cell_masses_.data() + length, *new_mean = cell_means_.data() + length;
      const float* new_rest = cell_rests_.data() + length;
      float* row = costs_.data() + length * cells;
      for (int64_t i = 0; i < cells; ++i) {
        const float total = mass[i] + new_mass[i];
        const float fraction = new_mass[i] / (total > 0 ? total : 1.0f);
        const float distance = (new_mean[i] - first_mean[i]) + (new_rest[i] - first_rest[i]);
        const float delta = distance - mean[i];
        cost[i] += mass[i] * fraction * delta * delta;
        mean[i] += delta * fraction;
        mass[i] = total;
        row[i] = new_mass[i] > 0 ? cost[i] : kInfinity;
      }
      if (!p_.zero) continue;
      row += longest_ * cells;
      for (int64_t i = 0; i < cells; ++i) {
        about_zero[i] += new_mass[i] * new_mean[i] * new_mean[i];
        row[i] = new_mass[i] > 0 ? about_zero[i] : kInfinity;
      }
    }
  }

  // The least costs of so many clusters of the cells from each on, which may be none: what is left
  // after the last costs nothing. With `about_zero` one of the clusters is about zero.
  float* rests(int64_t clusters, bool about_zero) {
    return rests_.data() + (clusters * (p_.zero ? 2 : 1) + about_zero) * width_;
  }

  void fill_rests(int64_t used) {
    for (int64_t clusters = 0; clusters <= k_; ++clusters) {
      for (int layer = 0; layer <= (p_.zero ? 1 : 0); ++layer) {
        float* own = rests(clusters, layer);
        std::fill_n(own, width_, kInfinity);
        if (clusters > 0) {
          add_cluster(own, costs_.data(), rests(clusters - 1, layer));
          if (layer) add_cluster(own, costs_.data() + longest_ * p_.cells, rests(clusters - 1, false));
        }
        std::fill(own + used, own + width_, layer && clusters == 0 ? kInfinity : 0.0f);
      }
    }
  }

  void add_cluster(float* own, const float* costs, const float* then) const {
    for (int64_t length = 0; length < longest_; ++length, costs += p_.cells) {
      const float* after = then + length + 1;
      for (int64_t i = 0; i < p_.cells; ++i) {
        const float total = costs[i] + after[i];
        own[i] = total < own[i] ? total : own[i];
      }
    }
  }

  // By clusters that are not long; once more by longer ones while one is half as long as may be: it
  // may be a half of what should be one.
  void find_start() {
    coarsen();
    for (longest_ = p_.longest;; longest_ = std::min(2 * longest_, p_.cells)) {
      if (2 * trace_optimum() < longest_ || longest_ == p_.cells) return;
    }
  }

  // Fill in the centroids. Returns the cells of the longest cluster.
  int64_t trace_optimum() {
    const int64_t used = static_cast<int64_t>(cell_edges_.size()) - 1;
    width_ = p_.cells + longest_;
    costs_.resize((p_.zero ? 2 : 1) * longest_ * p_.cells);
    rests_.resize((k_ + 1) * (p_.zero ? 2 : 1) * width_);
    fill_costs();
    fill_rests(used);
    int64_t start = 0, longest = 0;
    bool to_come = p_.zero;  // a cluster about zero
    float last = values_.front();
    for (int64_t i = 0; i < k_; ++i) {
      if (start >= used) {  // what is left is the centroid of no cell
        centroids_[i] = std::exchange(to_come, false) ? 0.0f : last;
        continue;
      }
      float least = kInfinity;
      int64_t end = used;
      bool about_zero = false;
      for (int layer = 0; layer <= to_come; ++layer) {
        const float* costs = costs_.data() + layer * longest_ * p_.cells + start;
        const float* then = rests(k_ - i - 1, to_come && !layer);
        for (int64_t length = 0; length < longest_ && start + length < used; ++length) {
          const float total = costs[length * p_.cells] + then[start + length + 1];
          if (total < least) least = total, end = start + length + 1, about_zero = layer;
        }
      }
      last = mean(cell_edges_[start], cell_edges_[end]);
      centroids_[i] = about_zero ? 0.0f : last;
      to_come = to_come && !about_zero;
      longest = std::max(longest, end - start);
      start = end;
    }
    if (p_.zero) std::sort(centroids_.begin(), centroids_.end());
    return longest;
  }

  // From the start to the codebook -------------------------------------------------------------------

  // Make one centroid zero if asked, the nearest that is not frozen elsewhere.
  void pin(const bool* frozen) {
    std::copy_n(frozen, k_, fixed_.begin());
    if (!p_.zero) return;
    int64_t nearest = -1;
    for (int64_t i = 0; i < k_; ++i) {
      if (frozen[i] && centroids_[i] != 0) continue;
      if (nearest < 0 || std::abs(centroids_[i]) < std::abs(centroids_[nearest])) nearest = i;
    }
    if (nearest < 0) return;
    centroids_[nearest] = 0.0f;
    fixed_[nearest] = true;
  }

  // Put the centroids in order; equal ones stay in theirs.
  void rank() {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return centroids_[a] < centroids_[b]; });
    for (int64_t i = 0; i < k_; ++i) ascending_[i] = centroids_[order_[i]];
  }

  // The number of ascending values that are not above a limit, looked for from a guess on.
  static int64_t count_up_to(const std::vector<float>& values, float limit, int64_t guess) {
    const int64_t size = static_cast<int64_t>(values.size());
    int64_t low = std::min(guess, size), high = low;
    if (low > 0 && values[low - 1] > limit) {
      for (int64_t step = 1; low > 0 && values[low - 1] > limit; step *= 2) {
        high = low - 1;
        low = std::max<int64_t>(low - step, 0);
      }
    } else {
      for (int64_t step = 1; high < size && values[high] <= limit; step *= 2) {
        low = high + 1;
        high = std::min(high + step, size);
      }
    }
    return std::upper_bound(values.begin() + low, values.begin() + high, limit) - values.begin();
  }

  // The first value of each ascending centroid's cluster. Returns whether one is another than before.
  bool find_edges(const std::vector<float>& values) {
    bool any = false;
    int64_t before = 0;
    for (int64_t i = 1; i < k_; ++i) {
      const float last = last_below_middle(ascending_[i - 1], ascending_[i]);
      before = std::max(before, count_up_to(values, last, edges_[i]));
      any |= std::exchange(edges_[i], before) != before;
    }
    edges_[0] = 0;
    edges_[k_] = static_cast<int64_t>(values.size());
    return any;
  }

  // Lloyd's passes: `lloyd` of jaxquant/clustering/lloyd.py.
  void pass() {
    if (p_.iterations == 0) return;
    rank();
    const int64_t size = static_cast<int64_t>(values_.size());
    for (int64_t i = 0; i <= k_; ++i) edges_[i] = size * i / k_;  // a guess
    const int64_t most = p_.iterations < 0 ? p_.passes : p_.iterations;
    for (int64_t number = 0; number < most; ++number) {
      const bool changed = find_edges(values_) || number == 0;
      for (int64_t i = 0; i < k_; ++i) {
        if (fixed_[order_[i]] || edges_[i] == edges_[i + 1]) continue;
        ascending_[i] = mean(edges_[i], edges_[i + 1]);
      }
      if (!changed && p_.iterations < 0) break;
    }
    for (int64_t i = 0; i < k_; ++i) centroids_[order_[i]] = ascending_[i];
  }

  // From where to where the values go that are nearest to each centroid: of equal ones to the first.
  void find_runs(const std::vector<float>& values) {
    rank();
    find_edges(values);
    for (int64_t first = 0, next; first < k_; first = next) {
      for (next = first + 1; next < k_ && ascending_[next] == ascending_[first]; ++next) {
        begins_[order_[next]] = ends_[order_[next]] = 0;
      }
      begins_[order_[first]] = edges_[first];
      ends_[order_[first]] = edges_[next];
    }
  }

  // Put centroids onto the values of their clusters where these are all equal: `onto_equals`.
  void settle() {
    const double range = static_cast<double>(values_.back()) - values_.front();
    const double width = range > 0 ? std::max(range * 0x1p-16, 0x1p-126) : 1.0;
    for (int number = 1;; ++number) {
      find_runs(values_);
      if (number == kSettles) return;
      bool any = false;
      for (int64_t i = 0; i < k_; ++i) {
        if (fixed_[i] || begins_[i] == ends_[i]) continue;
        if (values_[begins_[i]] != values_[ends_[i] - 1]) continue;
        const float value = rounded(values_[begins_[i]], p_.format);
        if (value == centroids_[i] || std::abs(static_cast<double>(value) - centroids_[i]) > width) {
          continue;
        }
        centroids_[i] = value;
        any = true;
      }
      if (!any) return;
    }
  }

  void measure(int64_t block) {
    float* losses = p_.losses + block * k_;
    int32_t* counts = p_.counts + block * k_;
    double norm = 0;
    for (int64_t i = 0; i < k_; ++i) {
      const double centroid = centroids_[i];
      double loss = 0, square = 0;
      for (int64_t place = begins_[i]; place < ends_[i]; ++place) {
        const double value = values_[place], own = mass(place), distance = value - centroid;
        loss += own * distance * distance;
        square += own * value * value;
      }
      counts[i] = static_cast<int32_t>(ends_[i] - begins_[i]);
      losses[i] = static_cast<float>(loss * unit_weight_);
      norm += square;
    }
    p_.norms[block] = static_cast<float>(norm * unit_weight_);
    if (entries_.empty()) return;
    find_runs(entries_);
    for (int64_t i = 0; i < k_; ++i) counts[i] = static_cast<int32_t>(ends_[i] - begins_[i]);
  }

  const Blocks1D& p_;
  const int64_t k_;
  Sorter sorter_;
  std::vector<uint32_t> keys_;
  std::vector<float> own_weights_;
  std::vector<float> values_, mass_;  // ascending, of those that weigh; no masses: all are 1
  std::vector<float> entries_;        // all of them, ascending, if they weigh
  double unit_weight_ = 1.0;          // of which masses are shares
  std::vector<double> masses_, moments_;  // sums over the first 0, 1, ... values
  std::vector<int64_t> cell_edges_;
  std::vector<float> efforts_, cell_means_, cell_rests_, cell_masses_;
  std::vector<float> grown_mass_, grown_mean_, grown_cost_, grown_about_zero_;
  int64_t longest_ = 0, width_ = 0;  // cells of a cluster at most, and of a row of `rests_`
  std::vector<float> costs_, rests_;
  std::vector<int> order_;
  std::vector<char> fixed_;
  std::vector<float> centroids_, ascending_;
  std::vector<int64_t> edges_, begins_, ends_;
};

}  // namespace

void cluster(const Blocks1D& problem, const Pool& pool) {
  const int64_t together = std::max<int64_t>(kTaskWeights / problem.size, 1);
  run_tasks((problem.blocks + together - 1) / together, pool, [&](int64_t number) {
    Solver solver(problem);
    const int64_t end = std::min((number + 1) * together, problem.blocks);
    for (int64_t block = number * together; block < end; ++block) solver.solve(block);
  });
}

}  // namespace jaxquant
