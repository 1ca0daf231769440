// CUDA kernel: a block a matrix, all sizes in one launch. A matrix lies in shared memory where it fits, else
// in a workspace that the second-level cache holds.
#include <algorithm>
#include <limits>

#include "slogdet_inverse.cuh"

namespace genperf {

namespace {

constexpr int kRuns = 64;  // a launch; of matrices of one size each

struct Run {
  int size, count;
  int64_t first, element;  // of the first matrix: its number, and where its elements begin
  int64_t workspace;       // in rows of strips; -1: in shared memory
};

struct Parameters {
  const void* packed;
  void *sign, *logabsdet, *inverse, *transpose;
  int64_t* status;
  StripRow* workspace;
  Run runs[kRuns];
};

int64_t strip_rows(int64_t n) { return (n + kStrip - 1) / kStrip * n; }

// False where an element is not finite.
template <class T>
__device__ __forceinline__ bool read(const Matrix& m, const T* from) {
  bool finite = true;
  for (int i = threadIdx.x; i < m.n * m.n; i += kThreads) {
    const double x = static_cast<double>(from[i]);
    m.at(i % m.n / kStrip, i / m.n).v[i % m.n % kStrip] = x;
    finite &= x - x == 0.0;
  }
  for (int i = threadIdx.x; i < m.n; i += kThreads)
    for (int v = m.n; v < m.strips * kStrip; ++v) m.at(m.strips - 1, i).v[v % kStrip] = 0.0;
  return __syncthreads_and(finite);
}

// Rows were exchanged on the way; of the inverse these are columns.
template <class T>
__device__ __forceinline__ void write(const Matrix& m, T* inverse, T* transpose) {
  if (threadIdx.x == 0) {
    for (int j = 0; j < m.n; ++j) m.from[j] = j;
    for (int k = m.n - 1; k >= 0; --k) {
      const int x = m.from[k];
      m.from[k] = m.from[m.exchanged[k]];
      m.from[m.exchanged[k]] = x;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m.n * m.n; i += kThreads) {
    const int row = i / m.n, column = i % m.n;
    const auto element = [&](int r, int c) {
      return static_cast<T>(m.at(m.from[c] / kStrip, r).v[m.from[c] % kStrip]);
    };
    if (inverse) inverse[i] = element(row, column);
    transpose[i] = element(column, row);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) slogdet_inverse_kernel(const Parameters p) {
  GENPERF_DYNAMIC_SHARED(StripRow, shared);
  int number = blockIdx.x, r = 0;
  while (number >= p.runs[r].count) number -= p.runs[r++].count;
  const Run& run = p.runs[r];
  const int n = run.size, strips = (n + kStrip - 1) / kStrip;
  const int64_t of_matrix = int64_t{strips} * n, place = run.first + number;
  const int depth = panel_strips(n) * kStrip, chunk = strips < kChunk ? strips : kChunk;
  Matrix m;
  m.n = n, m.strips = strips, m.whole = p.transpose != nullptr;
  m.rows = run.workspace < 0 ? shared + of_matrix : shared;
  m.w = run.workspace < 0 ? shared : p.workspace + run.workspace + number * of_matrix;
  m.exchanged = reinterpret_cast<int*>(m.rows + chunk * depth);
  m.from = m.exchanged + n;

  const int64_t elements = run.element + int64_t{number} * n * n;
  T* const inverse = p.inverse ? static_cast<T*>(p.inverse) + elements : nullptr;
  T* const transpose = p.transpose ? static_cast<T*>(p.transpose) + elements : nullptr;
  Determinant determinant;
  int status = read(m, static_cast<const T*>(p.packed) + elements) ? 0 : -1;
  if (status == 0)
    status = n <= 64         ? eliminate<1, 1>(m, determinant)
             : n <= kThreads ? eliminate<1, 4>(m, determinant)
                             : eliminate<4, 4>(m, determinant);
  const T nan = static_cast<T>(NAN);
  if (threadIdx.x == 0) {
    const double log = ::log(fabs(determinant.mantissa)) +
                       static_cast<double>(determinant.exponent) * 0.69314718055994530942;
    p.status[place] = status;
    static_cast<T*>(p.sign)[place] = status < 0 ? nan
                                                : static_cast<T>(status > 0                   ? 0
                                                                 : determinant.mantissa < 0.0 ? -1
                                                                                              : 1);
    static_cast<T*>(p.logabsdet)[place] = status < 0 ? nan : static_cast<T>(status > 0 ? -INFINITY : log);
  }
  if (!transpose) return;
  if (status == 0) return write(m, inverse, transpose);
  for (int i = threadIdx.x; i < n * n; i += kThreads) {
    if (inverse) inverse[i] = nan;
    transpose[i] = nan;
  }
}

int64_t shared_bytes(int64_t n, bool with_matrix) {
  const int64_t strips = (n + kStrip - 1) / kStrip;
  const int64_t rows = std::min<int64_t>(strips, kChunk) * panel_strips(n) * kStrip;
  return (rows + (with_matrix ? strip_rows(n) : 0)) * sizeof(StripRow) + 2 * n * sizeof(int);
}

// Dynamic shared memory of a block, less what the kernel has besides.
int64_t most_shared() {
  constexpr int64_t kBesides = 8 << 10;
#ifdef GENPERF_SIMT
  return (99 << 10) - kBesides;
#else
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - kBesides;
#endif
}

}  // namespace

int slogdet_inverse_cuda(const SlogdetInverseArgs& a, void* stream) {
  const int64_t most = most_shared();
  std::vector<Run> runs;
  int64_t element = 0, workspace = 0;
  for (size_t i = 0; i < a.sizes.size(); ++i) {
    const int64_t n = a.sizes[i];
    if (runs.empty() || runs.back().size != n) {
      const bool fits = shared_bytes(n, true) <= most;
      runs.push_back({static_cast<int>(n), 0, static_cast<int64_t>(i), element, fits ? -1 : workspace});
    }
    ++runs.back().count;
    element += n * n;
    if (runs.back().workspace >= 0) workspace += strip_rows(n);
  }
  // Large ones first: they take longest.
  std::stable_sort(runs.begin(), runs.end(), [](const Run& x, const Run& y) { return x.size > y.size; });
  Parameters p{a.packed.data,
               a.sign.data,
               a.logabsdet.data,
               a.inverse.data,
               a.inverse_transpose.data,
               static_cast<int64_t*>(a.status.data),
               static_cast<StripRow*>(a.workspace.data),
               {}};
  for (size_t begin = 0; begin < runs.size(); begin += kRuns) {
    const size_t end = std::min(runs.size(), begin + kRuns);
    int64_t bytes = 0;
    unsigned blocks = 0;
    for (size_t r = begin; r < end; ++r) {
      p.runs[r - begin] = runs[r];
      blocks += runs[r].count;
      bytes = std::max(bytes, shared_bytes(runs[r].size, runs[r].workspace < 0));
    }
    if (a.packed.dtype == DType::kFloat64) {
      GENPERF_LAUNCH(slogdet_inverse_kernel<double>, blocks, kThreads, bytes, stream, p);
    } else {
      GENPERF_LAUNCH(slogdet_inverse_kernel<float>, blocks, kThreads, bytes, stream, p);
    }
  }
  return cudaGetLastError();
}

}  // namespace genperf
