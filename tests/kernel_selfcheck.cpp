// A self-check of the torch-free kernels that needs nothing but a C++ compiler: for machines that only an
// emulator stands in for (`make aarch64-check`). Small integers, so every result must be exact; the
// definitions are plain loops in double. The full tests are test_kernels_numpy.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "batch_norm.h"
#include "grouped_conv.h"

using namespace gconv;

namespace {

int64_t checks = 0, failures = 0;
uint64_t random_state = 1;

// An integer from low to high (an LCG: the same numbers on every machine).
int64_t random_integer(int64_t low, int64_t high) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return low + static_cast<int64_t>((random_state >> 33) % static_cast<uint64_t>(high - low + 1));
}

std::vector<double> integers(int64_t count, int64_t low, int64_t high) {
  std::vector<double> v(count);
  for (double& x : v) x = static_cast<double>(random_integer(low, high));
  return v;
}

// A number as it reads back from storage: kept bits of its significand, nearest even.
double rounded(double v, DType dtype) {
  const int bits = dtype == DType::f32 ? 24 : dtype == DType::bf16 ? 8 : 11;
  if (v == 0) return 0;
  int exponent;
  const double significand = std::frexp(v, &exponent);
  const double r = std::ldexp(std::nearbyint(std::ldexp(significand, bits)), exponent - bits);
  return dtype == DType::f16 && std::fabs(r) > 65504 ? std::copysign(INFINITY, r) : r;
}

// An activation in storage. bfloat16 and float16 are encoded by hand, so that no type of the kernels is
// trusted.
struct Stored {
  DType dtype;
  std::vector<uint8_t> bytes;

  Stored(DType type, int64_t count) : dtype(type), bytes(count * (type == DType::f32 ? 4 : 2), 0xff) {}
  Stored(DType type, const std::vector<double>& values) : Stored(type, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) put(i, values[i]);
  }
  void put(size_t i, double v) {
    const float f = static_cast<float>(v);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (dtype == DType::f32) {
      std::memcpy(&bytes[4 * i], &u, 4);
      return;
    }
    uint16_t half = static_cast<uint16_t>(u >> 16);
    if (dtype == DType::f16)
      half = v == 0 ? 0
                    : static_cast<uint16_t>((u >> 16 & 0x8000u) | (((u >> 23 & 255u) - 112u) << 10) |
                                            (u >> 13 & 1023u));
    std::memcpy(&bytes[2 * i], &half, 2);
  }
  double get(size_t i) const {
    if (dtype == DType::f32) {
      float f;
      std::memcpy(&f, &bytes[4 * i], 4);
      return f;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[2 * i], 2);
    if (dtype == DType::bf16) {
      const uint32_t u = static_cast<uint32_t>(half) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    double v = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) v = mantissa ? NAN : INFINITY;
    return half & 0x8000 ? -v : v;
  }
  Nhwc view(int64_t h, int64_t w, int64_t c) { return {bytes.data(), h * w * c, w * c, c}; }
};

std::vector<float> floats(const std::vector<double>& values) { return {values.begin(), values.end()}; }

template <typename Params>
void stage(void (*f)(const Params&, int64_t, int64_t), const Params& p) {
  constexpr int64_t THREADS = 3;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < THREADS; ++i) threads.emplace_back([&p, f, i] { f(p, i, THREADS); });
  for (std::thread& t : threads) t.join();
}

struct Workspace {
  float* data;
  explicit Workspace(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(count + 1) * 4) != 0) std::abort();
    data = static_cast<float*>(p);
    for (int64_t i = 0; i < count; ++i) data[i] = NAN;
  }
  ~Workspace() { std::free(data); }
};

void expect(bool ok, const char* what, const char* where, size_t index, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20)
    std::printf("FAIL %s, %s: element %zu: got %g, want %g\n", what, where, index, got, want);
}

void expect_stored(const char* what, const char* where, const Stored& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    expect(got.get(i) == rounded(want[i], got.dtype), what, where, i, got.get(i), want[i]);
}

