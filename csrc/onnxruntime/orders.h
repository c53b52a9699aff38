// Scan orders from their text and the spatial shape, as medssm/orders.py makes them: the token visited at each step, and the steps at which the state
// begins anew.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace medssm::ort {

using Shape = std::vector<int64_t>;

struct Walk {
  std::vector<int64_t> index;   // empty: raster
  std::vector<int64_t> starts;  // empty: only step 0
  bool reverse = false;         // of a walk without an index
};

// "window(size=(4, 2), axes=(1, 0), reverse=True)": a kind, and numbers by name. True is 1.
struct Order {
  std::string kind;
  std::map<std::string, Shape> parameters;

  explicit Order(const std::string& spec) {
    const size_t open = spec.find('(');
    if (open == std::string::npos || spec.back() != ')') throw std::invalid_argument("order: expected a kind with its arguments, got " + spec);
    kind = spec.substr(0, open);
    Shape* values = nullptr;
    for (size_t i = open + 1; i < spec.size();) {
      if (std::isdigit(static_cast<unsigned char>(spec[i])) && values) {
        size_t digits = 0;
        values->push_back(std::stoll(spec.substr(i), &digits));
        i += digits;
      } else if (std::isalpha(static_cast<unsigned char>(spec[i]))) {
        size_t end = i;
        while (std::isalpha(static_cast<unsigned char>(spec[end]))) ++end;
        const std::string word = spec.substr(i, end - i);
        if (spec[end] == '=')
          values = &parameters[word];
        else if (word == "True" && values)
          values->push_back(1);
        i = end;
      } else {
        ++i;
      }
    }
  }

  bool reverse() const { return parameters.count("reverse") > 0; }

  // A parameter that is one number, or one for each axis.
  Shape per_axis(const char* name, size_t dims) const {
    const Shape& given = parameters.at(name);
    return given.size() == 1 ? Shape(dims, given[0]) : given;
  }

  // The axes from slowest to fastest.
  Shape axes(size_t dims) const {
    const auto given = parameters.find("axes");
    if (given != parameters.end()) return given->second;
    Shape all(dims);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
};

// Where a position stands in a walk: positions are visited by rising `rank`; the state begins anew where `segment` changes.
struct Place {
  int64_t rank = 0, segment = 0;
};

// John Skilling's transform ("Programming the Hilbert curve", 2004): the distance along the curve of a point in a cube of 2^bits voxels a side.
inline int64_t hilbert_distance(Shape x, int bits) {
  const size_t dims = x.size();
  for (int b = bits - 1; b > 0; --b) {
    const int64_t q = int64_t{1} << b, low = q - 1;
    for (size_t i = 0; i < dims; ++i) {
      if (x[i] & q) {
        x[0] ^= low;
      } else {
        const int64_t swap = (x[0] ^ x[i]) & low;
        x[0] ^= swap;
        if (i) x[i] ^= swap;
      }
    }
  }
  for (size_t i = 1; i < dims; ++i) x[i] ^= x[i - 1];
  int64_t fix = 0;
  for (int b = bits - 1; b > 0; --b)
    if (x[dims - 1] >> b & 1) fix ^= (int64_t{1} << b) - 1;
  int64_t distance = 0;
  for (int b = bits - 1; b >= 0; --b)
    for (const int64_t c : x) distance = distance << 1 | ((c ^ fix) >> b & 1);
  return distance;
}

inline Place place(const Order& order, const Shape& shape, const Shape& at, int64_t position, int64_t length) {
  const size_t dims = shape.size();
  const std::string& kind = order.kind;
  Place found;
  if (kind == "raster") {
    for (const int64_t axis : order.axes(dims)) found.rank = found.rank * shape[axis] + at[axis];
  } else if (kind == "snake") {
    for (const int64_t axis : order.axes(dims)) found.rank = found.rank * shape[axis] + (found.rank % 2 ? shape[axis] - 1 - at[axis] : at[axis]);
  } else if (kind == "window" || kind == "dilated") {
    const bool window = kind == "window";
    const Shape size = order.per_axis(window ? "size" : "step", dims);
    for (const int64_t a : order.axes(dims))
      found.segment = window ? found.segment * (shape[a] / size[a] + 1) + at[a] / size[a] : found.segment * size[a] + at[a] % size[a];
    found.rank = found.segment;
    for (const int64_t a : order.axes(dims))
      found.rank = window ? found.rank * size[a] + at[a] % size[a] : found.rank * (shape[a] / size[a] + 1) + at[a] / size[a];
  } else if (kind == "interleaved") {
    const auto n = order.parameters.find("n");
    const int64_t chunks = n == order.parameters.end() ? shape[0] : n->second[0], inside = (length + chunks - 1) / chunks;
    found.rank = position % inside * (length + 1) + position / inside;
  } else if (kind == "zigzag") {
    const int64_t diagonal = std::accumulate(at.begin(), at.end(), int64_t{0});
    found.rank = diagonal;
    for (size_t i = 0; i + 1 < dims; ++i) found.rank = found.rank * shape[i] + (diagonal % 2 ? at[i] : shape[i] - 1 - at[i]);
  } else if (kind == "hilbert") {
    const int64_t side = *std::max_element(shape.begin(), shape.end());
    int bits = 1;
    while (int64_t{1} << bits < side) ++bits;
    found.rank = hilbert_distance(at, bits);
  } else {
    throw std::invalid_argument("order: this library does not know " + kind);
  }
  return found;
}

inline Walk make_walk(const std::string& spec, const Shape& shape) {
  Walk walk;
  if (spec.empty()) return walk;
  const Order order(spec);
  const Shape axes = order.axes(shape.size());
  if (order.kind == "raster" && std::is_sorted(axes.begin(), axes.end())) {
    walk.reverse = order.reverse();
    return walk;
  }
  const int64_t length = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  std::vector<Place> places(length);
  Shape at(shape.size(), 0);
  for (int64_t position = 0; position < length; ++position) {
    places[position] = place(order, shape, at, position, length);
    for (size_t axis = shape.size(); axis-- > 0;) {
      if (++at[axis] < shape[axis]) break;
      at[axis] = 0;
    }
  }
  walk.index.resize(length);
  if (order.kind == "raster" || order.kind == "snake") {  // their ranks are the steps
    for (int64_t position = 0; position < length; ++position) walk.index[places[position].rank] = position;
  } else {
    std::iota(walk.index.begin(), walk.index.end(), 0);
    std::sort(walk.index.begin(), walk.index.end(), [&](int64_t a, int64_t b) { return places[a].rank < places[b].rank; });
  }
  if (order.reverse()) std::reverse(walk.index.begin(), walk.index.end());
  for (int64_t step = 1; step < length; ++step)
    if (places[walk.index[step]].segment != places[walk.index[step - 1]].segment) walk.starts.push_back(step);
  if (!walk.starts.empty()) walk.starts.insert(walk.starts.begin(), 0);
  return walk;
}

// The walk of an order through a spatial shape, kept for later calls of all sessions.
inline std::shared_ptr<const Walk> walk_of(const std::string& spec, const Shape& shape) {
  constexpr size_t kMost = 128;
  static std::mutex mutex;
  static std::map<std::pair<std::string, Shape>, std::shared_ptr<const Walk>> kept;
  const auto key = std::make_pair(spec, shape);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kept.find(key);
    if (found != kept.end()) return found->second;
  }
  auto made = std::make_shared<const Walk>(make_walk(spec, shape));
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.size() >= kMost) kept.clear();
  return kept[key] = std::move(made);
}

}  // namespace medssm::ort