double relu_act(double x, const std::vector<double>& table, int64_t c, int64_t channels) {
  return std::fmax(table[c] * x + table[channels + c], 0.0);
}

void check_conv(Isa isa, DType dtype, Use winograd, const GroupedConvShape& s, const char* where) {
  const int64_t cg = s.c / s.groups, kg = s.k / s.groups;
  const auto x = integers(s.n * s.h * s.w * s.c, -3, 3), w = integers(s.k * cg * 9, -1, 1);
  const auto dy = integers(s.n * s.oh * s.ow * s.k, -2, 2), y = integers(s.n * s.oh * s.ow * s.k, -3, 3);
  const auto act = integers(2 * s.c, -1, 2), affine = integers(2 * s.k, -2, 2),
             finish = integers(6 * s.k, -2, 2);
  const auto act_floats = floats(act), affine_floats = floats(affine), finish_floats = floats(finish);
  Stored xs(dtype, x), ws(dtype, w), dys(dtype, dy), ys(dtype, y);

  std::vector<double> want_y(dy.size()), want_dx(x.size()), want_dw(w.size());
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t oh = 0; oh < s.oh; ++oh)
      for (int64_t ow = 0; ow < s.ow; ++ow)
        for (int64_t k = 0; k < s.k; ++k) {
          const int64_t o = ((n * s.oh + oh) * s.ow + ow) * s.k + k;
          const double kept = finish[4 * s.k + k] * y[o] + finish[5 * s.k + k] <= 0 ? 0 : dy[o];
          const double g =
              finish[k] * kept + finish[s.k + k] * (y[o] - finish[3 * s.k + k]) + finish[2 * s.k + k];
          for (int64_t i = 0; i < cg; ++i)
            for (int64_t r = 0; r < 3; ++r)
              for (int64_t t = 0; t < 3; ++t) {
                const int64_t h = oh * s.stride_h - s.pad_h + r * s.dil_h, c = k / kg * cg + i;
                const int64_t column = ow * s.stride_w - s.pad_w + t * s.dil_w;
                if (h < 0 || h >= s.h || column < 0 || column >= s.w) continue;
                const int64_t in = ((n * s.h + h) * s.w + column) * s.c + c,
                              tap = ((k * cg + i) * 3 + r) * 3 + t;
                const double a = relu_act(x[in], act, c, s.c);
                want_y[o] += a * w[tap];
                want_dx[in] += g * w[tap];
                want_dw[tap] += g * a;
              }
          want_y[o] = std::fmax(affine[k] * want_y[o] + affine[s.k + k] + y[o], 0.0);
        }

  Stored out(dtype, static_cast<int64_t>(y.size()));
  GroupedConvFwdParams f{};
  f.shape = s, f.dtype = dtype, f.isa = isa, f.winograd = winograd;
  f.x = xs.view(s.h, s.w, s.c), f.weight = ws.bytes.data(), f.layout = {9, 1},
  f.y = out.view(s.oh, s.ow, s.k);
  f.act = act_floats.data(), f.affine = affine_floats.data();
  f.residual = ys.view(s.oh, s.ow, s.k), f.relu = true;
  const Workspace forward(grouped_conv_fwd_workspace(f));
  f.workspace = forward.data;
  stage(grouped_conv_fwd_pack_cpu, f);
  stage(grouped_conv_fwd_cpu, f);
  expect_stored("grouped_conv_fwd", where, out, want_y);

  Stored dx(dtype, static_cast<int64_t>(x.size()));
  GroupedConvBwdInputParams b{};
  b.shape = s, b.dtype = dtype, b.isa = isa, b.winograd = winograd;
  b.dy = dys.view(s.oh, s.ow, s.k), b.y = ys.view(s.oh, s.ow, s.k), b.finish = finish_floats.data();
  b.weight = ws.bytes.data(), b.layout = {9, 1}, b.dx = dx.view(s.h, s.w, s.c);
  const Workspace input(grouped_conv_bwd_input_workspace(b));
  b.workspace = input.data;
  stage(grouped_conv_bwd_input_pack_cpu, b);
  stage(grouped_conv_bwd_input_cpu, b);
  expect_stored("grouped_conv_bwd_input", where, dx, want_dx);

  Stored dw(dtype, static_cast<int64_t>(w.size()));
  GroupedConvBwdWeightParams d{};
  d.shape = s, d.dtype = dtype, d.isa = isa, d.winograd = winograd;
  d.dy = b.dy, d.y = b.y, d.finish = b.finish, d.x = f.x, d.act = f.act, d.dweight = dw.bytes.data(),
  d.layout = {9, 1};
  const Workspace weight(grouped_conv_bwd_weight_workspace(d));
  d.workspace = weight.data;
  stage(grouped_conv_bwd_weight_cpu, d);
  stage(grouped_conv_bwd_weight_merge_cpu, d);
  expect_stored("grouped_conv_bwd_weight", where, dw, want_dw);
}

void check_norm(Isa isa, DType dtype, const BatchNormShape& s, const char* where) {
  const int64_t rows = s.n * s.h * s.w, count = rows * s.c;
  const auto x = integers(count, -3, 3), dz = integers(count, -3, 3), z = integers(count, -1, 1);
  const auto mean = integers(s.c, -2, 2), affine = integers(2 * s.c, -2, 2),
             finish = integers(6 * s.c, -2, 2);
  const auto mean_floats = floats(mean), affine_floats = floats(affine), finish_floats = floats(finish);
  const std::vector<float> rstd(s.c, 0.5f);
  Stored xs(dtype, x), dzs(dtype, dz), zs(dtype, z);
  std::vector<double> want_y(count), want_dx(count), sum(s.c), square(s.c), sum_g(s.c), sum_gx(s.c);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i % s.c;
    const double g = z[i] <= 0 ? 0 : dz[i];
    want_y[i] = std::fmax(affine[c] * x[i] + affine[s.c + c] + z[i], 0.0);
    want_dx[i] = finish[c] * g + finish[s.c + c] * (x[i] - finish[3 * s.c + c]) + finish[2 * s.c + c];
    sum[c] += x[i], square[c] += x[i] * x[i];
    sum_g[c] += g, sum_gx[c] += g * (x[i] - mean[c]) * 0.5;
  }

  std::vector<float> got_mean(s.c), got_var(s.c), dgamma(s.c), dbeta(s.c), got_finish(6 * s.c);
  BatchNormStatsParams t{s, dtype, isa, xs.view(s.h, s.w, s.c), got_mean.data(), got_var.data(), nullptr};
  const Workspace moments(batch_norm_stats_workspace(t));
  t.workspace = moments.data;
  stage(batch_norm_stats_cpu, t);
  stage(batch_norm_stats_merge_cpu, t);
  for (int64_t c = 0; c < s.c; ++c) {
    const double m = sum[c] / rows, v = square[c] / rows - m * m;
    expect(std::fabs(got_mean[c] - m) < 1e-6, "mean", where, c, got_mean[c], m);
    expect(std::fabs(got_var[c] - v) < 1e-5, "var", where, c, got_var[c], v);
  }

  Stored y(dtype, count), dx(dtype, count);
  BatchNormApplyParams a{s,
                         dtype,
                         isa,
                         xs.view(s.h, s.w, s.c),
                         affine_floats.data(),
                         zs.view(s.h, s.w, s.c),
                         nullptr,
                         true,
                         y.view(s.h, s.w, s.c)};
  stage(batch_norm_apply_cpu, a);
  expect_stored("batch_norm_apply", where, y, want_y);

  BatchNormBwdReduceParams r{};
  r.shape = s, r.dtype = dtype, r.isa = isa;
  r.dz = dzs.view(s.h, s.w, s.c), r.z = a.residual, r.dbeta = dbeta.data();
  r.main.x = t.x, r.main.mean = mean_floats.data(), r.main.rstd = rstd.data();
  r.main.dgamma = dgamma.data(), r.main.finish = got_finish.data();
  const Workspace sums(batch_norm_bwd_reduce_workspace(r));
  r.workspace = sums.data;
  stage(batch_norm_bwd_reduce_cpu, r);
  stage(batch_norm_bwd_reduce_merge_cpu, r);
  for (int64_t c = 0; c < s.c; ++c) {
    expect(dbeta[c] == sum_g[c], "dbeta", where, c, dbeta[c], sum_g[c]);
    expect(dgamma[c] == sum_gx[c], "dgamma", where, c, dgamma[c], sum_gx[c]);
  }

  BatchNormBwdApplyParams p{};
  p.shape = s, p.dtype = dtype, p.isa = isa;
  p.dz = r.dz, p.x = t.x, p.finish = finish_floats.data(), p.z = a.residual, p.dx = dx.view(s.h, s.w, s.c);
  stage(batch_norm_bwd_apply_cpu, p);
  expect_stored("batch_norm_bwd_apply", where, dx, want_dx);
}

}  // namespace

int main() {
  constexpr int64_t WIDTHS[][3] = {{1, 1, 7}, {2, 2, 5},   {3, 3, 3},   {4, 4, 9},   {5, 5, 3},
                                   {8, 8, 4}, {16, 16, 2}, {24, 24, 2}, {32, 32, 1}, {1, 2, 9},
                                   {3, 5, 4}, {8, 4, 3},   {5, 16, 2}};
  constexpr int64_t GEOMETRIES[][8] = {{7, 9, 1, 1, 1, 1, 1, 1},  {8, 11, 2, 2, 1, 1, 1, 1},
                                       {5, 17, 2, 1, 2, 0, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1},
                                       {11, 8, 2, 2, 2, 1, 3, 2}, {6, 10, 1, 2, 0, 2, 1, 1}};
  constexpr int64_t CHANNELS[] = {1, 3, 4, 5, 16, 33, 600};
  const char* dtype_names[] = {"float32", "bfloat16", "float16"};
  char where[96];
  for (Isa isa : ISAS) {
    if (!isa_supported(isa)) continue;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const char* type_name = dtype_names[static_cast<int>(dtype)];
      for (const auto& width : WIDTHS)
        for (const auto& g : GEOMETRIES) {
          GroupedConvShape s{};
          s.n = 2, s.h = g[0], s.w = g[1], s.groups = width[2], s.c = width[0] * width[2],
          s.k = width[1] * width[2];
          s.stride_h = g[2], s.stride_w = g[3], s.pad_h = g[4], s.pad_w = g[5], s.dil_h = g[6],
          s.dil_w = g[7];
          s.oh = (s.h + 2 * s.pad_h - 2 * s.dil_h - 1) / s.stride_h + 1;
          s.ow = (s.w + 2 * s.pad_w - 2 * s.dil_w - 1) / s.stride_w + 1;
          std::snprintf(where, sizeof where, "%s %s, %d-%d x%d, %dx%d", isa_name(isa), type_name,
                        static_cast<int>(width[0]), static_cast<int>(width[1]), static_cast<int>(width[2]),
                        static_cast<int>(g[0]), static_cast<int>(g[1]));
          check_conv(isa, dtype, Use::never, s, where);
          check_conv(isa, dtype, Use::always, s, where);
        }
      for (int64_t c : CHANNELS) {
        std::snprintf(where, sizeof where, "%s %s, C = %d", isa_name(isa), type_name, static_cast<int>(c));
        check_norm(isa, dtype, {2, 9, 11, c}, where);
      }
    }
    std::printf("%s: %lld values checked\n", isa_name(isa), static_cast<long long>(checks));
  }
  if (failures > 0) std::printf("%lld values are wrong\n", static_cast<long long>(failures));
  return failures > 0;
}
